"""A batch with a static and a dynamic cache: each row has the logits that it has alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.runtime import static_cache
from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.slot import Slot
from tests.conftest import make_model
from tests.export.export_helpers import Exported

ATOL = 2e-5  # nats: sums in another order


@pytest.fixture(scope="module", params=["static", "dynamic", "recurrent"])
def runtime(
    request: pytest.FixtureRequest,
    llama: Exported,
    optimum_artifact: Callable[[Path], Path],
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runtime:
    """A model as a fused graph, which has a static cache, and as optimum's graph, which has a dynamic one.

    The third is a fused graph with a static cache and recurrent states.
    """
    if request.param == "recurrent":
        folder = tmp_path_factory.mktemp("recurrent")
        export_onnx(make_model(folder / "torch", tokenizer_folder, "qwen3_5_text"), folder / "onnx")
        return Runtime.load(folder / "onnx", threads=1)
    folder = llama.fp32 if request.param == "static" else optimum_artifact(llama.torch)
    runtime = Runtime.load(folder, threads=1)
    assert runtime.is_fused == (request.param == "static")
    return runtime


def whole(runtime: Runtime, text: list[int]) -> np.ndarray:
    """(V,) logits after a text, without a cache."""
    ids = np.array([text])
    return runtime.logits(ids, np.ones_like(ids))[0, -1]


def skip_if_recurrent(runtime: Runtime) -> None:
    if runtime.is_recurrent:
        pytest.skip("a recurrent state has no prefix")


def texts(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 300) for _ in range(draw.randrange(shortest, longest + 1))] for _ in range(count)]


def read(batch: Batch, slots: list[Slot], most: int = 1000) -> list[np.ndarray]:
    """The logits after each prompt, computed in chunks of at most `most` tokens."""
    logits_of_slot: dict[Slot, np.ndarray] = {}
    while unread := [slot for slot in slots if slot not in logits_of_slot]:
        results = zip(unread, batch.prefill(unread, most), strict=True)
        logits_of_slot |= {slot: logits for slot, logits in results if logits is not None}
    return [logits_of_slot[slot] for slot in slots]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_that_join_and_leave_in_any_order_have_the_logits_of_a_single_row(runtime: Runtime, seed: int) -> None:
    """A random schedule: chunks of prompts, steps of some rows in any order, rows that leave, shared prefixes."""
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


def test_old_and_uninitialized_contents_of_buffers_have_no_effect(
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


def test_prompts_of_similar_length_share_a_run(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    if not runtime.is_fused:
        pytest.skip("a dynamic cache computes each prompt by itself")
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


class PrefillCounter:
    """Counts the prompt tokens that a batch computes."""

    def __init__(self, batch: Batch) -> None:
        self.tokens = 0
        cache = batch._cache
        prefill = cache.prefill

        def count(slots: list[Slot], pieces: list[list[int]]) -> list[np.ndarray]:
            self.tokens += sum(map(len, pieces))
            return prefill(slots, pieces)

        cache.prefill = count  # type: ignore[method-assign]


def test_recurrent_states_reuse_no_prefix(runtime: Runtime) -> None:
    if not runtime.is_recurrent:
        pytest.skip("no recurrent states")
    prompt, batch = texts(1, 60, 60)[0], Batch(runtime)
    slots = [batch.add_prompt(prompt) for _ in range(2)]
    for logits in read(batch, slots):
        np.testing.assert_allclose(logits, whole(runtime, prompt), atol=ATOL)
    batch.remove_slot(slots[0])
    slots.append(batch.add_prompt(prompt))
    read(batch, slots[2:])
    assert [slot.reused_tokens for slot in slots] == [0, 0, 0]


def test_a_prefix_of_another_text_is_reused(runtime: Runtime) -> None:
    skip_if_recurrent(runtime)
    start, *ends = [texts(1, 50, 50)[0], *texts(3, 5, 9, seed=4)]
    batch = Batch(runtime)
    counter = PrefillCounter(batch)
    left = batch.add_prompt(start + ends[0])
    read(batch, [left])
    batch.step([left], [9])
    batch.remove_slot(left)
    assert counter.tokens == len(start + ends[0])
    for end in ends[1:]:  # the first reuses the prefix cache, the second an active row
        slot = batch.add_prompt(start + end)
        (logits,) = read(batch, [slot])
        assert slot.reused_tokens == len(start)
        np.testing.assert_allclose(logits, whole(runtime, start + end), atol=ATOL)
        (logits,) = batch.step([slot], [17])
        np.testing.assert_allclose(logits, whole(runtime, [*start, *end, 17]), atol=ATOL)
    assert counter.tokens == len(start) + sum(map(len, ends))
    # A prompt that continues another text reuses its generated tokens too.
    slot = batch.add_prompt([*start, *ends[0], 9, 8])
    (logits,) = read(batch, [slot])
    np.testing.assert_allclose(logits, whole(runtime, [*start, *ends[0], 9, 8]), atol=ATOL)
    assert slot.reused_tokens == len(start + ends[0]) + 1


@pytest.mark.parametrize("most", [1000, 20])
def test_the_choices_of_a_prompt_compute_it_once(runtime: Runtime, most: int) -> None:
    skip_if_recurrent(runtime)
    prompt = texts(1, 60, 60)[0]
    batch = Batch(runtime)
    counter = PrefillCounter(batch)
    slots = [batch.add_prompt(prompt) for _ in range(4)]
    for logits in read(batch, slots, most):
        np.testing.assert_allclose(logits, whole(runtime, prompt), atol=ATOL)
    assert counter.tokens <= 60 + 3 * 16  # the shortest reused prefix
    assert sum(slot.reused_tokens for slot in slots) == 4 * 60 - counter.tokens
    for token, logits in enumerate(batch.step(slots, [1, 2, 3, 4])):
        np.testing.assert_allclose(logits, whole(runtime, [*prompt, token + 1]), atol=ATOL)


def test_buffers_shrink_after_a_long_text(runtime: Runtime) -> None:
    if not runtime.is_fused:
        pytest.skip("a dynamic cache has no buffers")
    batch = Batch(runtime, prefix_cache_tokens=0)
    cache = batch._cache
    assert isinstance(cache, static_cache.StaticCache)
    static_cache.MIN_WIDTH, min_width = 8, static_cache.MIN_WIDTH
    try:
        slot = batch.add_prompt([5] * 100)
        read(batch, [slot])
        assert cache._buffers[-1].shape[2] == 128
        batch.remove_slot(slot)
        slot = batch.add_prompt([5] * 4)
        read(batch, [slot])
        assert cache._buffers[-1].shape[2] == 8
    finally:
        static_cache.MIN_WIDTH = min_width
