"""Prompts with completions and conversations: exactly the answers are learnt, and unusable ones are errors."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.distill.data import corpus
from limbeck.distill.data.chat import encode_document
from limbeck.distill.data.document import Document, conversation_document
from limbeck.distill.recipe import load
from limbeck.distill.recipe.load import Source
from limbeck.distill.run.prepare import prepare_setting
from limbeck.registry.core import jsonl
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.distill.conftest import TWINS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: the last answer gets an empty reasoning block, earlier answers lose theirs.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content.split('</think>')[-1] %}"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% set c = m.content %}"
    "{% elif loop.last %}{% set c = m.content %}{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "add 1 and 2"},
    {"role": "assistant", "content": "return 3"},
    {"role": "user", "content": "return 3 again"},
    {"role": "assistant", "content": "  3, caf\u00e9 "},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(tokenizer_folder)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def text_and_answers(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """A document's text as a model reads it, and the parts of it that are learnt."""
    end = tokenizer.eos_token_id
    piece = encode_document(document, tokenizer, end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end)
    edges = np.flatnonzero(np.diff(piece.targets)) + 1
    runs = zip(np.split(piece.ids, edges), np.split(piece.targets, edges), strict=True)
    return tokenizer.decode(piece.ids), [tokenizer.decode(ids) for ids, learnt in runs if learnt[0]]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_answers_of_a_conversation_are_learnt(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    text, learnt = text_and_answers(conversation_document("a", TALK), tokenizer)
    assert learnt == ["return 3<|im_end|>", "  3, caf\u00e9 <|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == whole[: whole.index("caf\u00e9 <|im_end|>") + len("caf\u00e9 <|im_end|>")]
    piece = encode_document(conversation_document("a", TALK), tokenizer, 0, 0)
    assert piece.text_bytes == len("return 3") + len("  3, caf\u00e9 ".encode())
    assert piece.ids.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"][: len(piece.ids)]


def test_the_tokens_before_the_answer_are_those_of_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    piece = encode_document(conversation_document("a", TALK[:3]), tokenizer, 0, 0)
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]
    assert piece.ids[~piece.targets].tolist() == prompt
    assert piece.targets.tolist() == [False] * len(prompt) + [True] * (len(piece.ids) - len(prompt))


def test_templates_that_add_or_drop_reasoning(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKS
    _, learnt = text_and_answers(conversation_document("a", TALK[:5]), tokenizer)
    assert learnt == ["return 3<|im_end|>", "<think>\n\n</think>\n\n  3, caf\u00e9 <|im_end|>"]
    thought = [*TALK[:2], {"role": "assistant", "content": "<think>1 + 2</think>3"}]
    _, learnt = text_and_answers(conversation_document("a", thought), tokenizer)
    assert learnt == ["<think>1 + 2</think>3<|im_end|>"]
    with pytest.raises(BadInput, match=r"q:7: the chat template drops part of message 3: '<think>1 \+ 2"):
        text_and_answers(conversation_document("q:7", [*thought, *TALK[3:5]]), tokenizer)


@pytest.mark.parametrize(
    ("template", "content", "learnt"),
    [
        # Like DeepSeek-R1's: the generation prompt opens a reasoning block, which a given answer does not have.
        (CHATML.replace("{% endif %}", "<think>\n{% endif %}"), "3", "3<|im_end|>"),
        # The part of an answer that the generation prompt already has is not learnt.
        (CHATML.replace("{% endif %}", "<think>\n{% endif %}"), "<think>\n1+2</think>3", "1+2</think>3<|im_end|>"),
        # Like Qwen3.5's: an empty reasoning block before each given answer.
        (
            CHATML.replace("{% endif %}", "<think>\n{% endif %}").replace(
                "{{ m.content }}", "<think>\n\n</think>{{ m.content }}"
            ),
            "3",
            "\n</think>3<|im_end|>",
        ),
        # Like GLM's: blanks change.
        (
            CHATML.replace("m.content", "m.content.replace('\n', '')"),
            "<think>\n1 + 2\n</think>\n\n3",
            "<think>1 + 2</think>3<|im_end|>",
        ),
        # Like Cohere's: two tokens end a message. Like Phi-3's: EOS follows if no answer is requested.
        (CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>"), "3", "3<|im_end|><|endoftext|>"),
        (CHATML.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}"), "3", "3<|im_end|>\n<|endoftext|>"),
    ],
)
def test_templates_like_those_of_well_known_models(
    tokenizer: PreTrainedTokenizerBase, template: str, content: str, learnt: str
) -> None:
    tokenizer.chat_template = template
    talk = [TALK[1], {"role": "assistant", "content": content}]
    assert text_and_answers(conversation_document("a", talk), tokenizer)[1] == [learnt]


def test_adjacent_marks_are_merged_and_end_with_their_token(tokenizer: PreTrainedTokenizerBase) -> None:
    marked = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>\n{% endgeneration %}"
    tokenizer.chat_template = MARKED.replace("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", marked)
    _, learnt = text_and_answers(conversation_document("a", TALK), tokenizer)
    assert learnt == ["return 3<|im_end|>", "  3, caf\u00e9 <|im_end|>"]


def test_an_answer_without_an_end_token_gets_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    _, learnt = text_and_answers(conversation_document("a", TALK[:3]), tokenizer)
    assert learnt == ["return 3<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "q:7: a conversation needs a chat template and the tokenizer has none"),
        (CHATML, TALK[:2], "q:7: there is no answer to learn"),
        (CHATML + "{{ raise_exception('no system') }}", TALK, "q:7: the chat template refuses the messages: no system"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:4] }}"), TALK, "q:7: .* drops part of message 3"),
        ("{{ messages | length }} turns\n" + CHATML, TALK, "q:7: .* what comes before message 3 differently"),
        (MARKED.replace("m.role == 'assistant'", "loop.last"), TALK[:5], "q:7: .* drops part of message 3"),
    ],
)
def test_unusable_conversations_are_errors(
    tokenizer: PreTrainedTokenizerBase, template: str | None, messages: list[dict[str, str]], message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=message):
        text_and_answers(conversation_document("q:7", messages), tokenizer)


