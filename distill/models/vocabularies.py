"""Whether teacher and student speak of the same tokens: what differs, and what only looks as if it did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.models import loading
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Vocabularies(NamedTuple):
    """How the tokens of a teacher and of a student compare; of pairs the teacher's comes first.

    Attributes:
        tokens: entries of each tokenizer.
        rows: of each model's embeddings. What is beyond the tokenizer's ids is padding, which no text has: Qwen2.5
            has 151,936 or 152,064 rows, by size, for one tokenizer of 151,665.
        unlike: tokens that only one of them has, or that have another id in each.
        special: in words, special tokens that they do not share and whether BOS comes before a text.
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
        """Rows that stand for no token."""
        return self.embedding_rows[0] - self.tokens[0], self.embedding_rows[1] - self.tokens[1]

    def summary(self) -> str:
        """The comparison in a line."""
        if not self.same:
            return (
                f"unequal: {self.tokens[0]:,} and {self.tokens[1]:,} tokens, {self.different_tokens:,} of them unlike"
            )
        padded = (
            f", embeddings padded to {self.embedding_rows[0]:,} and {self.embedding_rows[1]:,}"
            if any(self.padding)
            else ""
        )
        return "; ".join((f"equal: {self.tokens[0]:,} tokens{padded}", *self.special))


def compare(
    teacher: PreTrainedTokenizerBase, teacher_rows: int, student: PreTrainedTokenizerBase, student_rows: int
) -> Vocabularies:
    """The vocabularies of two models, given the tokenizer and the rows of the embeddings of each."""
    own, other = teacher.get_vocab(), student.get_vocab()
    special = []
    for name in SPECIAL:
        pair = getattr(teacher, name), getattr(student, name)
        if pair[0] != pair[1]:
            special.append(f"{name}: {_format_token(pair[0])} and {_format_token(pair[1])}")
    adds = _adds_bos(teacher), _adds_bos(student)
    if adds[0] != adds[1]:
        special.append(f"only the {'teacher' if adds[0] else 'student'}'s tokenizer puts BOS before a text")
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
    """Raises BadInput where the model in `folder` has other tokens than `tokenizer`, the recipe's."""
    own, shared = loading.load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
    if own != shared:
        raise BadInput(
            f"{folder} has a tokenizer of {len(own)} tokens, {len(own.items() - shared.items())} of them unlike "
            f"the {len(shared)} of the recipe's tokenizer",
            fix="the students of a run share one: give this one a run of its own. To learn from a teacher with other "
            'tokens, set teacher.retokenize = true, or divergence = "chunks"; or learn from its text alone: [generate] '
            "and labels = 1.0",
        )
