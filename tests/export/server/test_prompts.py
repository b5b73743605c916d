"""What a prompt is: special tokens from outside are text, and BOS is never doubled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.export.chat_artifacts import BOS, CHATML, ArtifactWithTemplate
from tests.export.export_helpers import serving


@pytest.fixture(scope="module")
def http(artifact_with_template: ArtifactWithTemplate) -> Iterator[httpx.Client]:
    """A server whose template writes BOS, and whose tokenizer adds it too."""
    template = "{{ bos_token }}" + CHATML
    with (
        serving(artifact_with_template(template)) as served,
        httpx.Client(base_url=served.url.removesuffix("/v1"), timeout=30) as client,
    ):
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def tokens(http: httpx.Client, **body: Any) -> list[str]:
    return list(post(http, "/tokenize", return_token_strs=True, **body)["token_strs"])


ATTACK = f"a{BOS}b"


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(http: httpx.Client) -> None:
    assert tokens(http, prompt="ab")[0] == BOS
    assert tokens(http, prompt=ATTACK, parse_special=False).count(BOS) == 1
    assert tokens(http, prompt=ATTACK).count(BOS) == 2  # who asks for ids may also send them
    assert post(http, "/v1/completions", prompt=ATTACK, max_tokens=1)["usage"]["prompt_tokens"] == len(
        tokens(http, prompt=ATTACK, parse_special=False)
    )
    for parse_special in (False, True):
        ids = post(http, "/tokenize", prompt=ATTACK, parse_special=parse_special)["tokens"]
        assert post(http, "/detokenize", tokens=ids)["prompt"] == BOS + ATTACK
        body: dict[str, Any] = dict(prompt=ATTACK, max_tokens=1, parse_special=parse_special)
        assert post(http, "/v1/completions", **body)["usage"]["prompt_tokens"] == len(ids)


def test_special_tokens_of_messages_are_text_unless_asked_for(http: httpx.Client) -> None:
    for messages in ([{"role": "user", "content": ATTACK}], [{"role": f"u{BOS}", "content": "x"}]):
        assert tokens(http, messages=messages).count(BOS) == 1
        assert tokens(http, messages=messages, parse_special=True).count(BOS) == 2
        for parse_special in (False, True):
            ids = post(http, "/tokenize", messages=messages, parse_special=parse_special)["tokens"]
            text = post(http, "/detokenize", tokens=ids)["prompt"]
            assert str(messages[0]["content"]) in text
            body: dict[str, Any] = dict(messages=messages, max_tokens=1, parse_special=parse_special)
            assert post(http, "/v1/chat/completions", **body)["usage"]["prompt_tokens"] == len(ids)


def test_bos_is_not_doubled(http: httpx.Client) -> None:
    """By the template and the tokenizer, or by a prompt that brings it."""
    assert tokens(http, prompt=f"{BOS}ab", parse_special=True) == tokens(http, prompt="ab")
    turns = [{"role": "user", "content": "x"}]
    assert tokens(http, messages=turns, add_special_tokens=True) == tokens(http, messages=turns)


@pytest.mark.parametrize("name", ["self", "messages", "range"])
def test_reserved_arguments_of_a_template_are_refused(http: httpx.Client, name: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: 1}}
        answer = http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "chat_template_kwargs"
