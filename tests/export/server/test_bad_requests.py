"""Invalid and hostile requests: each gets an error in OpenAI's format, and the server keeps running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.export.export_helpers import Exported, Served, rewrite_manifest, serving

KEY = "k3y"
TEMPLATE = "{% if messages[0].content == 'boom' %}{{ 1 / 0 }}{% endif %}{{ messages | tojson }}"


@pytest.fixture(scope="module")
def served(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bad") / "fp32"
    shutil.copytree(llama.fp32, folder)
    Path(folder / "chat_template.jinja").write_text(TEMPLATE)
    rewrite_manifest(folder)
    with serving(folder, KEY) as running:
        yield running
        assert running.process.poll() is None


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=served.url.removesuffix("/v1"), headers=headers, timeout=30) as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer; checks its status and that it has OpenAI's format."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


def check_still_serving(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert answer.json()["usage"]["completion_tokens"] == 1


DEEP = 50_000
BODIES = {
    "no JSON": b"{nope",
    "no UTF-8": b'{"prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    "lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone surrogate as role": b'{"prompt": "\\ud800", "messages": [{"role": "\\ud800", "content": "x"}]}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"prompt":' * DEEP + b"1" + b"}" * DEEP,
    "deep within": b'{"prompt": 7, "messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    "deep prompt": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a huge number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}',
    "nothing": b"",
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "no prompt": b"{}",
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_an_invalid_body_is_refused(http: httpx.Client, name: str, path: str) -> None:
    refused(http.post(path, content=BODIES[name]))
    check_still_serving(http)


NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1",
    "1e30",
    '"many"',
    "[]",
    "{}",
    "1.5",
    str(2**63),
    str(-(2**70)),
]
BOUNDED = ["temperature", "top_p", "n", "max_tokens", "logprobs", "presence_penalty", "repetition_penalty", "min_p"]


@pytest.mark.parametrize("field", BOUNDED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_numbers_out_of_range_are_refused_by_name(http: httpx.Client, path: str, field: str) -> None:
    start = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    for number in NUMBERS:
        if number == "1.5" and field not in ("n", "max_tokens", "logprobs"):
            number = "2.5"
        if field == "presence_penalty":
            number = {"-1": "-2.5"}.get(number, number)
        body = json.dumps(start)[:-1] + f', "{field}": {number}}}'
        answer = http.post(path, content=body)
        if answer.status_code == 200:  # max_tokens beyond the context is limited to it
            assert field == "max_tokens"
            assert number in ("1e30", str(2**63))
        else:
            assert refused(answer)["param"] == field
    check_still_serving(http)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(http: httpx.Client) -> None:
    for path, request in (
        ("/v1/completions", {"prompt": [7] * 500}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\u00e9" * 500}]}),
    ):
        error = refused(http.post(path, json=request))
        assert error["code"] == "context_length_exceeded"
        assert "the context is 128 tokens; the prompt has" in error["message"]
    assert "has 500 and" in refused(http.post("/v1/completions", json={"prompt": [7] * 500}))["message"]
    # The prompt fills the context: no room for a new token.
    assert refused(http.post("/v1/completions", json={"prompt": [7] * 128}))["code"] == "context_length_exceeded"
    scored = http.post("/v1/completions", json={"prompt": [7] * 128, "max_tokens": 0, "echo": True, "logprobs": 0})
    assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == 128


@pytest.mark.parametrize("prompt", [[-1], [300], [2**70], [1.5], [True, "x"], [[1], "x"], [[]], [], [None]])
def test_invalid_token_ids_are_refused(http: httpx.Client, prompt: Any) -> None:
    assert refused(http.post("/v1/completions", json={"prompt": prompt}))["param"] == "prompt"
    check_still_serving(http)


def test_other_methods_content_types_and_paths_are_refused(http: httpx.Client) -> None:
    assert refused(http.get("/v1/chat/completions"), 405)["message"] == "Method Not Allowed"
    assert refused(http.get("/v1/nothing"), 404)["message"] == "Not Found"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(http.post("/v1/completions", content=b"prompt=x", headers=form))
    refused(http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}))
    check_still_serving(http)


def test_a_failing_chat_template_is_a_bad_request(http: httpx.Client) -> None:
    boom = {"messages": [{"role": "user", "content": "boom"}]}
    for extra in ({}, {"stream": True}, {"n": 5}):
        error = refused(http.post("/v1/chat/completions", json=boom | extra))
        assert error["message"] == "the chat template fails on these messages: ZeroDivisionError: division by zero"
    many = {"messages": [{"role": "user", "content": "x"}] * 10_000}
    assert refused(http.post("/v1/chat/completions", json=many))["code"] == "context_length_exceeded"
    check_still_serving(http)


def test_too_many_stop_strings_are_refused_and_long_ones_accepted(http: httpx.Client) -> None:
    for path, start in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [{"role": "user"}]})):
        error = refused(http.post(f"/v1/{path}", json=start | {"stop": [f"s{i}" for i in range(1000)]}))
        assert error["param"] == "stop"
        assert "16" in error["message"]
    long = {"prompt": "x", "stop": ["y" * 10**6] * 4, "max_tokens": 5, "temperature": 0}
    assert http.post("/v1/completions", json=long).json()["usage"]["completion_tokens"] == 5


def test_tokenize_and_detokenize_equal_transformers(http: httpx.Client, llama: Exported) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.torch)
    text = "def f():\n    caf\u00e9"
    encoded = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert encoded["tokens"] == tokenizer.encode(text)
    assert encoded["token_strs"] == tokenizer.tokenize(text)
    assert (encoded["count"], encoded["max_model_len"]) == (len(encoded["tokens"]), 128)
    assert http.post("/detokenize", json={"tokens": encoded["tokens"]}).json() == {"prompt": text}
    turns = [{"role": "user", "content": text}]
    chat_tokens = http.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": chat_tokens}).json()["prompt"] == json.dumps(
        turns, ensure_ascii=False
    )
    assert http.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    assert refused(http.post("/detokenize", json={"tokens": [300]}))["param"] == "tokens"
    assert refused(http.post("/tokenize", json={"prompt": "x", "messages": turns}))["param"] == "prompt"
    assert httpx.post(str(http.base_url.join("/tokenize")), json={"prompt": "x"}).status_code == 401


def test_models_lists_the_served_model(http: httpx.Client, llama: Exported) -> None:
    (entry,) = http.get("/v1/models").json()["data"]
    assert http.get("/v1/models/fp32").json() == entry
    assert (entry["id"], entry["max_model_len"], entry["version"]) == ("fp32", 128, "fp32")
    assert len(entry["digest"]) == 64
    assert refused(http.get("/v1/models/other/1"), 404)["code"] == "model_not_found"
