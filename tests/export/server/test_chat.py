"""Chat: templates held to transformers, and /v1/chat/completions through the real `openai` client."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from jinja2 import TemplateError

from limbeck.export.runtime import chat_template
from limbeck.export.runtime.chat_template import ChatTemplate
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import Exported, Served, rewrite_manifest, serving

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the manner of the models they are named after.
TEMPLATES = {
    "chatml": CHATML,
    "llama3": """{{- bos_token }}
{%- set date_string = strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
    ),
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(is_first=true, system_prompt='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{%- set ns.system_prompt = message['content'] %}{%- endif %}"
        "{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{'<\uff5cUser\uff5c>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<\uff5cAssistant\uff5c>' + content + eos_token}}{%- endif %}{%- endfor %}"
        "{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c>' + ('<think>\\n' if thinking else '')}}{% endif %}"
    ),
    # What else templates use: marked words, loop controls, ranges, macros.
    "marked": (
        "{%- macro turn(m) -%}[{{ m.role }}]{%- endmacro -%}{% for i in range(messages | length) %}"
        "{% set m = messages[i] %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ turn(m) }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '-' * 3 }}{% endfor %}{{ messages[0] | tojson }}"
    ),
}
BOS = "<|endoftext|>"
TURNS = [
    {"role": "user", "content": " What is <b>that</b> & \u00e9? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>A vessel."},
    {"role": "user", "content": "And 'this'?\n"},
]
SYSTEM = [{"role": "system", "content": "Be terse."}, *TURNS]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def with_template(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function to a copy of the fp32 artifact with a template: in a file of its own, or within the configuration.

    Its tokenizer puts a BOS token before each text, which the template does too.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    def make(template: Any, in_config: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("chat") / "fp32"
        shutil.copytree(llama.fp32, folder)
        tokenizer = AutoTokenizer.from_pretrained(llama.torch)
        tokenizer.bos_token = BOS
        begin = (BOS, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / "t", save_jinja_files=not in_config)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (folder / "t" / name).exists():
                shutil.copy(folder / "t" / name, folder)
        shutil.rmtree(folder / "t")
        rewrite_manifest(folder)
        return folder

    return make


def outcome(render: Any) -> Any:
    """What is rendered, or that it was refused."""
    try:
        return render()
    except (BadInput, TemplateError, ValueError, TypeError):
        return "refused"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_rendered_is_what_transformers_renders(name: str, with_template: Any) -> None:
    from transformers import AutoTokenizer

    folder = with_template(TEMPLATES[name], in_config=name == "zephyr")
    own, theirs = ChatTemplate.read(folder), AutoTokenizer.from_pretrained(folder)
    assert own is not None
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    refused = 0
    for turns in (TURNS, SYSTEM, TURNS[:1], SYSTEM[:3], [*TURNS, {"role": "assistant", "tool_calls": calls}]):
        for settings in (
            dict(add_generation_prompt=True),
            dict(add_generation_prompt=False),
            dict(add_generation_prompt=True, tools=TOOLS, thinking=True),
            dict(add_generation_prompt=False, continue_final_message="tool_calls" not in turns[-1]),
        ):
            expected = outcome(lambda t=turns, s=settings: theirs.apply_chat_template(t, tokenize=False, **s))
            assert outcome(lambda t=turns, s=settings: own.render(t, **s)) == expected
            refused += expected == "refused"
    assert refused < 20


def test_a_model_with_several_templates(llama: Exported, with_template: Any, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools[0].type }}"}]
    template = ChatTemplate({item["name"]: item["template"] for item in named}, {})
    assert template.render(TURNS) == "plain"
    assert template.render(TURNS, tools=TOOLS) == "with function"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "plain"}]}')
    read = ChatTemplate.read(tmp_path)
    assert read is not None
    assert read.render(TURNS) == "plain"
    assert ChatTemplate.read(llama.fp32) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.join.__globals__ }}",
        "{% set x = messages.append(1) %}",
        "{% include 'secret' %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 10**8 }}",
        "{{ 7 ** 99999999 }}",
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{{ 'spam' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_template_is_refused_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.3)
    start = time.monotonic()
    if "__" in source:  # what is not allowed is undefined, and its attributes an error
        assert outcome(lambda: ChatTemplate({"default": source}, {}).render(TURNS)) in ("", "refused")
    else:
        with pytest.raises(BadInput, match="chat template"):
            ChatTemplate({"default": source}, {}).render(TURNS)
    assert time.monotonic() - start < 5


@pytest.fixture(scope="module")
def served(with_template: Any) -> Iterator[Served]:
    with serving(with_template("{{ bos_token }}" + CHATML)) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


ASKED = [{"role": "user", "content": "def f"}]
PROMPT = "<|im_start|>user\ndef f<|im_end|>\n<|im_start|>assistant\n"


def ask(client: openai.OpenAI, messages: Any = ASKED, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": "fp32", "messages": messages, "temperature": 0} | settings)


def test_an_answer_is_the_runtimes_after_the_template(client: openai.OpenAI, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode(BOS + PROMPT, add_special_tokens=False).ids
    (expected,) = runtime.generate([ids], max_new_tokens=12)
    for length in (dict(max_tokens=12), dict(max_completion_tokens=12), dict(max_completion_tokens=12, max_tokens=3)):
        answer = ask(client, **length)
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        assert choice.finish_reason == expected.finish_reason
        assert answer.object == "chat.completion"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    parts = [{"role": "user", "content": [{"type": "text", "text": "def f"}]}]
    assert ask(client, parts, max_tokens=12).choices[0].message.content == expected.text


def test_without_a_length_the_context_is_the_limit(client: openai.OpenAI, runtime: Runtime) -> None:
    answer = ask(client, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == runtime.max_length
    assert answer.choices[0].finish_reason == "length"


def test_the_streamed_answer_is_the_whole_one(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = dict(
        max_tokens=20, temperature=1.2, seed=3, n=3, logprobs=True, top_logprobs=2, stop=["zz", "the"]
    )
    whole = ask(client, **settings)
    chunks = list(ask(client, **settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert all(part.delta.role is None for part in own[1:])
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        told = [entry for part in own if part.logprobs for entry in part.logprobs.content]
        assert told == choice.logprobs.content
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_logprobs_are_those_of_completions(client: openai.OpenAI) -> None:
    chat = ask(client, max_tokens=8, temperature=1.0, seed=5, logprobs=True, top_logprobs=3).choices[0].logprobs
    settings: dict[str, Any] = dict(model="fp32", max_tokens=8, temperature=1.0, seed=5)
    told = client.completions.create(prompt=PROMPT, logprobs=3, **settings).choices[0].logprobs
    assert [entry.token for entry in chat.content] == told.tokens
    assert [entry.logprob for entry in chat.content] == pytest.approx(told.token_logprobs, abs=1e-6)
    for entry, top in zip(chat.content, told.top_logprobs, strict=True):
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(top.values())
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    assert ask(client, max_tokens=2, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, max_tokens=2).choices[0].logprobs is None


def test_a_last_message_is_continued(client: openai.OpenAI, runtime: Runtime) -> None:
    turns = [*ASKED, {"role": "assistant", "content": "class A"}]
    ids = runtime.tokenizer.encode(BOS + PROMPT + "class A", add_special_tokens=False).ids
    (expected,) = runtime.generate([ids], max_new_tokens=6)
    answer = ask(client, turns, max_tokens=6, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(ids)


def test_what_changes_nothing_is_taken(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = dict(
        user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
        response_format={"type": "text"}, modalities=["text"], presence_penalty=0, logit_bias={}, tool_choice="auto",
    )  # fmt: skip
    assert ask(client, max_tokens=3, **neutral).choices == ask(client, max_tokens=3).choices


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (dict(messages=[]), "messages"),
        (dict(messages="hello"), "messages"),
        (dict(messages=[{"content": "x"}]), "messages"),
        (dict(messages=[{"role": 3, "content": "x"}]), "messages"),
        (dict(messages=[{"role": "user"}]), "messages"),
        (dict(messages=[{"role": "user", "content": {"text": "x"}}]), "messages"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages"),
        (dict(messages=[{"role": "user", "content": "spam " * 200}]), "messages"),
        (dict(messages=[{"role": "assistant", "content": None, "tool_calls": [1]}]), "messages"),
        (dict(top_logprobs=3), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=99), "top_logprobs"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_completion_tokens=-3), "max_completion_tokens"),
        (dict(tools="x"), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(response_format={"type": "json_object"}), "response_format"),
        (dict(n=129), "n"),
        (dict(extra_body={"chat_template": "x"}), "chat_template"),
        (dict(extra_body={"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (dict(extra_body={"continue_final_message": True, "add_generation_prompt": True}), "continue_final_message"),
        (dict(extra_body={"repetition_penalty": -1}), "repetition_penalty"),
        (dict(reasoning_effort="high"), "reasoning_effort"),
    ],
)
def test_a_bad_request_names_its_parameter(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **settings)
    assert refused.value.body["param"] == param
    assert refused.value.body["message"]
    assert ask(client, max_tokens=1).choices
