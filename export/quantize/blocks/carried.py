"""Finds the blocks of weights that were quantized before, in a GGUF file or by another tool, from their values.

A block of 32 values of Q4_0, Q4_1 or Q4_K lies on 16 equally spaced levels, one of Q8_0 on 255 around 0; float weights
never do. So the blocks need no record: any checkpoint that was dequantized keeps them, whoever made it, and rows may
have been permuted or stacked since.
"""

from __future__ import annotations

import numpy as np

from limbeck.export.quantize.blocks.formats import Grid

BLOCK = 32
TOLERANCE = 1e-3  # of a step: float32 rounds the values by about 1e-6 steps
SAMPLE = 64  # outputs of the first look, which most float weights do not pass


def find_grid(weight: np.ndarray, bits: int) -> tuple[np.ndarray, Grid] | None:
    """The codes (K, N) uint8 and the grid of a weight (K, N) float32 whose blocks all lie on 2**bits levels, or None.

    With 8 bits only levels around 0 are looked for.
    """
    inputs, outputs = weight.shape
    if inputs % BLOCK:
        return None
    find = _find_16_levels if bits == 4 else _find_255_levels
    blocks = weight.reshape(inputs // BLOCK, BLOCK, outputs)
    if find(blocks[:, :, : min(SAMPLE, outputs)]) is None:
        return None
    found = find(blocks)
    if found is None:
        return None
    codes, scales, zeros, minima = found
    return codes.reshape(inputs, outputs).astype(np.uint8), Grid(bits, BLOCK, scales, zeros, minima)


Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, zeros, minima


def _find_255_levels(blocks: np.ndarray) -> Found | None:
    """Levels of Q8_0: multiples of 1/127 (or 1/128) of the largest value."""
    largest = np.abs(blocks).max(axis=1)
    for levels in (127, 128):
        scales = _nearest_float16(np.where(largest > 0, largest / np.float64(levels), 1))
        multiples = blocks / scales[:, None]
        codes = np.rint(multiples)
        if np.abs(multiples - codes).max() < TOLERANCE and codes.max() <= 127:
            return codes + 128, scales, np.full(scales.shape, 128, np.float32), None
    return None


def _find_16_levels(blocks: np.ndarray) -> Found | None:
    """Levels with an integer zero point if all blocks have one, else with a minimum."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    shape = low.shape
    step, with_zero = np.zeros(shape, np.float64), np.zeros(shape, bool)
    for span in range(15, 0, -1):  # the codes of the largest and the smallest value differ by `span`
        candidate = np.where(high > low, (high - low.astype(np.float64)) / span, 1)
        multiples = (blocks - low[:, None].astype(np.float64)) / candidate[:, None]
        fits = np.abs(multiples - np.rint(multiples)).max(axis=1) < TOLERANCE
        offset = -low / candidate
        integer = fits & (np.abs(offset - np.rint(offset)) < TOLERANCE) & (offset < 15.5) & (span - offset < 15.5)
        take = fits & (integer | ~with_zero)
        step, with_zero = np.where(take, candidate, step), with_zero | integer
    constant = high == low
    if not ((step > 0) | constant).all():
        return None
    if (with_zero | constant).all():
        step = np.where(constant, np.abs(low.astype(np.float64)) / 8, step)
        scales = _nearest_float16(np.where(step > 0, step, 1))
        lowest, highest = np.rint(low / scales), np.rint(high / scales)
        zeros = np.clip(8, -lowest, 15 - highest).astype(np.float32)  # as near to the middle as the codes allow
        return np.rint(blocks / scales[:, None]) + zeros[:, None], scales, zeros, None
    step = np.where(constant, 1, step)
    scales = _nearest_float16(step)
    codes = np.rint((blocks - low[:, None]) / step[:, None])
    return codes, scales, np.full(shape, 8, np.float32), low.astype(np.float32)


def _nearest_float16(steps: np.ndarray) -> np.ndarray:
    """(B, N) float64 steps -> float32, those that are a float16 but for rounding as that float16."""
    with np.errstate(over="ignore"):
        short = steps.astype(np.float16).astype(np.float64)
    return np.where(np.abs(short - steps) <= 1e-5 * steps, short, steps).astype(np.float32)
