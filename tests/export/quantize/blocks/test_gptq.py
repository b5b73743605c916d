"""GPTQ and the fit of a block's grid, against rounding to nearest."""

from __future__ import annotations

import numpy as np

from limbeck.export.quantize.blocks.formats import Grid, fit_block
from limbeck.export.quantize.blocks.gptq import gptq, inverse_factor


def nearest(weight: np.ndarray) -> np.ndarray:
    """(K, N) values in blocks of 32 on 16 levels from the smallest to the largest value, with 0 among them."""
    blocks = weight.reshape(-1, 32, weight.shape[1])
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    scale = (high - low)[:, None] / 15
    zero = np.rint(-low[:, None] / scale)
    return ((np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale).reshape(weight.shape)


def test_gptq_halves_the_error_of_products_with_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((160, 160)) / 12 + np.eye(160)
    inputs = rng.standard_normal((2048, 40)) @ rng.standard_normal((40, 160)) / 6 + rng.standard_normal((2048, 160))
    inputs = (inputs @ mixing).astype(np.float32)
    weight = rng.standard_normal((160, 48)).astype(np.float32)
    moments = inputs[:1024].T @ inputs[:1024] / 1024
    codes, grid = gptq(weight, np.diag(moments), inverse_factor(moments), 4, 32)
    assert codes.shape == weight.shape
    assert codes.max() <= 15
    errors = [np.square(inputs[1024:] @ (values - weight)).mean() for values in (grid.values(codes), nearest(weight))]
    assert errors[0] < errors[1] / 2


def test_the_last_block_may_be_shorter() -> None:
    weight = np.random.default_rng(0).standard_normal((72, 8)).astype(np.float32)
    codes, grid = gptq(weight, np.ones(72, np.float32), inverse_factor(np.eye(72, dtype=np.float32)), 4, 32)
    assert grid.scales.shape == (3, 8)
    assert np.abs(grid.values(codes) - weight).max() < 0.5


def test_a_block_is_fitted_where_its_inputs_matter() -> None:
    rng = np.random.default_rng(0)
    values, importance = rng.standard_normal((32, 64)).astype(np.float32), rng.uniform(0.01, 9, 32).astype(np.float32)

    def error(scale: np.ndarray, zero: np.ndarray) -> float:
        codes = np.clip(np.rint(values / scale + zero), 0, 15)
        fitted = Grid(4, 32, scale[None], zero[None]).values(codes)
        return float((importance[:, None] * (fitted - values) ** 2).sum())

    assert error(*fit_block(values, importance, 4)) < 0.97 * error(*fit_block(values, np.ones_like(importance), 4))
    plain = np.square(nearest(values) - values) * importance[:, None]
    assert error(*fit_block(values, importance, 4)) < 0.95 * plain.sum()
    scale, zero = fit_block(np.zeros((32, 2), np.float32), importance, 4)
    assert (scale > 0).all()
    assert ((zero >= 0) & (zero <= 15)).all()
