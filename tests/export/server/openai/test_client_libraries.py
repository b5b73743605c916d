"""LiteLLM and LangChain's classes, each in a process of its own, with a running server.

lm-eval's classes are tested in tests/evals/engines/test_local_completions.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.export.chat_artifacts import CHATML, copy_with_template
from tests.export.export_helpers import Served, serving

TOOL = {
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rom", "Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

LITELLM = """
import litellm
litellm.suppress_debug_info = True
settings = dict(api_base=url, api_key="none", temperature=0)
chat = dict(model="openai/fp32", messages=[{"role": "user", "content": "def f"}], max_tokens=300, **settings)
tools = dict(tools=[{"type": "function", "function": tool}], tool_choice="required", parallel_tool_calls=False)
schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": tool["parameters"], "strict": True}}
answer = litellm.completion(**chat)
chunks = list(litellm.completion(**chat, stream=True))
calls = litellm.completion(**chat, **tools)
streamed = litellm.stream_chunk_builder(list(litellm.completion(**chat, **tools, stream=True)))
try:
    litellm.completion(**{**chat, "max_tokens": 0})
except litellm.BadRequestError as error:
    refused = str(error)
found = {
    "text": answer.choices[0].message.content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    "call": calls.choices[0].message.tool_calls[0].function.model_dump(),
    "streamed_call": streamed.choices[0].message.tool_calls[0].function.model_dump(),
    "json": litellm.completion(**chat, response_format=schema).choices[0].message.content,
    "completion": litellm.text_completion("def f", "text-completion-openai/fp32", max_tokens=8, **settings)
    .choices[0].text,
    "refused": "max_tokens" in refused,
}
"""

LANGCHAIN = """
from typing import Literal
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

class weather(BaseModel):
    "Weather of a city."
    model_config = ConfigDict(extra="forbid")
    city: Literal["Rom", "Bern"]

settings = dict(model="fp32", base_url=url, api_key="none", temperature=0)
chat = ChatOpenAI(**settings, max_tokens=300, model_kwargs={"parallel_tool_calls": False})
plain = ChatOpenAI(**settings, max_tokens=300)
calling = chat.bind_tools([weather], tool_choice="any")
call = calling.invoke("def f")
streamed = None
for chunk in calling.stream("def f"):
    streamed = chunk if streamed is None else streamed + chunk
result = ToolMessage("sunny", tool_call_id=call.tool_calls[0]["id"])
found = {
    "text": plain.invoke("def f").content,
    "streamed": "".join(chunk.content for chunk in plain.stream("def f")),
    "call": {"name": call.tool_calls[0]["name"], "arguments": call.tool_calls[0]["args"]},
    "streamed_call": {"name": streamed.tool_calls[0]["name"], "arguments": streamed.tool_calls[0]["args"]},
    "json": plain.with_structured_output(weather, method="json_schema").invoke("def f").model_dump(),
    "by_call": plain.with_structured_output(weather, method="function_calling").invoke("def f").model_dump(),
    "completion": OpenAI(**settings, max_tokens=8).invoke("def f"),
    "after_call": len(plain.invoke([("user", "def f"), call, result]).content) > 0,
}
"""


@pytest.fixture(scope="module")
def served(boundless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients") / "fp32"
    with serving(copy_with_template(boundless, boundless.parent / "torch", folder, CHATML)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, Any]:
    """The greedy answers over plain HTTP."""
    body = {"messages": [{"role": "user", "content": "def f"}], "max_tokens": 300, "temperature": 0}
    chat = httpx.post(f"{served.url}/chat/completions", json=body).json()
    completion = httpx.post(
        f"{served.url}/completions", json={"prompt": "def f", "max_tokens": 8, "temperature": 0}
    ).json()
    return {"text": chat["choices"][0]["message"]["content"], "completion": completion["choices"][0]["text"]}


def run_client(script: str, url: str) -> dict[str, Any]:
    """What `script` leaves in `found`, run in a new process without access to the network."""
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    code = f"url, tool = {url!r}, {TOOL!r}\n{script}\nimport json\nprint(json.dumps(found))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_litellm(served: Served, expected: dict[str, Any]) -> None:
    found = run_client(LITELLM, served.url)
    assert found["text"] == found["streamed"] == expected["text"]
    assert found["call"] == found["streamed_call"]
    assert found["call"]["name"] == "weather"
    assert json.loads(found["call"]["arguments"])["city"] in ("Rom", "Bern")
    assert json.loads(found["json"])["city"] in ("Rom", "Bern")
    assert found["completion"] == expected["completion"]
    assert found["refused"]


def test_langchain(served: Served, expected: dict[str, Any]) -> None:
    found = run_client(LANGCHAIN, served.url)
    assert found["text"] == found["streamed"] == expected["text"]
    assert found["call"] == found["streamed_call"]
    assert found["call"]["name"] == "weather"
    cities = [found["call"]["arguments"]["city"], found["json"]["city"], found["by_call"]["city"]]
    assert all(city in ("Rom", "Bern") for city in cities)
    assert found["completion"] == expected["completion"]
    assert found["after_call"]
