"""The teacher cache: what comes back, what is captured again, what is another cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import cache as caches
from distill.cache import TeacherCache
from distill.models import capture_topk, load_model

BLOCKS = np.random.default_rng(0).integers(0, 300, (10, 12), dtype=np.int32)
TOP_K = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_BLOCKS", 4)


@pytest.fixture
def cache(limbeck_home: Path) -> TeacherCache:
    return TeacherCache({"teacher": "t", "blocks": "b", "top_k": TOP_K}, BLOCKS, 300)


@pytest.fixture
def capture(tiny_llama: Path) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return capture_topk(load_model(tiny_llama), 300, TOP_K, bf16=False)


def test_it_gives_back_what_the_teacher_said(cache: TeacherCache, capture, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    assert cache.fill(capture) == 10
    indices = np.array([9, 0, 5])
    ids, logprobs = cache.rows(indices)
    assert (ids.dtype, logprobs.dtype) == (np.int64, np.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(BLOCKS[indices]).long()).logits.log_softmax(-1)
    values, places = expected.topk(TOP_K, dim=-1)
    np.testing.assert_allclose(logprobs, values.numpy(), atol=5e-3)  # stored in half precision
    assert (ids == places.numpy()).mean() > 0.99
    assert cache.disk_bytes() <= BLOCKS.size * TOP_K * 4 + 3 * 2 * 128  # two bytes an id, two a log-probability


def test_a_stopped_capture_goes_on(cache: TeacherCache, capture) -> None:  # type: ignore[no-untyped-def]
    seen: list[int] = []

    def stops(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if seen:
            raise KeyboardInterrupt
        seen.append(len(blocks))
        return capture(blocks)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(stops)
    assert cache.fill(capture) == 6
    assert cache.fill(capture) == 0


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no record"])
def test_a_damaged_shard_is_captured_again(cache: TeacherCache, capture, harm: str) -> None:  # type: ignore[no-untyped-def]
    cache.fill(capture)
    whole = cache.rows(np.arange(10))
    path = cache.folder / ("00001.json" if harm == "no record" else "00001.logprobs.npy")
    data = path.read_bytes()
    if harm in ("gone", "no record"):
        path.unlink()
    else:
        path.write_bytes(data[:-10] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    again = TeacherCache(cache.settings, BLOCKS, 300)
    assert again.fill(capture) == 4
    for before, after in zip(whole, again.rows(np.arange(10)), strict=True):
        assert (before == after).all()


def test_other_settings_are_another_cache(cache: TeacherCache) -> None:
    for change in ({"teacher": "u"}, {"blocks": "c"}, {"top_k": 2}, {"precision": "bf16"}):
        assert TeacherCache(cache.settings | change, BLOCKS, 300).folder != cache.folder


def test_padding_is_left_out_and_bf16_is_near(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    _, exact = capture_topk(model, 300, 300, bf16=False)(BLOCKS)
    assert np.exp(exact).sum(-1) == pytest.approx(1.0, abs=1e-4)
    ids, logprobs = capture_topk(model, 200, 200, bf16=False)(BLOCKS)
    assert ids.max() == 199
    assert np.exp(logprobs).sum(-1) == pytest.approx(1.0, abs=1e-4)
    _, near = capture_topk(model, 300, 1, bf16=True)(BLOCKS)
    assert np.abs(near - exact[..., :1]).max() < 0.1
