"""The teacher cache: what comes back, what is captured again, what is another cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import cache as caches
from distill.blocks import Blocks
from distill.cache import Capture, TeacherCache
from distill.models import load_model
from distill.teacher import capture_topk

IDS = np.random.default_rng(0).integers(0, 300, (10, 12), dtype=np.int32)
ONES = np.ones_like(IDS)
BLOCKS = Blocks(IDS, ONES.astype(np.uint16), ONES.astype(bool), IDS.size, IDS.size, "b")
TOP_K = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_BLOCKS", 4)


@pytest.fixture
def cache(limbeck_home: Path) -> TeacherCache:
    return TeacherCache({"teacher": "t", "blocks": "b", "top_k": TOP_K}, len(IDS), 300)


@pytest.fixture
def capture(tiny_llama: Path) -> Capture:
    return capture_topk(load_model(tiny_llama), BLOCKS, 300, TOP_K, bf16=False)


def test_it_gives_back_what_the_teacher_said(cache: TeacherCache, capture, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    assert cache.fill(capture) == 10
    indices = np.array([9, 0, 5])
    rows = cache.rows(indices)
    assert (rows["ids"].dtype, rows["logprobs"].dtype) == (torch.int64, torch.float32)
    ids, logprobs = rows["ids"].numpy(), rows["logprobs"].numpy()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS[indices]).long()).logits.log_softmax(-1)
    values, places = expected.topk(TOP_K, dim=-1)
    np.testing.assert_allclose(logprobs, values.numpy(), atol=5e-3)  # stored in half precision
    assert (ids == places.numpy()).mean() > 0.99
    assert cache.disk_bytes() <= IDS.size * TOP_K * 4 + 3 * 2 * 128  # two bytes an id, two a log-probability


def test_a_stopped_capture_goes_on(cache: TeacherCache, capture) -> None:  # type: ignore[no-untyped-def]
    seen: list[int] = []

    def stops(blocks: np.ndarray) -> dict[str, np.ndarray]:
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
    again = TeacherCache(cache.settings, len(IDS), 300)
    assert again.fill(capture) == 4
    for name, after in again.rows(np.arange(10)).items():
        assert (whole[name] == after).all()


def test_other_settings_are_another_cache(cache: TeacherCache) -> None:
    for change in ({"teacher": "u"}, {"blocks": "c"}, {"top_k": 2}, {"precision": "bf16"}):
        assert TeacherCache(cache.settings | change, len(IDS), 300).folder != cache.folder


def test_padding_is_left_out_and_bf16_is_near(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    every = np.arange(len(IDS))
    exact = capture_topk(model, BLOCKS, 300, 300, bf16=False)(every)["logprobs"]
    assert np.exp(exact).sum(-1) == pytest.approx(1.0, abs=1e-4)
    cut = capture_topk(model, BLOCKS, 200, 200, bf16=False)(every)
    assert cut["ids"].max() == 199
    assert np.exp(cut["logprobs"]).sum(-1) == pytest.approx(1.0, abs=1e-4)
    near = capture_topk(model, BLOCKS, 300, 1, bf16=True)(every)["logprobs"]
    assert np.abs(near - exact[..., :1]).max() < 0.1
