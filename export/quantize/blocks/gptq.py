"""GPTQ: round the weights of a product input by input, and let the inputs that follow make up for the error.

Frantar et al., 2022: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(arXiv:2210.17323). The grid of a block is fitted when its turn comes, with the errors of the blocks before in its
values. onnxruntime's own GPTQ has one grid per output, none per block, and keeps all activations in memory.
"""

from __future__ import annotations

import numpy as np

from limbeck.export.quantize.blocks.formats import Grid, fit_block

DAMPING = 0.1  # of the mean of the diagonal, added to it. 0.01 is usual; with few tokens of text 0.1 generalizes better
LAZY_INPUTS = 128  # inputs whose errors reach the rest of the weight in one product


def gptq(
    weight: np.ndarray, squares: np.ndarray, factor: np.ndarray, bits: int, block_size: int
) -> tuple[np.ndarray, Grid]:
    """Quantize the weight of a product so that its outputs change least on the text that the moments are from.

    Args:
        weight: (K, N) float32.
        squares: (K,) float32 mean squares of the inputs.
        factor: the result of `inverse_factor` for the inputs.

    Returns (K, N) uint8 codes and their grid.
    """
    inputs, outputs = weight.shape
    left = weight.astype(np.float32)  # a copy: what is still to be rounded
    importance = squares + DAMPING * squares.mean() + np.float32(1e-12)
    starts = range(0, inputs, block_size)
    codes = np.empty((inputs, outputs), np.uint8)
    scales, zeros = np.empty((2, len(starts), outputs), np.float32)
    for lazy in range(0, inputs, LAZY_INPUTS):
        lazy_end = min(lazy + LAZY_INPUTS, inputs)
        errors = np.empty((lazy_end - lazy, outputs), np.float32)
        for start in range(lazy, lazy_end, block_size):
            end = min(start + block_size, lazy_end)
            block = start // block_size
            scale, zero = fit_block(left[start:end], importance[start:end], bits)
            scales[block], zeros[block] = scale, zero
            for row in range(start, end):
                code = np.clip(np.rint(left[row] / scale + zero), 0, 2**bits - 1)
                codes[row] = code
                error = (left[row] - (code - zero) * scale) / factor[row, row]
                errors[row - lazy] = error
                left[row + 1 : end] -= factor[row, row + 1 : end, None] * error
            left[end:lazy_end] -= factor[start:end, end:lazy_end].T @ errors[start - lazy : end - lazy]
        left[lazy_end:] -= factor[lazy:lazy_end, lazy_end:].T @ errors
    return codes, Grid(bits, block_size, scales, zeros)


def inverse_factor(moments: np.ndarray) -> np.ndarray:
    """The (K, K) float32 upper Cholesky factor of the inverse of the damped moments.

    Args:
        moments: (K, K) mean of the products of two inputs.
    """
    from scipy.linalg import lapack

    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean() + 1e-12
    lower, failed = lapack.dpotrf(damped, lower=1, clean=1)
    if failed:  # activations that are not finite: the graph's parity check will say so
        return np.eye(len(moments), dtype=np.float32)
    inverse, _ = lapack.dpotri(lower, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    upper, _ = lapack.dpotrf(inverse, lower=0, clean=1)
    return upper.astype(np.float32)
