"""The forms of a teacher cache (`sampled`, `topk`), and which of them fits an objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from limbeck.distill.recipe.schema import Cache, Objective


Kind = Literal["sampled", "topk"]


class Form(NamedTuple):
    """What a cache stores of the teacher's distribution at each position.

    Attributes:
        size: tokens per position: exact for `topk`, the mean for `sampled`.
        vocab_size: decides how many bits an id takes.
        temperature: of the distribution that is stored.
    """

    kind: Kind
    size: int
    vocab_size: int
    temperature: float = 1.0

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def entry_bytes(self) -> int:
        """Bytes of a sampled token: its id, and its weight in the remaining bits."""
        return 3 if self.id_bits <= 18 else 4

    @property
    def levels(self) -> int:
        """Number of different weights a sampled token can have."""
        return 2 ** (8 * self.entry_bytes - self.id_bits)


def reason_form_unfit(kind: str, objective: Objective, endpoint: bool = False) -> str | None:
    """Why a form does not fit an objective, and what to do; None if it fits.

    Args:
        kind: `sampled`, `topk` or `online`.
        endpoint: whether the teacher is an endpoint, which returns only its most likely tokens.
    """
    if objective.divergence == "chunks" and objective.layers is None:
        return None  # has a cache format of its own
    if endpoint and objective.layers is not None:
        return "layers needs the teacher's hidden states, and an endpoint does not return them: leave layers out"
    if endpoint and objective.uses_teacher:
        if kind != "topk":
            return 'an endpoint returns only its most likely tokens: set cache.form = "topk"'
        if objective.temperature != 1.0:
            return (
                f"temperature {objective.temperature:g} needs every logit, and an endpoint returns only its most "
                f"likely tokens: set temperature = 1.0"
            )
    if kind == "online":
        return None
    if objective.layers is not None:
        return (
            "layers needs the teacher's hidden states, and a cache stores only next-token distributions: "
            'set cache.form = "online" to run the teacher each time'
        )
    if kind == "sampled" and objective.divergence not in (None, "forward_kl"):
        return (
            f"the sampled form is an unbiased estimate of each probability, and {objective.divergence} of an "
            f'average is not the average of {objective.divergence}: set cache.form = "topk", or leave it out'
        )
    return None


def reason_no_form_fits(cache: Cache, objective: Objective, endpoint: bool = False) -> str | None:
    """Why none of the forms that a recipe allows fits an objective; None if one fits."""
    reasons = [reason_form_unfit(kind, objective, endpoint) for kind in _allowed_kinds(cache, endpoint)]
    return reasons[-1] if all(reasons) else None


def choose_form(cache: Cache, objective: Objective, vocab_size: int, endpoint: bool = False) -> Form | None:
    """The form for an objective: `cache.form`, or the smallest one that fits; None for a teacher that runs online.

    Raises ValueError if no form fits.
    """
    kinds = [k for k in _allowed_kinds(cache, endpoint) if reason_form_unfit(k, objective, endpoint) is None]
    if not kinds:
        raise ValueError(reason_no_form_fits(cache, objective, endpoint))
    kind = kinds[0]
    if kind == "sampled":
        return Form("sampled", cache.samples, vocab_size, objective.temperature)
    if kind == "topk":
        return Form("topk", min(cache.top_k, vocab_size), vocab_size, objective.temperature)
    return None


def _allowed_kinds(cache: Cache, endpoint: bool) -> tuple[str, ...]:
    """The kinds of form that a recipe allows, smallest first."""
    if cache.form:
        return (cache.form,)
    return ("topk",) if endpoint else ("sampled", "topk", "online")
