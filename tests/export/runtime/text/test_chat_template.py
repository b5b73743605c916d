"""Chat templates: rendered texts equal those of transformers, and hostile templates are stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from limbeck.export.runtime.text import chat_template
from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.registry.core.errors import BadInput
from tests.export.chat_artifacts import CHATML, ArtifactWithTemplate
from tests.export.export_helpers import Exported

# In the style of the models that they are named after.
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
    # Other features of templates: generation marks, loop controls, ranges, macros.
    "marked": (
        "{%- macro turn(m) -%}[{{ m.role }}]{%- endmacro -%}{% for i in range(messages | length) %}"
        "{% set m = messages[i] %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ turn(m) }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '-' * 3 }}{% endfor %}{{ messages[0] | tojson }}"
    ),
}
TURNS = [
    {"role": "user", "content": " What is <b>that</b> & \u00e9? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>A vessel."},
    {"role": "user", "content": "And 'this'?\n"},
]
SYSTEM = [{"role": "system", "content": "Be terse."}, *TURNS]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' `apply_chat_template`."""
    return {key: value for key, value in settings.items() if key != "settings"} | settings.get("settings", {})


def outcome(render: Any) -> Any:
    """The rendered text, or "refused"."""
    try:
        return render()
    except (BadInput, TemplateError, ValueError, TypeError):
        return "refused"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_text_equals_that_of_transformers(name: str, artifact_with_template: ArtifactWithTemplate) -> None:
    from transformers import AutoTokenizer

    folder = artifact_with_template(TEMPLATES[name], in_config=name == "zephyr")
    own, theirs = ChatTemplate.read(folder), AutoTokenizer.from_pretrained(folder)
    assert own is not None
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    refused = 0
    for turns in (TURNS, SYSTEM, TURNS[:1], SYSTEM[:3], [*TURNS, {"role": "assistant", "tool_calls": calls}]):
        for settings in (
            dict(add_generation_prompt=True),
            dict(add_generation_prompt=False),
            dict(add_generation_prompt=True, tools=TOOLS, settings={"thinking": True}),
            dict(add_generation_prompt=False, continue_final_message="tool_calls" not in turns[-1]),
        ):
            expected = outcome(lambda t=turns, s=settings: theirs.apply_chat_template(t, tokenize=False, **flat(s)))
            assert outcome(lambda t=turns, s=settings: own.render(t, **s)) == expected
            refused += expected == "refused"
    assert refused < 20


def test_a_model_can_have_a_template_for_tools(
    llama: Exported, artifact_with_template: ArtifactWithTemplate, tmp_path: Path
) -> None:
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
def test_a_hostile_template_is_stopped_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.3)
    start = time.monotonic()
    if "__" in source:  # forbidden names are undefined, and their attributes raise
        assert outcome(lambda: ChatTemplate({"default": source}, {}).render(TURNS)) in ("", "refused")
    else:
        with pytest.raises(BadInput, match="chat template"):
            ChatTemplate({"default": source}, {}).render(TURNS)
    assert time.monotonic() - start < 5
