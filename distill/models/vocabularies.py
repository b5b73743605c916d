"""Compares the vocabularies of teacher and student: real differences, and mere padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.models import loading
from limbeck.registry.checkpoints.load import load_tokenizer
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Vocabularies(NamedTuple):
    """A comparison of the tokens of a teacher and a student. In pairs the teacher comes first.

    Attributes:
        tokens: size of each tokenizer.
        embedding_rows: of each model. Rows beyond the tokenizer's ids are padding: Qwen2.5 has 151,936 or 152,064
            rows, depending on the model's size, for the same tokenizer of 151,665.
        different_tokens: tokens that only one tokenizer has, or that have different ids.
        special: descriptions of differences between special tokens, and in adding BOS before a text.
    """

    tokens: tuple[int, int]
    embedding_rows: tuple[int, int]
    different_tokens: int
    special: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether logits can be compared token by token."""
        return self.different_tokens == 0

    @property
    def padding(self) -> tuple[int, int]:
        """Embedding rows without a token, of teacher and student."""
        return self.embedding_rows[0] - self.tokens[0], self.embedding_rows[1] - self.tokens[1]

    def summary(self) -> str:
        """The comparison as one line."""
        if not self.same:
            sizes = f"{self.tokens[0]:,} and {self.tokens[1]:,} tokens"
            return f"unequal: {sizes}, {self.different_tokens:,} of them different"
        padded = ""
        if any(self.padding):
            padded = f", embeddings padded to {self.embedding_rows[0]:,} and {self.embedding_rows[1]:,}"
        return "; ".join((f"equal: {self.tokens[0]:,} tokens{padded}", *self.special))


def compare(
    teacher: PreTrainedTokenizerBase, teacher_rows: int, student: PreTrainedTokenizerBase, student_rows: int
) -> Vocabularies:
    """Compare the vocabularies of two models, given the tokenizer and the number of embedding rows of each."""
    own, other = teacher.get_vocab(), student.get_vocab()
    special = []
    for name in SPECIAL:
        pair = getattr(teacher, name), getattr(student, name)
        if pair[0] != pair[1]:
            special.append(f"{name}: {_format_token(pair[0])} and {_format_token(pair[1])}")
    adds = _adds_bos(teacher), _adds_bos(student)
    if adds[0] != adds[1]:
        special.append(f"only the {'teacher' if adds[0] else 'student'}'s tokenizer adds BOS before a text")
    return Vocabularies(
        (loading.vocabulary_size(teacher), loading.vocabulary_size(student)),
        (teacher_rows, student_rows),
        sum(own.get(token) != other.get(token) for token in own | other),
        tuple(special),
    )


def _format_token(token: str | None) -> str:
    return "none" if token is None else repr(str(token))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def check_same_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BadInput if the model in `folder` has other tokens than the recipe's `tokenizer`."""
    own, shared = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
    if own != shared:
        raise BadInput(
            f"{folder} has a tokenizer of {len(own)} tokens, {len(own.items() - shared.items())} of them different "
            f"from the {len(shared)} of the recipe's tokenizer",
            fix="the students of a run share one tokenizer: give this student its own run. To learn from a teacher "
            'with other tokens, set teacher.retokenize = true, or divergence = "chunks"; or learn from its text alone: '
            "[generate] and labels = 1.0",
        )
