"""How a teacher's distributions are encoded as arrays, in the forms `topk` and `sampled`.

`topk` stores the most likely tokens with their log-probabilities; the mass of the rest follows from them. It is cheap
to read but biased: it loses the tail of the distribution, and a student that learns only from it is over-confident.

`sampled` is an unbiased sparse estimate, a variant of Sparse Logit Sampling (Anshumann et al., arXiv 2503.16870).
The paper draws tokens with replacement and counts them. Here a token of probability p is stored with probability
min(1, p / t), with weight max(p, t). The mean is the same, and tokens with p above t have no noise. Each block has its
own threshold t, chosen so that it stores `samples` tokens per position on average: more if the teacher is uncertain,
one or two if it is confident. The draws are systematic (Madow, 1949): the number of tokens at a position is within one
of its expected value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.recipe.cache_form import Form

if TYPE_CHECKING:
    import torch


# A position stores at most this many times `samples` tokens.
MAX_SIZE_FACTOR = 8


# --- arrays of blocks and shards


def topk_arrays(form: Form, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
    """The stored arrays of the most likely tokens and their log-probabilities, (..., k) each."""
    id_type = np.uint16 if form.vocab_size <= 2**16 else np.uint32
    return {"ids": ids.astype(id_type), "logprobs": logprobs.astype(np.float16)}


def block_arrays(
    form: Form, logits: torch.Tensor, target_mask: np.ndarray, seed: Sequence[int]
) -> dict[str, np.ndarray]:
    """The stored arrays of one block.

    Args:
        logits: (T, vocab_size) float.
        target_mask: (T,) bool: the positions whose next token is a target; `sampled` stores nothing for the others.
        seed: for the random draws.
    """
    logits = logits.float() if form.temperature == 1.0 else logits.float() / form.temperature
    if form.kind == "topk":
        values, ids = logits.topk(form.size, dim=-1)
        values = values - logits.logsumexp(-1, keepdim=True)
        return topk_arrays(form, ids.cpu().numpy(), values.cpu().numpy())
    return _sampled_arrays(form, logits, target_mask, np.random.default_rng(seed))


def shard_arrays(blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of several blocks: `entries` concatenated, all others stacked along a new first axis."""
    return {
        name: np.concatenate([block[name] for block in blocks])
        if name == "entries"
        else np.stack([block[name] for block in blocks])
        for name in blocks[0]
    }


