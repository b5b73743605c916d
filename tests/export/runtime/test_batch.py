"""Rows that join and leave a batch: each has what it has alone, whatever was moved, grown or taken over."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from limbeck.export.artifact.export import export_onnx as export_onnx
from limbeck.export.runtime import static_cache
from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.prefix_cache import PrefixCache, common_prefix_length
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.slot import Slot

ATOL = 2e-5  # nats; another order of adding up


@pytest.fixture(scope="module", params=["in place", "grown"])
def runtime(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The same model as a fused graph and as optimum's."""
    folder = tmp_path_factory.mktemp("batch")
    export_onnx(tiny_llama, folder / "fp32", fused=request.param == "in place")
    runtime = Runtime.load(folder / "fp32", threads=1)
    assert runtime.is_fused == (request.param == "in place")
    return runtime


def whole(runtime: Runtime, text: list[int]) -> np.ndarray:
    """(V,) logits after a text, without a cache."""
    ids = np.array([text])
    return runtime.logits(ids, np.ones_like(ids))[0, -1]


def texts(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 300) for _ in range(draw.randrange(shortest, longest + 1))] for _ in range(count)]


def read(batch: Batch, slots: list[Slot], most: int = 1000) -> list[np.ndarray]:
    """The logits after each prompt, however many pieces it takes."""
    found: dict[Slot, np.ndarray] = {}
    while unread := [slot for slot in slots if slot not in found]:
        pieces = zip(unread, batch.prefill(unread, most), strict=True)
        found |= {slot: logits for slot, logits in pieces if logits is not None}
    return [found[slot] for slot in slots]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_that_come_and_go_in_any_order_have_what_they_have_alone(runtime: Runtime, seed: int) -> None:
    """A random schedule: prompts in pieces, steps of some of the rows in any order, rows that end, equal beginnings."""
    draw, batch = random.Random(seed), Batch(runtime, prefix_cache_tokens=150)
    shared = texts(1, 40, 40, seed)[0]
    reading: list[Slot] = []
    running: dict[Slot, list[int]] = {}
    checked = 0
    for turn in range(45):
        if len(reading) + len(running) < 6 and draw.random() < 0.5:
            beginning = shared[: draw.choice([0, 0, 17, 30, 40])]
            reading.append(batch.add_prompt(beginning + texts(1, 1, 25, 100 * seed + turn)[0]))
        batch_of = [slot for slot in reading if draw.random() < 0.7]
        for slot, logits in zip(batch_of, batch.prefill(batch_of, draw.choice([3, 16, 100])), strict=True):
            assert (logits is None) == bool(slot.unread_tokens)
            if logits is not None:
                reading.remove(slot)
                running[slot] = list(slot.prompt)
                np.testing.assert_allclose(logits, whole(runtime, running[slot]), atol=ATOL)
        stepped = draw.sample(list(running), draw.randrange(len(running) + 1))
        if stepped:
            given = [draw.randrange(1, 300) for _ in stepped]
            for slot, token, logits in zip(stepped, given, batch.step(stepped, given), strict=True):
                running[slot].append(token)
                np.testing.assert_allclose(logits, whole(runtime, running[slot]), atol=ATOL)
                checked += 1
        for slot in [slot for slot in [*running, *reading] if draw.random() < 0.12 or slot.length > 100]:
            batch.remove_slot(slot)
            running.pop(slot, None)
            reading = [other for other in reading if other is not slot]
    assert checked > 40


def test_what_a_buffer_held_before_and_never_held_counts_for_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 77, dtype))
    prompts = texts(5, 3, 60)
    batch = Batch(runtime, prefix_cache_tokens=0)
    first = [batch.add_prompt(prompt) for prompt in prompts]
    read(batch, first)
    for slot in first:
        batch.remove_slot(slot)
    slots = [batch.add_prompt(prompt[:-2]) for prompt in reversed(prompts)]
    for slot, logits in zip(slots, read(batch, slots), strict=True):
        np.testing.assert_allclose(logits, whole(runtime, list(slot.prompt)), atol=ATOL)


