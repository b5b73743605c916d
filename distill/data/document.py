"""A document: one text, a prompt with its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Document(NamedTuple):
    """One text and the name that identifies it; the split and the statistics group by `path`.

    Attributes:
        text: the whole text: prompt and completion, or every message of a conversation.
        prompt: the start of `text` that the student reads but does not learn; "" if it learns everything.
        messages: the messages of a conversation, {"role", "content"} each; the student learns the assistant's.
    """

    path: str
    text: str
    prompt: str = ""
    messages: Sequence[dict[str, str]] = ()

    @property
    def completion(self) -> str:
        """The text after the prompt."""
        return self.text[len(self.prompt) :]


def conversation_document(path: str, messages: Sequence[dict[str, str]]) -> Document:
    """A conversation as a document."""
    return Document(path, "\n".join(message["content"] for message in messages), messages=messages)
