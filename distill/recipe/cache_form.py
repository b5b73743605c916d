"""The forms a teacher cache can take, and which of them serves an objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from limbeck.distill.recipe.schema import Cache, Objective


Kind = Literal["sampled", "topk"]


class Form(NamedTuple):
    """What is stored at each position, of the distribution at one temperature.

    Attributes:
        size: tokens a position: all alike (`topk`), or on average (`sampled`).
        vocab_size: decides the bits of an id.
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
        """Bytes of a sampled token: its id, and its weight in the bits that are left."""
        return 3 if self.id_bits <= 18 else 4

    @property
    def levels(self) -> int:
        """Different weights of a sampled token."""
        return 2 ** (8 * self.entry_bytes - self.id_bits)


def reason_form_unfit(kind: str, objective: Objective, endpoint: bool = False) -> str | None:
    """Why a form cannot serve an objective, and what to do; None where it can.

    Args:
        kind: `sampled`, `topk` or `online`.
        endpoint: whether the teacher is one; it tells its likeliest tokens and no more.
    """
    if objective.divergence == "chunks" and objective.layers is None:
        return None  # keeps a form of its own
    if endpoint and objective.layers is not None:
        return "layers needs the teacher's hidden states and an endpoint does not tell them: leave layers out"
    if endpoint and objective.uses_teacher:
        if kind != "topk":
            return 'an endpoint tells its likeliest tokens alone: set cache.form = "topk"'
        if objective.temperature != 1.0:
            return (
                f"temperature {objective.temperature:g} needs every logit and an endpoint tells its likeliest tokens "
                f"alone: set temperature = 1.0"
            )
    if kind == "online":
        return None
    if objective.layers is not None:
        return (
            "layers needs the teacher's hidden states and the cache keeps what it said of the next token: "
            'set cache.form = "online" to run the teacher each time'
        )
    if kind == "sampled" and objective.divergence not in (None, "forward_kl"):
        return (
            f"the sampled form gives each probability right on average, and {objective.divergence} of an average is "
            f'not the average of {objective.divergence}: set cache.form = "topk", or leave it out'
        )
    return None


def reason_no_form_fits(cache: Cache, objective: Objective, endpoint: bool = False) -> str | None:
    """Why no form that a recipe allows can serve an objective; None where one can."""
    kinds = _kinds(cache, endpoint)
    whys = [reason_form_unfit(kind, objective, endpoint) for kind in kinds]
    return whys[-1] if all(whys) else None


def choose_form(cache: Cache, objective: Objective, vocab_size: int, endpoint: bool = False) -> Form | None:
    """The form that serves an objective: `cache.form`, or the smallest that can; None for a teacher that runs online.

    Raises ValueError where none can.
    """
    kind = next(
        (kind for kind in _kinds(cache, endpoint) if reason_form_unfit(kind, objective, endpoint) is None), None
    )
    if kind is None:
        raise ValueError(reason_no_form_fits(cache, objective, endpoint))
    if kind == "sampled":
        return Form("sampled", cache.samples, vocab_size, objective.temperature)
    if kind == "topk":
        return Form("topk", min(cache.top_k, vocab_size), vocab_size, objective.temperature)
    return None


def _kinds(cache: Cache, endpoint: bool) -> tuple[str, ...]:
    """The forms that a recipe allows, the smallest first."""
    if cache.form:
        return (cache.form,)
    return ("topk",) if endpoint else ("sampled", "topk", "online")