def test_prompts_of_about_one_length_are_read_in_one_run(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    if not runtime.is_fused:
        pytest.skip("optimum's graph reads each prompt by itself")
    runs: list[int] = []
    run = static_cache.StaticCache._prefill_group
    monkeypatch.setattr(
        static_cache.StaticCache,
        "_prefill_group",
        lambda self, slots, pieces: runs.append(len(slots)) or run(self, slots, pieces),
    )
    batch = Batch(runtime)
    slots = [batch.add_prompt(prompt) for prompt in [*texts(4, 18, 20, 1), *texts(3, 50, 54, 2), *texts(2, 2, 2, 3)]]
    for slot, logits in zip(slots, read(batch, slots), strict=True):
        np.testing.assert_allclose(logits, whole(runtime, list(slot.prompt)), atol=ATOL)
    assert runs == [2, 4, 3]


class Counted:
    """Counts the tokens that a batch gives its model."""

    def __init__(self, batch: Batch) -> None:
        self.tokens = 0
        cache = batch._cache
        reading = cache.prefill

        def count(slots: list[Slot], pieces: list[list[int]]) -> list[np.ndarray]:
            self.tokens += sum(map(len, pieces))
            return reading(slots, pieces)

        cache.prefill = count  # type: ignore[method-assign]


def test_a_beginning_that_another_text_had_is_not_read_again(runtime: Runtime) -> None:
    start, *ends = [texts(1, 50, 50)[0], *texts(3, 5, 9, seed=4)]
    batch = Batch(runtime)
    counted = Counted(batch)
    left = batch.add_prompt(start + ends[0])
    read(batch, [left])
    batch.step([left], [9])
    batch.remove_slot(left)
    assert counted.tokens == len(start + ends[0])
    for end in ends[1:]:  # the first takes over what has left, the second what is there still
        slot = batch.add_prompt(start + end)
        (logits,) = read(batch, [slot])
        assert slot.reused_tokens == len(start)
        np.testing.assert_allclose(logits, whole(runtime, start + end), atol=ATOL)
        (logits,) = batch.step([slot], [17])
        np.testing.assert_allclose(logits, whole(runtime, [*start, *end, 17]), atol=ATOL)
    assert counted.tokens == len(start) + sum(map(len, ends))
    # A text goes on where another ended: what was generated is known too.
    slot = batch.add_prompt([*start, *ends[0], 9, 8])
    (logits,) = read(batch, [slot])
    np.testing.assert_allclose(logits, whole(runtime, [*start, *ends[0], 9, 8]), atol=ATOL)
    assert slot.reused_tokens == len(start + ends[0]) + 1


@pytest.mark.parametrize("most", [1000, 20])
def test_choices_of_one_prompt_read_it_once(runtime: Runtime, most: int) -> None:
    prompt = texts(1, 60, 60)[0]
    batch = Batch(runtime)
    counted = Counted(batch)
    slots = [batch.add_prompt(prompt) for _ in range(4)]
    for logits in read(batch, slots, most):
        np.testing.assert_allclose(logits, whole(runtime, prompt), atol=ATOL)
    assert counted.tokens <= 60 + 3 * 16  # the least that is taken over
    assert sum(slot.reused_tokens for slot in slots) == 4 * 60 - counted.tokens
    for token, logits in enumerate(batch.step(slots, [1, 2, 3, 4])):
        np.testing.assert_allclose(logits, whole(runtime, [*prompt, token + 1]), atol=ATOL)


def test_kept_texts_are_bounded_and_the_least_recently_used_goes() -> None:
    kept = PrefixCache(100)
    for start in (1, 2, 3):
        kept.store((start,) * 40, [])
    assert [kept.find_longest((start,) * 40)[0] for start in (1, 2, 3)] == [0, 40, 40]
    kept.find_longest((2,) * 40)
    kept.store((4,) * 40, [])
    assert [kept.find_longest((start,) * 40)[0] for start in (2, 3, 4)] == [40, 0, 40]
    assert not kept.should_store((5,) * 101)
    assert not kept.should_store((4,) * 30)  # it is there
    kept.store((4,) * 60, [])  # takes the place of its own beginning
    assert [kept.find_longest((start,) * 60)[0] for start in (2, 4)] == [40, 60]


@pytest.mark.parametrize(
    ("a", "b", "alike"), [((), (1,), 0), ((1,), (2,), 0), ((1, 2, 3), (1, 2), 2), ((1, 2, 3, 4, 5), (1, 2, 3, 9, 5), 3)]
)
def test_common(a: tuple[int, ...], b: tuple[int, ...], alike: int) -> None:
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == alike


def test_a_long_text_leaves_no_wide_buffers(runtime: Runtime) -> None:
    if not runtime.is_fused:
        pytest.skip("optimum's graph has no buffers")
    batch = Batch(runtime, prefix_cache_tokens=0)
    cache = batch._cache
    assert isinstance(cache, static_cache.StaticCache)
    static_cache.MIN_WIDTH, least = 8, static_cache.MIN_WIDTH
    try:
        slot = batch.add_prompt([5] * 100)
        read(batch, [slot])
        assert cache._buffers[0].shape[2] == 128
        batch.remove_slot(slot)
        slot = batch.add_prompt([5] * 4)
        read(batch, [slot])
        assert cache._buffers[0].shape[2] == 8
    finally:
        static_cache.MIN_WIDTH = least
