"""The whole surface, fuzzed against the OpenAPI document that the server publishes: nothing but 2xx and 4xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.export.chat_artifacts import CHATML, ArtifactWithTemplate
from tests.export.export_helpers import Served, serving


@pytest.fixture(scope="module")
def served(artifact_with_template: ArtifactWithTemplate) -> Iterator[Served]:
    with serving(artifact_with_template(CHATML), "", "--max-new-tokens", 16) as running:
        yield running
        assert running.process.poll() is None


def make_likely(body: Any) -> None:
    """Change a random body into one of this model and with messages of text, so that it is not refused for these."""
    if isinstance(body, dict):
        body.pop("model", None)
        for message in body.get("messages") or []:
            message |= {"role": "user", "content": str(message)[:30]}


EXAMPLES = {GenerationMode.POSITIVE: 25, GenerationMode.NEGATIVE: 12}  # of each route with a body


@pytest.mark.parametrize("mode", GenerationMode)
def test_any_request_is_answered_or_refused(served: Served, mode: GenerationMode) -> None:
    """Of requests that fit the document ("positive") and of others ("negative")."""
    document = schemathesis.openapi.from_url(served.url.replace("/v1", "/openapi.json"))
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing to get wrong

        @given(operation.as_strategy(mode))
        @settings(
            max_examples=EXAMPLES[mode] if operation.method == "post" else 3, suppress_health_check=list(HealthCheck)
        )
        def check(case: Any) -> None:
            if mode == GenerationMode.POSITIVE:
                make_likely(case.body)
            answer = case.call(timeout=60)
            assert answer.status_code // 100 in (2, 4), answer.text
            assert "server_error" not in answer.text  # in a stream
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["message"]

        check()


def test_the_document_lists_the_whole_surface(served: Served) -> None:
    paths = httpx.get(served.url.replace("/v1", "/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize"} <= set(paths)
    assert "4XX" in paths["/v1/completions"]["post"]["responses"]
