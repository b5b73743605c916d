"""The thread that runs the model for asynchronous handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from export.worker import Worker


def test_a_reader_that_leaves_ends_its_job() -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async def leave_then_ask_again() -> list[int]:
        worker = Worker()
        async with aclosing(worker.results(endless)) as results:
            assert [await anext(results) for _ in range(3)] == [0, 1, 2]
        # One thread runs both: were the first job still running, this would wait for ever.
        return [number async for number in worker.results(lambda: iter([7, 8]))]

    assert asyncio.run(asyncio.wait_for(leave_then_ask_again(), 30)) == [7, 8]


def test_what_a_job_raises_is_raised_in_its_reader_alone() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    async def both() -> list[int]:
        worker = Worker()
        results = worker.results(failing)
        assert await anext(results) == 1
        with pytest.raises(ValueError, match="no more"):
            await anext(results)
        return [number async for number in worker.results(lambda: iter([2]))]

    assert asyncio.run(both()) == [2]