def test_a_prompt_and_its_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    text, learnt = text_and_answers(Document("a", "add: return a", prompt="add:"), tokenizer)
    assert text == "<|endoftext|>add: return a<|endoftext|>"
    assert learnt == [" return a<|endoftext|>"]
    # A rendered chat already has its start and end tokens.
    rendered = "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
    text, learnt = text_and_answers(Document("a", rendered + "3<|im_end|>", prompt=rendered), tokenizer)
    assert (text, learnt) == (rendered + "3<|im_end|>", ["3<|im_end|>"])
    # BOS, if there is one, comes first and only once.
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    for prompt in (rendered, "<s>" + rendered):
        assert (
            text_and_answers(Document("a", prompt + "3", prompt=prompt), tokenizer)[0] == f"<s>{rendered}3<|endoftext|>"
        )


def test_the_prompt_has_the_tokens_that_it_has_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Even if a token of the whole text would cross the edge, or begins with a blank."""
    across = 0
    text = "def add(a, b):\n    return a + b\n"
    for edge in range(1, len(text) - 1):
        piece = encode_document(Document("a", text, prompt=text[:edge]), tokenizer, 0, 0)
        prompt, answer = (tokenizer(part)["input_ids"] for part in (text[:edge], text[edge:]))
        assert piece.ids[~piece.targets].tolist() == [0, *prompt]
        assert piece.ids[piece.targets].tolist() == [*answer, 0]
        across += tokenizer(text)["input_ids"] != prompt + answer
    assert across > 5


def test_offsets_without_blanks_are_handled(tokenizer: PreTrainedTokenizerBase) -> None:
    """Many tokenizers leave the blanks around a token out of its offsets."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    test_the_prompt_has_the_tokens_that_it_has_alone(tokenizer)


def test_a_tokenizer_that_adds_a_blank_before_each_text() -> None:
    """Like Llama 2's. The completion alone would get a blank too, which a model never generates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(["the still drops spirit"], trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    piece = encode_document(Document("a", "the still drops", prompt="the still"), tokenizer, 0, 0)
    assert piece.ids.tolist() == [0, *tokenizer("the still drops")["input_ids"], 0]
    assert tokenizer.convert_ids_to_tokens(piece.ids[piece.targets])[0].startswith("\u2581d")


@pytest.fixture
def table(limbeck_home: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object) -> Path:
        path = tmp_path / "qa.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_recipe_over_conversations(
    table: Callable[..., Path],
    store: Store,
    limbeck: Callable[..., Result],
    write_recipe: Callable[..., Path],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """From rows to registered students, which record what the teacher's licence allows."""
    chance = random.Random(0)
    turns = [[*TALK[:2], {"role": "assistant", "content": f"return {chance.randint(0, 9)}"}] for _ in range(60)]
    table(*({"chat": turn} for turn in turns), {"chat": [TALK[1], {"role": "assistant", "content": "long " * 90}]})
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(teacher)
    settings = [
        "data.path=qa.jsonl", "data.messages_column=chat", "data.max_length=64", "teacher.licence=llama2",
    ]  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    done = limbeck("distill", write_recipe("teacher", objectives=TWINS), *options, "--yes", "--format", "json")
    assert done.code == 0, done.err
    assert "1 documents are longer than 64 tokens and are left out" in done.err
    distilled, twin = (store.get(f"tiny/{number}") for number in (2, 3))
    assert (distilled.licence_allows_distillation, twin.licence_allows_distillation) == (False, True)
    train = jsonl.find_training_text(str(distilled.data_digest))
    assert train is not None
    assert next(corpus.read_corpus(train)).messages[2]["content"].startswith("return")
    saved = AutoTokenizer.from_pretrained(store.artifacts.verified_folder(distilled))
    assert saved.apply_chat_template(TALK[:2], tokenize=False) == "system: be brief\nuser: add 1 and 2\n"


def test_students_that_cannot_separate_documents_get_one_per_block(
    store: Store, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for student, segments in (("llama", 2), ("bloom", 1)):
        path = write_recipe(student=student)
        setting = prepare_setting(load.load_recipe(path, ["data.max_length=256"]), Source(path), store)
        assert setting.train.segments.max() >= segments
        assert (setting.train.segments.max() == 1) == (segments == 1)
    assert "small: cannot keep the documents of a block apart" in capsys.readouterr().err
