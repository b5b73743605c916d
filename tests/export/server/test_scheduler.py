"""Requests that are decoded together: each gets the tokens that it would get alone, and none is blocked."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling, log_softmax
from limbeck.export.runtime.slot import Slot
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import MAX_UNREAD_RESULTS, Limits, Unavailable
from limbeck.export.server.scheduler import Scheduler
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import Exported

TEXTS = ["def add(", "class A:\n    def f(self):\n        return", "x", "import os\nimport sys", "for i in range(1"]
ENDLESS = Sampling(max_new_tokens=10**6, ignore_eos=True)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 20))


async def tokens(results: AsyncGenerator[TokenEvent], rows: int = 1) -> list[list[int]]:
    """The token ids of each row."""
    out: list[list[int]] = [[] for _ in range(rows)]
    async for event in results:
        out[event.index].append(event.token_id)
    return out


def alone(runtime: Runtime, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The token ids of each row without a scheduler."""
    out: list[list[int]] = [[] for _ in prompts]
    for event in runtime.generate_events(prompts, sampling):
        out[event.index].append(event.token_id)
    return out


@pytest.fixture(scope="module")
def endless(boundless: Path) -> Runtime:
    return Runtime.load(boundless, threads=1)


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=3), Limits(rows=4, cache_bytes=1)], ids=str)
def test_each_request_gets_what_it_would_get_alone(family: Exported, limits: Limits) -> None:
    """Rows join while others are decoded, use their own seeds, and are preempted."""
    runtime = Runtime.load(family.fp32, threads=1)
    requests = [([runtime.encode(text)], Sampling(max_new_tokens=5 + 3 * i)) for i, text in enumerate(TEXTS)]
    requests.append(([runtime.encode(text) for text in TEXTS], Sampling(max_new_tokens=12, temperature=1.0, seed=3)))
    expected = [alone(runtime, prompts, sampling) for prompts, sampling in requests]
    metrics = Metrics()

    async def together() -> list[Any]:
        scheduler = Scheduler(runtime, limits, metrics)
        return await asyncio.gather(*[tokens(scheduler.generate(p, s), len(p)) for p, s in requests])

    assert run(together) == expected
    count = metrics.registry.get_sample_value
    assert count("limbeck:generation_tokens_total") == sum(len(row) for rows in expected for row in rows)
    assert count("limbeck:prompt_tokens_total") == sum(len(prompt) for prompts, _ in requests for prompt in prompts)


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=2, cache_bytes=1)], ids=str)
def test_rows_that_decode_alone_take_proposed_tokens(llama: Exported, limits: Limits) -> None:
    runtime = Runtime.load(llama.fp32, threads=1)
    requests = [([runtime.encode(text)], Sampling(max_new_tokens=60, ignore_eos=True, logprobs=1)) for text in TEXTS]
    requests += [([[1, 2, 3, 1, 2]], Sampling(max_new_tokens=30, temperature=0.5, seed=3))]
    expected = [alone(runtime, prompts, sampling) for prompts, sampling in requests]
    runtime.speculate(prompt_lookup_num_tokens=8, draft=Runtime.load(llama.fp32, threads=1))
    metrics = Metrics()

    async def one_by_one_and_together() -> list[Any]:
        scheduler = Scheduler(runtime, limits, metrics)
        first = [await tokens(scheduler.generate(p, s), len(p)) for p, s in requests]
        return first + await asyncio.gather(*[tokens(scheduler.generate(p, s), len(p)) for p, s in requests])

    assert run(one_by_one_and_together) == expected + expected
    count = metrics.registry.get_sample_value
    drafts, proposed, accepted = (
        count(f"limbeck:spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert drafts > 0
    assert 0 < accepted <= proposed
    assert count("limbeck:generation_tokens_total") == 2 * (60 * len(TEXTS) + len(expected[-1][0]))


def test_rows_that_outgrow_the_cache_are_preempted_and_continue(llama: Exported) -> None:
    runtime = Runtime.load(llama.fp32, threads=1)
    prompts = [runtime.encode(text) for text in TEXTS]
    sampling = Sampling(max_new_tokens=60, temperature=0.8, seed=1)
    expected = alone(runtime, prompts, sampling)
    metrics = Metrics()
    per_token = 2 * 2 * 2 * 8 * 4  # layers, key and value, heads, their size, bytes

    async def together() -> list[list[int]]:
        scheduler = Scheduler(runtime, Limits(cache_bytes=200 * per_token), metrics)
        return [row for rows in await asyncio.gather(*[one(scheduler, i) for i in range(len(prompts))]) for row in rows]

    async def one(scheduler: Scheduler, index: int) -> list[list[int]]:
        rows = await tokens(scheduler.generate(prompts[: index + 1], sampling), index + 1)
        return rows[index:]

    assert run(together) == expected
    assert metrics.registry.get_sample_value("limbeck:num_preemptions_total") > 0


def test_requests_share_their_steps(endless: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    all_are_sent = threading.Event()
    step = Batch.step

    def counted(batch: Batch, slots: Sequence[Slot], ids: Sequence[int]) -> np.ndarray:
        assert all_are_sent.wait(20)
        sizes.append(len(slots))
        return step(batch, slots, ids)

    monkeypatch.setattr(Batch, "step", counted)
    sampling = Sampling(max_new_tokens=40, ignore_eos=True)

    async def together() -> None:
        scheduler = Scheduler(endless)
        readers = [asyncio.create_task(tokens(scheduler.generate([[1, 2, 3]], sampling))) for _ in range(8)]
        await asyncio.sleep(0)  # each request is sent before its reader waits
        all_are_sent.set()
        await asyncio.gather(*readers)

    run(together)
    assert max(sizes) == 8
    assert len(sizes) < 3 * 40  # one after the other: 8 * 39


def test_a_request_with_many_rows_does_not_block_others(endless: Runtime) -> None:
    async def small_beside_large() -> None:
        scheduler = Scheduler(endless, Limits(rows=8))
        async with aclosing(scheduler.generate([[1, 2]] * 128, ENDLESS)) as first:
            await anext(first)
            async with aclosing(scheduler.generate([[3, 4]] * 128, ENDLESS)) as second:
                await anext(second)
                assert len((await tokens(scheduler.generate([[5]], Sampling(max_new_tokens=5))))[0]) >= 1

    run(small_beside_large)


def test_a_long_prompt_does_not_block_others(endless: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests are computed between the chunks of a long prompt."""
    read = Batch.prefill

    def slowly(self: Batch, slots: Sequence[Slot], most: int) -> list[np.ndarray | None]:
        time.sleep(0.0002 * sum(min(slot.unread_tokens, most) for slot in slots))
        return read(self, slots, most)

    monkeypatch.setattr(Batch, "prefill", slowly)
    done: list[str] = []

    async def one(scheduler: Scheduler, name: str, prompt: list[int], new: int) -> None:
        await tokens(scheduler.generate([prompt], Sampling(max_new_tokens=new, ignore_eos=True)))
        done.append(name)

    async def both() -> None:
        scheduler = Scheduler(endless)
        long = asyncio.ensure_future(one(scheduler, "long", [7] * 6000, 1))
        await asyncio.sleep(0.1)
        await one(scheduler, "short", [7] * 5, 8)
        await long

    run(both)
    assert done == ["short", "long"]


def test_a_full_queue_is_refused_with_retry_after(endless: Runtime) -> None:
    async def overfill() -> None:
        scheduler = Scheduler(endless, Limits(rows=1, queue=2))
        running = scheduler.generate([[1]], ENDLESS)
        await anext(running)
        waiting = [asyncio.ensure_future(tokens(scheduler.generate([[i]], Sampling(max_new_tokens=3)))) for i in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as full:
            await anext(scheduler.generate([[4]], ENDLESS))
        assert full.value.status == 429
        assert 1 <= (full.value.retry_after or 0) <= 60
        await running.aclose()  # its reader leaves: the waiting requests run
        assert [len(rows[0]) for rows in await asyncio.gather(*waiting)] == [3, 3]
        assert len((await tokens(scheduler.generate([[4]], Sampling(max_new_tokens=3))))[0]) == 3

    run(overfill)


def test_a_request_ends_when_its_time_is_up(endless: Runtime) -> None:
    metrics = Metrics()

    async def too_long() -> None:
        scheduler = Scheduler(endless, Limits(rows=1, timeout_s=0.3), metrics)
        waits = asyncio.ensure_future(tokens(scheduler.generate([[1]], ENDLESS)))
        await asyncio.sleep(0)
        for work in (tokens(scheduler.generate([[2]], ENDLESS)), waits):
            with pytest.raises(Unavailable, match=r"longer than 0\.3 s") as late:
                await work
            assert late.value.status == 504
        assert len((await tokens(scheduler.generate([[3]], Sampling(max_new_tokens=2))))[0]) == 2

    run(too_long)
    assert metrics.registry.get_sample_value("limbeck:request_failure_total", {"reason": "timeout"}) == 2


def test_the_rows_of_a_slow_reader_pause_and_do_not_block_others(endless: Runtime) -> None:
    metrics = Metrics()

    async def slow() -> None:
        scheduler = Scheduler(endless, Limits(rows=2), metrics)
        async with aclosing(scheduler.generate([[1]], ENDLESS)) as unread:
            await anext(unread)
            for _ in range(3):
                await tokens(scheduler.generate([[2]], Sampling(max_new_tokens=300, ignore_eos=True)))
            made = metrics.registry.get_sample_value("limbeck:generation_tokens_total")
            assert made < 900 + MAX_UNREAD_RESULTS + 20  # a row that did not pause would have made another 900
            for _ in range(3 * MAX_UNREAD_RESULTS):  # it continues when it is read
                await anext(unread)

    run(slow)


def test_prompt_logprobs_are_exact_and_computed_while_others_are_decoded(endless: Runtime) -> None:
    prompt = endless.encode("".join(TEXTS))[:60]
    logits = endless.logits(np.array([prompt]), np.ones((1, len(prompt)), np.int64))[0]
    expected = log_softmax(logits.astype(np.float64))

    async def score() -> Any:
        scheduler = Scheduler(endless)
        async with aclosing(scheduler.generate([[1]], ENDLESS)) as other:
            await anext(other)
            return await scheduler.prompt_logprobs(prompt, 2)

    first, *rest = run(score)
    assert (first.logprob, first.top_logprobs) == (None, {})
    assert [scored.logprob for scored in rest] == pytest.approx(
        [expected[place, token] for place, token in enumerate(prompt[1:])], abs=1e-4
    )
    assert [next(iter(scored.top_logprobs)) for scored in rest] == expected[:-1].argmax(axis=1).tolist()


def test_an_error_of_the_model_ends_only_its_own_requests(endless: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(endless, [[5, 6, 7]], Sampling(max_new_tokens=80))
    read, step = Batch.prefill, Batch.step

    def fail_on_9(self: Batch, slots: Sequence[Slot], most: int) -> list[np.ndarray | None]:
        if any(9 in slot.prompt for slot in slots):
            raise MemoryError("no room")
        return read(self, slots, most)

    monkeypatch.setattr(Batch, "prefill", fail_on_9)

    async def both() -> None:
        scheduler = Scheduler(endless)
        results = scheduler.generate([[5, 6, 7]], Sampling(max_new_tokens=80))
        got = [(await anext(results)).token_id]
        with pytest.raises(RuntimeError, match="the model failed: no room"):
            await tokens(scheduler.generate([[9]], ENDLESS))
        got += [event.token_id async for event in results]
        assert [got] == expected
        monkeypatch.setattr(Batch, "step", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="division"):
            await tokens(scheduler.generate([[5]], ENDLESS))
        monkeypatch.setattr(Batch, "step", step)
        assert await tokens(scheduler.generate([[5, 6, 7]], Sampling(max_new_tokens=80))) == expected

    run(both)


class AllowsTokens:
    """A constraint that allows any token so many times, then none."""

    def __init__(self, count: int) -> None:
        self.count = count

    def allowed_tokens(self) -> np.ndarray:
        self.count -= 1
        return np.full(300, self.count >= 0)

    def accept(self, token: int) -> bool:
        return False


class EndsSecondText:
    """A constraint that allows the second text of a request two tokens, and the others any number."""

    def __init__(self) -> None:
        self.counts = iter([1000, 2, 1000])

    def start(self) -> AllowsTokens:
        return AllowsTokens(next(self.counts))


def test_what_fails_in_choosing_a_token_fails_its_request_alone(endless: Runtime) -> None:
    long = Sampling(max_new_tokens=60, ignore_eos=True)
    expected = alone(endless, [[5, 6, 7]], long)

    async def beside_others() -> None:
        scheduler = Scheduler(endless)
        others = [asyncio.ensure_future(tokens(scheduler.generate([[5, 6, 7]], long))) for _ in range(4)]
        poison = Sampling(max_new_tokens=60, ignore_eos=True, temperature=1.0, constraint=EndsSecondText())
        with pytest.raises(BadInput, match=r"its highest logit is -inf"):
            await tokens(scheduler.generate([[3]] * 3, poison), 3)
        assert await asyncio.gather(*others) == [expected] * 4

    run(beside_others)


def test_requests_beyond_the_limits_are_bad_input(endless: Runtime) -> None:
    async def ask() -> None:
        scheduler = Scheduler(endless, Limits(prompt_tokens=3, new_tokens=5))
        with pytest.raises(BadInput, match="prompt has 4 tokens; this server accepts at most 3"):
            await anext(scheduler.generate([[1], [1] * 4], Sampling(max_new_tokens=1)))
        with pytest.raises(BadInput, match="at most 3"):
            await scheduler.prompt_logprobs([1] * 4, 0)
        with pytest.raises(BadInput, match="6 new tokens"):
            await anext(scheduler.generate([[1]], Sampling(max_new_tokens=6)))
        assert len((await tokens(scheduler.generate([[1] * 3], Sampling(max_new_tokens=5, ignore_eos=True))))[0]) == 5

    run(ask)


def test_a_scheduler_without_references_frees_its_model_and_ends_its_thread(llama: Exported) -> None:
    runtime = Runtime.load(llama.fp32, threads=1)
    gone = weakref.ref(runtime)
    other_threads = set(threading.enumerate())

    async def use(scheduler: Scheduler) -> int:
        results = scheduler.generate([[1, 2]], Sampling(max_new_tokens=30))
        del scheduler
        first = await anext(results)
        gc.collect()
        return 1 + len([event async for event in results]) + 0 * first.index

    scheduler = Scheduler(runtime)
    (engine,) = [thread for thread in threading.enumerate() if thread not in other_threads]
    del runtime
    work = use(scheduler)
    del scheduler
    works = [work]
    del work
    assert run(works.pop) >= 1  # a running request keeps its model
    engine.join(10)
    assert not engine.is_alive()
    gc.collect()
    assert gone() is None
