"""How far a variant is from PyTorch, with confidence intervals over documents, and the limits it has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from limbeck.registry.records import Estimate, Parity

RESAMPLES = 1000
CONFIDENCE = 0.95
# Figure of `Parity.quality` -> how it is named and written.
FIGURES = {
    "bits_per_byte_change": ("bits per byte", "+.2%"),
    "mean_kl": ("mean KL, nats a token", ".3g"),
    "p99_kl": ("99th percentile of KL", ".3g"),
    "top1_agreement": ("top-1 agreement", ".1%"),
}
AT_LEAST = {"top1_agreement"}  # the others are limited from above


@dataclass
class Document:
    """One document in PyTorch and in the variant.

    Attributes:
        kl: (T,) float64, KL(PyTorch || variant) after each token, nats.
        top1_matches: tokens after which both find the same token likeliest.
        nats_reference, nats: of the predicted tokens, by PyTorch and by the variant.
    """

    kl: np.ndarray = field(repr=False)
    top1_matches: int
    nats_reference: float
    nats: float


def estimate_quality(documents: Sequence[Document]) -> dict[str, Estimate]:
    """Estimate the figures of FIGURES, each with its 95% interval; the interval of one document is its value.

    Documents are independent, tokens of one are not, so whole documents are resampled. Few documents make percentiles
    of the bootstrap too narrow, so further ones are taken, as Student's t asks for (the expanded percentile interval:
    Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 3.3).
    """
    from scipy.special import ndtr, stdtrit

    count = len(documents)
    values = _figures(documents)
    tail = 0.0
    if count > 1:
        tail = float(ndtr(-stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.sqrt(count / (count - 1))))
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    resampled = np.array([list(_figures([documents[index] for index in draw]).values()) for draw in draws])
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return {
        name: Estimate(value=value, low=float(low[place]), high=float(high[place]), confidence=CONFIDENCE)
        for place, (name, value) in enumerate(values.items())
    }


def _figures(documents: Sequence[Document]) -> dict[str, float]:
    kl = np.concatenate([document.kl for document in documents])
    nats = sum(document.nats for document in documents)
    return {
        "bits_per_byte_change": nats / sum(document.nats_reference for document in documents) - 1,
        "mean_kl": float(kl.mean()),
        "p99_kl": float(np.quantile(kl, 0.99)),
        "top1_agreement": sum(document.top1_matches for document in documents) / len(kl),
    }


def exceeded_figures(parity: Parity) -> list[str]:
    """List the figures that are not within `Parity.limits` with confidence: the bad end of the interval decides."""
    return [
        name
        for name, limit in parity.limits.items()
        if (
            not parity.quality[name].low >= limit if name in AT_LEAST else not parity.quality[name].high <= limit
        )  # so written, NaN exceeds every limit
    ]


def describe_figure(parity: Parity, name: str, limit: float | None) -> str:
    """Return a figure with its interval, and its limit unless that is None, in words."""
    title, form = FIGURES[name]
    estimate = parity.quality[name]
    text = f"{title} {estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
    if limit is None:
        return text
    return f"{text} ({'at least' if name in AT_LEAST else 'at most'} {limit:{form}})"