def batch(form: Form | None, blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stored blocks as a batch, with the field names of `divergences.TopK` or `divergences.Samples`.

    Args:
        form: None for arrays (T, ...) with other names, which are only stacked.

    Returns:
        Integers as int64, floats as float32.
    """
    import torch

    arrays = _samples(form, blocks) if form is not None and form.kind == "sampled" else shard_arrays(blocks)
    wide = {"f": np.float32, "u": np.int64, "i": np.int64}
    return {name: torch.from_numpy(np.asarray(a, wide.get(a.dtype.kind, a.dtype))) for name, a in arrays.items()}


# --- the sampled form


def _sampled_arrays(
    form: Form, logits: torch.Tensor, target_mask: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    import torch

    targets = np.flatnonzero(target_mask)
    entropy, sizes = np.zeros(len(target_mask), np.float16), np.zeros(len(target_mask), _size_type(form))
    entries, threshold = np.zeros((0, form.entry_bytes), np.uint8), 1.0
    if len(targets):
        logprobs = logits[torch.from_numpy(targets).to(logits.device)].log_softmax(-1)
        probs = logprobs.exp()
        entropy[targets] = -torch.einsum("tv,tv->t", probs, logprobs).cpu().numpy()
        positions, ids, weights, threshold = _draw(form, probs, rng)
        sizes[targets] = np.bincount(positions, minlength=len(targets))
        words = ids.astype(np.uint32) | _codes(weights, threshold, form.levels, rng) << np.uint32(form.id_bits)
        entries = words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : form.entry_bytes]
    return {"entries": entries, "sizes": sizes, "threshold": np.asarray(threshold, np.float32), "entropy": entropy}


def _size_type(form: Form) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if MAX_SIZE_FACTOR * form.size + 1 < 2**8 else np.uint32


def _draw(
    form: Form, probs: torch.Tensor, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Draw `form.size` tokens per position on average from probs (T, vocab_size). Overwrites `probs`.

    Returns:
        Of the E drawn tokens, ordered by position: positions (E,), ids (E,) and weights (E,), a weight being the
        probability or, if larger, the threshold; and the threshold.
    """

    floor = 1 / (MAX_SIZE_FACTOR * form.size)
    likely = (probs >= floor).nonzero()
    values = probs[likely[:, 0], likely[:, 1]]
    total = float(probs.sum(-1).double().sum())
    t = max(floor, _threshold(values.double().cpu().numpy(), total, len(probs) * form.size))
    certain = values >= t
    likely, values = likely[certain], values[certain]
    probs[likely[:, 0], likely[:, 1]] = 0.0
    rows, drawn = _draw_systematically(probs, t, rng)
    positions = np.concatenate([likely[:, 0].cpu().numpy(), rows])
    order = np.argsort(positions, kind="stable")
    ids = np.concatenate([likely[:, 1].cpu().numpy(), drawn])
    weights = np.concatenate([values.double().cpu().numpy(), np.full(len(rows), t)])
    return positions[order], ids[order], weights[order], t


def _draw_systematically(probs: torch.Tensor, t: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions (E,) and ids (E,) drawn from probs (T, vocab_size), each token with probability p / t.

    Lays all tokens on a line, each with length p / t, and takes the tokens at equally spaced points of distance 1.
    """
    import torch

    within = probs.cumsum(-1)
    ends = within[:, -1].double().cpu().numpy().cumsum() / t
    start = rng.random()
    points = np.arange(1, int(ends[-1] + start) + 1) - start
    rows = np.minimum(np.searchsorted(ends, points), len(ends) - 1)
    counts = np.bincount(rows, minlength=len(ends))
    # `tiny` is below every cumulative probability, so it finds the first token that has any.
    tiny = np.finfo(np.float32).tiny
    heights = np.full((len(ends), max(1, int(counts.max()))), tiny, np.float32)
    filled = np.arange(heights.shape[1]) < counts[:, None]
    heights[filled] = np.maximum((points - np.append(0.0, ends)[rows]) * t, tiny)
    limited = torch.minimum(torch.from_numpy(heights).to(probs.device), within[:, -1:])
    return rows, torch.searchsorted(within, limited).cpu().numpy()[filled]


def _threshold(likely: np.ndarray, total: float, budget: int) -> float:
    """The t for which sum(min(1, p / t)) is `budget`; 0 if it is below the smallest of `likely`.

    Args:
        likely: the largest probabilities, in any order.
        total: the sum of all probabilities.
    """
    greatest = np.sort(likely)[::-1]
    whole = np.arange(min(len(greatest), budget - 1) + 1)  # how many are stored with certainty
    rest = total - np.append(0.0, np.cumsum(greatest))[whole]
    thresholds = rest / (budget - whole)
    fits = np.append(greatest, 0.0)[whole] < thresholds
    return float(thresholds[np.argmax(fits)]) if fits.any() else 0.0


def _codes(probs: np.ndarray, t: float, levels: int, rng: np.random.Generator) -> np.ndarray:
    """Weights as levels from t to 1, evenly spaced on a logarithmic scale: (E,) -> (E,) uint32.

    Rounds to one of the two nearest levels at random, so that the mean is the exact weight.
    """
    exact = np.clip(probs, t, 1.0)
    below = np.clip(np.floor((1 - np.log(exact) / np.log(t)) * (levels - 1)), 0, levels - 2)
    low, high = (t ** (1 - (below + step) / (levels - 1)) for step in (0, 1))
    return (below + (rng.random(len(exact)) < (exact - low) / (high - low))).astype(np.uint32)


def _samples(form: Form, blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of `divergences.Samples`, padded to the position with the most tokens, and to a multiple of 8."""
    entries = np.concatenate([block["entries"] for block in blocks])
    sizes = np.stack([block["sizes"] for block in blocks]).astype(np.int64)
    words = np.zeros((len(entries), 4), dtype=np.uint8)
    words[:, : form.entry_bytes] = entries
    words = words.view("<u4")[:, 0]
    codes = (words >> form.id_bits).astype(np.float32)
    log_t = np.log([block["threshold"] for block in blocks], dtype=np.float32)
    weights = np.exp(np.repeat(log_t, sizes.sum(-1)) * (1 - codes / np.float32(form.levels - 1)))
    shape = (*sizes.shape, -(-max(1, int(sizes.max())) // 8) * 8)
    filled = np.arange(shape[-1]) < sizes[..., None]
    ids, padded = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    ids[filled] = words & (2**form.id_bits - 1)
    padded[filled] = weights
    return {"ids": ids, "weights": padded, "entropy": np.stack([block["entropy"] for block in blocks])}
