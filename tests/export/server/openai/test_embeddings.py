"""/v1/embeddings through the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from limbeck.export.runtime.embeddings import embed
from limbeck.export.runtime.runtime import Runtime
from tests.export.export_helpers import Exported, Served, serving

TEXTS = ["def add(", "class A", "x"]


@pytest.fixture(scope="module")
def served(llama: Exported) -> Iterator[Served]:
    with serving(llama.fp32, "", "--embeddings", "mean") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected(llama: Exported) -> list[np.ndarray]:
    runtime = Runtime.load(llama.fp32, threads=1, hidden_states=True)
    return [vector for text in TEXTS for vector in embed(runtime, runtime.encode(text), "mean") if vector is not None]


def test_texts_and_token_ids_in_both_encodings(
    client: openai.OpenAI, expected: list[np.ndarray], runtime: Runtime
) -> None:
    ids = [runtime.encode(text) for text in TEXTS]
    for given, vectors in ((TEXTS, expected), (TEXTS[0], expected[:1]), (ids, expected), (ids[1], expected[1:2])):
        for encoding in ({}, {"encoding_format": "float"}):  # the client asks for base64 by default
            answer = client.embeddings.create(model="fp32", input=given, **encoding)  # type: ignore[arg-type]
            assert [item.index for item in answer.data] == list(range(len(vectors)))
            for item, vector in zip(answer.data, vectors, strict=True):
                assert item.embedding == pytest.approx(vector, abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids[1])


def test_they_are_computed_while_others_are_decoded(client: openai.OpenAI, expected: list[np.ndarray]) -> None:
    stream = client.completions.create(model="fp32", prompt="def", max_tokens=100, stream=True)
    next(iter(stream))
    assert client.embeddings.create(model="fp32", input="x").data[0].embedding == pytest.approx(expected[2], abs=1e-6)
    assert sum(1 for _ in stream) > 0


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (dict(input=[]), "input"),
        (dict(input=[[]]), "input"),
        (dict(input="spam " * 200), "input"),
        (dict(input=[300]), "input"),
        (dict(input=["x"] * 2049), "input"),
        (dict(input="x", dimensions=3), "dimensions"),
        (dict(input="x", encoding_format="int8"), "encoding_format"),
    ],
)
def test_a_bad_request_names_its_parameter(client: openai.OpenAI, settings: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="fp32", **settings)
    body: Any = refused.value.body
    assert body["param"] == param


def test_they_are_off_unless_asked_for(llama: Exported) -> None:
    with serving(llama.fp32) as running:
        answer = httpx.post(f"{running.url}/embeddings", json={"input": "x"})
    assert answer.status_code == 400
    assert "--embeddings mean" in answer.json()["error"]["message"]
