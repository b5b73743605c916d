"""Prompts from `[data]` for the teacher to answer, and its answers as documents for the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.distill.data import corpus
from limbeck.distill.data.document import Document, conversation_document
from limbeck.distill.data.filters import THINK_END
from limbeck.distill.data.tables import table_documents
from limbeck.distill.recipe.schema import Data, Generate
from limbeck.registry.core.digest import text_digest
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_START = "<think>"
CHARACTERS_PER_TOKEN = 2  # makes the prompt of a plain text about half a block long

Messages = Sequence[dict[str, str]]


class Prompt(NamedTuple):
    """A prompt for the teacher.

    Attributes:
        path: identifies it; the split and the statistics group by it.
        text: as plain text.
        messages: the messages before the answer; empty if it is not a conversation.
        row: its row of the table, for a verifier.
    """

    path: str
    text: str
    messages: Messages
    row: Mapping[str, Any]


def load_prompts(data: Data, generate: Generate, recipe_folder: Path) -> list[Prompt]:
    """The prompts of a recipe's data, ordered by the hash of their path, so that any prefix is a fair sample.

    Raises BadInput for an unusable row, with its number.
    """
    prompts: Iterator[Prompt]
    if data.kind == "dataset":
        prompts = _prompts_of_rows(data, recipe_folder)
    else:
        prompts = (
            Prompt(document.path, _beginning(document.text, data.max_length), (), {})
            for document in corpus.load_documents(data, recipe_folder)
        )
    ordered = sorted((p for p in prompts if p.text.strip()), key=lambda prompt: text_digest(prompt.path))
    if not ordered:
        raise BadInput(f"{data.path or data.kind} has no prompt", fix="give text, a prompt_column or a messages_column")
    return ordered[: generate.max_prompts]


def _prompts_of_rows(data: Data, recipe_folder: Path) -> Iterator[Prompt]:
    path = corpus.locate_data(data, recipe_folder)
    without_answers = data.model_copy(update={"completion_column": None})  # the teacher writes them
    for document, row in table_documents(without_answers, path):
        messages = list(document.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if document.messages and not (messages and messages[-1]["role"] == "user"):
            raise BadInput(f"{document.path}: the last message is not the user's", fix="leave the row out")
        if messages:
            text = "\n".join(message["content"] for message in messages)
        else:
            text = document.prompt or _beginning(document.text, data.max_length)
        yield Prompt(document.path, text, messages, row)


def _beginning(text: str, max_length: int) -> str:
    """The first half of a text, or about half a block if that is shorter, cut at the end of a word."""
    size = min(len(text) // 2, CHARACTERS_PER_TOKEN * max_length)
    while size > 1 and size < len(text) and not text[size].isspace():
        size -= 1
    return text[:size]


def prompt_messages(prompt: Prompt, system_prompt: str | None) -> list[dict[str, str]]:
    """A prompt as the messages before the answer."""
    messages = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def render_chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt_name: str) -> str:
    """Messages rendered by the chat template, up to where the answer begins. Raises BadInput if it refuses them."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"{prompt_name}: the teacher's chat template refuses it: {error}") from error


def document_layout(
    tokenizer: PreTrainedTokenizerBase, by_chat: bool, system_prompt: str | None
) -> Callable[[Prompt, str], Document]:
    """A function that makes the document to learn from a prompt and its answer.

    Args:
        tokenizer: the student's; its chat template, if it has one, lays out a chat.
        by_chat: whether the teacher answered in a chat; if not, its answer continues the prompt's text.
        system_prompt: put before the messages of a chat.
    """

    def plain(prompt: Prompt, answer: str) -> Document:
        text = f"{prompt.text}\n" if by_chat else prompt.text
        return Document(prompt.path, text + answer, prompt=text)

    def chat(prompt: Prompt, answer: str) -> Document:
        messages = prompt_messages(prompt, system_prompt)
        if THINK_END in answer and not keeps_reasoning:
            # The template drops reasoning, so use a plain prompt: what the template renders before the answer.
            text = render_chat_prompt(tokenizer, messages, prompt.path).removeprefix(tokenizer.bos_token or "")
            if text.rstrip().endswith(THINK_START):
                text = text.rpartition(THINK_START)[0]
            return Document(prompt.path, text + answer, prompt=text)
        return conversation_document(prompt.path, [*messages, {"role": "assistant", "content": answer}])

    if not (by_chat and tokenizer.chat_template):
        return plain
    thinks = {"role": "assistant", "content": f"{THINK_START}\nsome reasoning\n{THINK_END}\n\nan answer"}
    probe = tokenizer.apply_chat_template([{"role": "user", "content": "a question"}, thinks], tokenize=False)
    keeps_reasoning = "some reasoning" in str(probe)
    return chat
