"""`limbeck serve` under load: 1, 4, 16 and 64 clients on loopback, the server in its own process.

Each client streams one greedy answer after another over one connection. Every answer is compared with that of the
offline runtime ("ties": the two most likely tokens are nearly equal and swapped; "wrong": all other differences).
Then a prompt of 4,000 tokens that arrives while another answer streams: the pauses of the stream. Then 10,000 short
requests to a small model, with the server's memory after a fifth of them and after all.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT

LOADS = {1: 6, 4: 12, 16: 48, 64: 128}  # clients -> requests of all of them
PROMPT, NEW = 32, 64
LONG, STREAMED = 4000, 256  # tokens of a long prompt, and of the answer that streams meanwhile
SHORT = 10_000
# 49 million parameters: more than the processor's cache holds.
LARGE = dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10)
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


class Answer(NamedTuple):
    """One streamed answer."""

    text: str
    tokens: int
    first_s: float
    whole_s: float


def main(*precisions: str) -> None:
    """Measure and print two tables."""
    quiet_libraries()
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.quantize.precisions import PRECISIONS

    wanted = precisions or tuple(name for name in ("fp32", "int4") if name in PRECISIONS)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        params = make_llama(folder / "torch", LARGE)
        print_status(
            f"a random Llama of {params / 1e6:.0f}M parameters; server and clients share {os.cpu_count()} processors"
        )
        rows, pauses = [], []
        export_onnx(folder / "torch", folder / "fp32")
        for precision in wanted:
            if precision != "fp32":
                export_onnx(folder / "torch", folder / precision, precision, fp32_artifact=folder / "fp32")
            rows += loads(folder / precision, precision)
            pauses.append([precision, *asyncio.run(pauses_of_a_stream(folder / precision))])
        columns = [
            "precision",
            "clients",
            "tokens/s",
            "x 1 client",
            "first p50",
            "first p99",
            "p50",
            "p99",
            "wrong",
            "ties",
        ]
        print_table(f"{PROMPT} prompt tokens, {NEW} new, streamed; milliseconds", columns, rows)
        columns = ["precision", "alone, p50", "beside it, p50", "p99", "longest", "first token of the long prompt"]
        print_table(f"from token to token of a stream, beside a prompt of {LONG} tokens; milliseconds", columns, pauses)
        make_llama(folder / "small", SMALL)
        export_onnx(folder / "small", folder / "short")
        print_table(f"{SHORT} short requests, 8 clients", ["after", "resident MB"], short_requests(folder / "short"))


def loads(artifact: Path, precision: str) -> list[list[str]]:
    """Measure each number of clients; return a row of the table for each."""
    from limbeck.export.runtime.runtime import Runtime

    all_prompts = prompts(sum(LOADS.values()), PROMPT)
    runtime = Runtime.load(artifact)
    expected = runtime.generate(all_prompts, max_new_tokens=NEW)
    rows, base, start = [], 0.0, 0
    with serving(artifact) as (port, _):
        asyncio.run(load(port, all_prompts[:2], 2))  # warm up
        for clients, count in LOADS.items():
            began = time.perf_counter()
            part = slice(start, start + count)
            answers = asyncio.run(load(port, all_prompts[part], clients))
            seconds = time.perf_counter() - began
            differences = [
                is_near_tie(runtime, prompt, completion.token_ids, answer.text)
                for answer, prompt, completion in zip(answers, all_prompts[part], expected[part], strict=True)
                if answer.text != completion.text
            ]
            wrong, ties = differences.count(False), differences.count(True)
            rate = sum(answer.tokens for answer in answers) / seconds
            base = base or rate
            start += count
            first, whole = ([getattr(answer, name) * 1e3 for answer in answers] for name in ("first_s", "whole_s"))
            times = [f"{np.percentile(values, q):.0f}" for values in (first, whole) for q in (50, 99)]
            rows.append(
                [precision, str(clients), f"{rate:.0f}", f"{rate / base:.2f}", *times, f"{wrong}/{count}", str(ties)]
            )
    return rows


def is_near_tie(runtime: Any, prompt: list[int], ids: list[int], text: str) -> bool:
    """Whether a text first differs from the offline one, `ids`, at a token whose two best logits are nearly equal.

    Matrix products of other shapes sum in another order, so logits differ in the sixth digit.
    """
    agreed = max(k for k in range(len(ids) + 1) if text.startswith(runtime.decode(ids[:k])))
    whole = np.array([prompt + ids])
    best = np.sort(runtime.logits(whole, np.ones_like(whole))[0], axis=-1)
    margins = (best[:, -1] - best[:, -2])[len(prompt) - 1 :]
    return bool(margins[max(0, agreed - 1) : agreed + 1].min() < 1e-3)


async def load(port: int, prompts: list[list[int]], clients: int) -> list[Answer]:
    """The answers to the prompts, requested by `clients` concurrent clients."""
    answers: dict[int, Answer] = {}
    unsent = iter(enumerate(prompts))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index, prompt in unsent:
            assert index not in answers
            answers[index] = await stream(reader, writer, prompt)
        writer.close()

    await asyncio.gather(*[client() for _ in range(clients)])
    return [answers[index] for index in range(len(prompts))]


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: list[int]) -> Answer:
    """One request over an open connection."""
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    send(writer, {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True})
    while (line := await reader.readline()) != b"0\r\n":  # the last chunk
        if line.startswith(b"HTTP/1.1 "):
            assert line.split()[1] == b"200", line
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            tokens += 1
            first = first or time.perf_counter()
    await reader.readline()
    return Answer(text, tokens, first - start, time.perf_counter() - start)


async def pauses_of_a_stream(artifact: Path) -> list[str]:
    """Stream one answer, send a long prompt in the middle of it, and return the milliseconds of a row of the table."""
    [long_prompt] = prompts(1, LONG)
    times: list[float] = []
    with serving(artifact) as (port, _):
        (reader, writer), other = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        body = {"prompt": long_prompt[:PROMPT], "max_tokens": STREAMED, "temperature": 0, "ignore_eos": True}
        send(writer, {**body, "stream": True})
        long_answer: asyncio.Task[Answer] | None = None
        began = 0
        while len(times) < STREAMED:
            if (await reader.readline()).startswith(b"data: {"):
                times.append(time.perf_counter())
            if len(times) == STREAMED // 4 and long_answer is None:
                began, long_answer = len(times), asyncio.create_task(stream(*other, long_prompt))
        assert long_answer
        first_s = (await long_answer).first_s
    gaps = np.diff(times) * 1e3
    beside = gaps[(np.array(times[1:]) > times[began - 1]) & (np.array(times[1:]) < times[began - 1] + first_s)]
    alone = gaps[1 : began - 1]
    figures = [np.median(alone), np.median(beside), np.percentile(beside, 99), beside.max(), first_s * 1e3]
    return [f"{figure:.1f}" for figure in figures]


def short_requests(artifact: Path) -> list[list[str]]:
    """Measure the server's memory while it answers many short requests."""
    rows, done = [], 0
    with serving(artifact) as (port, process):
        for part in (SHORT // 5, SHORT - SHORT // 5):
            asyncio.run(_ask(port, part, 8))
            done += part
            status = Path(f"/proc/{process}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+)", status)
            assert found
            rows.append([str(done), f"{int(found[1]) / 1024:.1f}"])
    return rows


async def _ask(port: int, count: int, clients: int) -> None:
    numbers = iter(range(count))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            send(writer, {"prompt": f"{number}", "max_tokens": 3, "temperature": 0})
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = re.search(rb"content-length: (\d+)", head)
            assert length
            await reader.readexactly(int(length[1]))
        writer.close()

    await asyncio.gather(*[client() for _ in range(clients)])


def send(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Write a POST to /v1/completions."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + content)


@contextmanager
def serving(artifact: Path) -> Iterator[tuple[int, int]]:
    """Run `limbeck serve` in its own process; gives its port and process id."""
    command = [f"{sysconfig.get_path('scripts')}/limbeck", "serve", str(artifact), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":(\d+)/v1", line)
        assert found, line
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait()


def prompts(count: int, length: int) -> list[list[int]]:
    """Distinct prompts: `length` token ids each, from Python source."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "quickstart/teacher/tokenizer.json"))
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text()
    ids = tokenizer.encode(source).ids
    step = (len(ids) - length) // count
    return [ids[start : start + length] for start in range(0, count * step, step)]


def make_llama(folder: Path, sizes: dict[str, int]) -> int:
    """Save a random Llama with the quickstart's tokenizer; return the number of its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "quickstart/teacher")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    more = {"max_position_embeddings": LONG + STREAMED, "tie_word_embeddings": True, "initializer_range": 0.05}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **ids, **more, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    main(*sys.argv[1:])
