"""Blocks of 4 or 8 bits in the layout of MatMulNBits, and the grid of levels that fits a block best.

A value of a block is scale * (code - zero), or scale * code + minimum. onnxruntime's fast products know integer zero
points only, so the graph of a weight with minima multiplies scale * (code - 8) and adds the product of the block sums
of its input with minimum + 8 scale: exact, for a sixth to a third of a token's time on SmolLM2-135M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SHRINKS = (0.75, 0.82, 0.88, 0.94, 1.0)  # of the range that the levels span: clipping few values makes the steps finer


@dataclass(frozen=True)
class BlockFormat:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8.
        block_size: inputs that share a scale.
        symmetric: no zero points.
        accuracy_level: of MatMulNBits; 0 computes in float32, 4 rounds activations to int8.
    """

    bits: int
    block_size: int
    symmetric: bool = False
    accuracy_level: int = 4

    def to_manifest(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return {
            "bits": self.bits,
            "block_size": self.block_size,
            "symmetric": self.symmetric,
            "accuracy_level": self.accuracy_level,
        }


@dataclass(frozen=True)
class WeightNode:
    """A node that reads a weight: a product with a constant, or a lookup in a table of tokens.

    Attributes:
        output_name: the node's output.
        weight: name of the initializer.
        outputs_first: the weight is (out, in), not (in, out): it is a table of tokens.
        group: part of the model that gets one format, such as "layers.3.mlp".
        input_name: the tensor that is multiplied; "" for a lookup.
    """

    output_name: str
    weight: str
    outputs_first: bool
    inputs: int
    outputs: int
    group: str
    input_name: str = ""


@dataclass(frozen=True)
class Grid:
    """The levels of blocks of one weight of K inputs and N outputs, B blocks along K.

    Attributes:
        bits: 4 or 8.
        block_size: inputs in a block.
        scales: (B, N) float32.
        zeros: (B, N) float32, integers: the code of 0. With minima all are 8, and only the product uses them.
        minima: (B, N) float32, the value of code 0; None if the zero points say it.
    """

    bits: int
    block_size: int
    scales: np.ndarray
    zeros: np.ndarray
    minima: np.ndarray | None = None

    def values(self, codes: np.ndarray) -> np.ndarray:
        """(K, N) uint8 codes -> (K, N) float32 values."""
        rows = np.arange(len(codes)) // self.block_size
        if self.minima is None:
            return ((codes - self.zeros[rows]) * self.scales[rows]).astype(np.float32)
        return (codes * self.scales[rows] + self.minima[rows]).astype(np.float32)


class Packed(NamedTuple):
    """A weight of K inputs and N outputs as MatMulNBits reads it.

    Attributes:
        codes: (N, B, bytes of a block) uint8.
        scales: (N, B) float32.
        zeros: (N, bytes) uint8 zero points; None for those in the middle.
        minima: (N, B) float32, as those of `Grid`.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    minima: np.ndarray | None = None


def pack(codes: np.ndarray, grid: Grid) -> Packed:
    """Pack (K, N) uint8 codes."""
    blocks, outputs = grid.scales.shape
    padded = np.zeros((blocks * grid.block_size, outputs), np.uint8)
    padded[: len(codes)] = codes
    middle = (grid.zeros == 2 ** (grid.bits - 1)).all()
    zeros = None if middle else _to_bytes(grid.zeros.T.astype(np.uint8), grid.bits)
    stored = _to_bytes(padded.T, grid.bits).reshape(outputs, blocks, -1)
    minima = None if grid.minima is None else np.ascontiguousarray(grid.minima.T)
    return Packed(stored, np.ascontiguousarray(grid.scales.T, np.float32), zeros, minima)


def _to_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(N, count) codes of `bits` bits -> (N, bytes) uint8; in 4 bits the first of two codes is the low half."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4)


def fit_block(values: np.ndarray, importance: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the integer zero point of one block of each output with the least weighted squared error.

    As llama.cpp's k-quants: tries some ranges, rounds, and takes for each the scale that least squares give.

    Args:
        values: (block size, N) float32.
        importance: (block size,) float32, positive: the weight of the error of each input.

    Returns (N,) float32 scales, exact in float16, and (N,) float32 zero points.
    """
    levels = 2**bits - 1
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    whole = np.maximum((high - low) / levels, 2.0**-20)  # smaller steps have few digits in float16
    weighted = importance[:, None] * values
    best = scale = zero = None
    for shrink in SHRINKS:
        step = whole * shrink
        center = levels / 2 - (high + low) / (2 * step)
        for candidate in (np.floor(center), np.floor(center) + 1):
            offset = np.clip(candidate, 0, levels)
            codes = np.clip(np.rint(values / step + offset), 0, levels) - offset
            gain = (weighted * codes).sum(axis=0)
            fitted = np.where(
                gain > 0, gain / np.maximum((importance[:, None] * codes * codes).sum(axis=0), 1e-30), step
            )
            error = -gain * fitted  # without the part that no choice changes
            if best is None:
                best, scale, zero = error, fitted, offset
            else:
                better = error < best
                best, scale, zero = (
                    np.where(better, new, old) for new, old in ((error, best), (fitted, scale), (offset, zero))
                )
    assert scale is not None
    assert zero is not None
    return np.maximum(scale, 2.0**-20).astype(np.float16).astype(np.float32), zero.astype(np.float32)
