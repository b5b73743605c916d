"""Options of `limbeck eval`: they act as in lm-eval, change the task hashes, and are refused if they cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limbeck.evals.scores.harness import score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput
from tests.conftest import Result, make_model
from tests.evals.task_files import questions, write_task

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
THINKING = CHAT.replace("<assistant>{% endif", "<assistant>{{ '<think>' if enable_thinking else '' }}{{ end }}{% endif")
SHOTS = {"fewshot_split": "test", "doc_to_text": "{{question}}", "target_delimiter": " "}
MATCH = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
GSM8K = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": None,
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 12},
    "metric_list": MATCH,
}


@pytest.fixture(autouse=True)
def home(limbeck_home: Path) -> Path:
    return limbeck_home


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A folder with the task `sums`: eight questions of two choices, also used as few-shot examples."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "sums", questions(8), **SHOTS)
    return folder


@pytest.fixture
def make_chat_model(tmp_path: Path, tokenizer_folder: Path) -> Callable[[Any], Path]:
    """A function that makes a model with these chat templates."""

    def make(template: Any) -> Path:
        from transformers import AutoTokenizer

        folder = make_model(tmp_path / "chat", tokenizer_folder, "llama", max_position_embeddings=300)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def prompts(model: Path, folder: Path, **settings: Any) -> list[str]:
    """The ends of the prompts of the task `sums`."""
    scores = score_model(resolve_model(str(model)), TaskSet.load(["sums"], [folder], **settings))
    return scores.documents["prompt_end"].to_pylist()


def test_prompts_and_scores_equal_those_of_lm_eval(sums: Path, make_chat_model: Callable[[Any], Path]) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = make_chat_model(CHAT)
    settings: dict[str, Any] = {"num_fewshot": 2, "system_instruction": "Be brief.", "apply_chat_template": True}
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    for multiturn in (True, False):
        scores = score_model(
            resolve_model(str(model)), TaskSet.load(["sums"], [sums], fewshot_as_multiturn=multiturn, **settings)
        )
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=["sums"],
            task_manager=TaskManager(include_path=str(sums), include_defaults=False),
            bootstrap_iters=0,
            fewshot_as_multiturn=multiturn,
            **settings,
        )
        assert results is not None
        theirs = results["samples"]["sums"]
        for ours, sample in zip(scores.documents.to_pylist(), theirs, strict=True):
            assert ours["prompt_hash"] == sample["prompt_hash"]
            assert ours["prompt_end"] == sample["arguments"][0][0][-300:]
            assert np.allclose(ours["choice_logprobs"], [logprob for logprob, _ in sample["filtered_resps"]], atol=1e-4)
        assert scores.documents["prompt_end"][0].as_py().count("<user>") == (3 if multiturn else 1)


def test_a_named_chat_template_is_used(sums: Path, make_chat_model: Callable[[Any], Path]) -> None:
    model = make_chat_model({"default": CHAT, "shout": CHAT.replace("<assistant>", "NOW!")})
    assert prompts(model, sums, apply_chat_template=True)[0].endswith("<user>0 + 1 =</user><assistant>")
    assert prompts(model, sums, apply_chat_template="shout")[0].endswith("<user>0 + 1 =</user>NOW!")
    with pytest.raises(BadInput, match="no chat template 'quiet'") as raised:
        prompts(model, sums, apply_chat_template="quiet")
    assert raised.value.fix == "it has default, shout"


def test_a_template_without_a_system_role_gets_no_system_message(
    sums: Path, make_chat_model: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made = prompts(make_chat_model(NO_SYSTEM), sums, apply_chat_template=True, system_instruction="Be brief.")
    assert made[0] == "<user>0 + 1 =</user><assistant>"
    assert capsys.readouterr().err.count("no system role): retrying without the system message") == 1


def test_variables_reach_the_chat_template_as_in_lm_eval(
    sums: Path, make_chat_model: Callable[[Any], Path], limbeck: Callable[..., Result]
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = make_chat_model(THINKING)
    rows = [{"question": f"{n} + {n}?", "answer": f"{2 * n}"} for n in range(4)]
    write_task(sums, "written", rows, **GSM8K)
    found = {}
    for thinks in (True, False):
        args = {"enable_thinking": thinks, "end": "now"}
        settings = {"apply_chat_template": True, "chat_template_args": args, "think_end": "</think>"}
        scores = score_model(resolve_model(str(model)), TaskSet.load(["written"], [sums], **settings))
        lm = HFLM(
            pretrained=str(model),
            device="cpu",
            dtype="float32",
            enable_thinking=thinks,
            think_end_token="</think>",
            chat_template_args={"end": "now"},
        )
        manager = TaskManager(include_path=str(sums), include_defaults=False)
        theirs = lm_eval.simple_evaluate(
            lm, tasks=["written"], task_manager=manager, bootstrap_iters=0, apply_chat_template=True
        )
        assert theirs is not None
        for ours, sample in zip(scores.documents.to_pylist(), theirs["samples"]["written"], strict=True):
            assert ours["prompt_hash"] == sample["prompt_hash"]
            assert ours["response"] == sample["resps"][0][0]
        found[thinks] = scores.documents["prompt_end"][0].as_py()
    assert found[True].endswith("<assistant><think>now")
    assert found[False].endswith("<assistant>now")
    given = ["--apply-chat-template", "--chat-template-args", '{"enable_thinking": true}', "--think-end", "</think>"]
    done = run(limbeck, model, sums, *given, tasks="written")
    assert done.code == 0
    assert "4 of 4 texts of written have no '</think>' within 12 tokens" in done.err
    refused = run(limbeck, model, sums, *given, tasks="sums")
    assert refused.code == 2
    assert "task sums: " not in refused.out
    assert "scored without generating" in refused.err


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_an_answer_begins_after_the_thoughts(
    tmp_path: Path, tiny_llama: Path, onnx: Callable[[Path], Path], engine: str
) -> None:
    write_task(tmp_path, "who", [{"question": "Who is there?", "answer": "1"}], **{**GSM8K, "doc_to_text": "question"})
    model = tiny_llama if engine == "torch" else onnx(tiny_llama)

    def response(think_end: str | None, *until: str) -> str:
        settings: dict[str, Any] = {"gen_kwargs": {"until": [*until], "max_gen_toks": 40}, "think_end": think_end}
        scores = score_model(resolve_model(str(model)), TaskSet.load(["who"], [tmp_path], **settings))
        return str(scores.documents["response"][0].as_py())

    whole = response(None, "no such text")  # such as "??????nnnnn  "
    change = len(whole) - len(whole.lstrip(whole[0]))
    end = whole[change - 1 : change + 1]
    thoughts, answer = whole.split(end)
    rest = answer.lstrip(answer[0])
    assert thoughts
    assert answer != rest != ""
    stops = thoughts[:2], rest[:1]  # the first occurs in the thoughts, where it ends nothing
    assert response(None, *stops) == ""
    assert response(end, *stops) == answer.removesuffix(rest)
    assert response("</think>", "no such text") == whole  # thoughts without an end, as in lm-eval


def test_thoughts_that_end_with_a_special_token(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    write_task(tmp_path, "gsm", [{"question": "Why?", "answer": "1"}], **{**GSM8K, "doc_to_text": "Why?"})

    def response(model: Path, think_end: str | None) -> str:
        tasks = TaskSet.load(["gsm"], [tmp_path], gen_kwargs={"until": ["no such text"]}, think_end=think_end)
        return str(score_model(resolve_model(str(model)), tasks).documents["response"][0].as_py())

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    whole = response(tiny_llama, None)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = next(token for at, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if at > 2 and token.isalpha())
    special = tmp_path / "special"
    shutil.copytree(tiny_llama, special)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.save_pretrained(special)
    assert end in whole
    assert end not in response(special, None)
    assert response(special, end) == whole.split(end)[-1].lstrip()


def test_each_setting_changes_the_hash_of_the_tasks_it_affects(sums: Path) -> None:
    rows = [{"question": f"{n}?", "answer": f"{n}"} for n in range(3)]
    write_task(sums, "answers", rows, fewshot_split="test", **GSM8K)

    def hashes(**settings: Any) -> dict[str, str]:
        return TaskSet.load(["sums", "answers"], [sums], **settings).task_hashes

    plain = hashes()
    assert hashes(confirm_run_unsafe_code=True, fewshot_as_multiturn=False) == plain
    several: list[dict[str, Any]] = [
        {"num_fewshot": 1},
        {"limit": 1},
        {"limit": 1, "limit_seed": 7},
        {"samples": {"sums": [1, 3], "answers": [0]}},
        {"apply_chat_template": True},
        {"apply_chat_template": "shout"},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"system_instruction": "Be brief."},
        {"apply_chat_template": True, "chat_template_args": {"style": 1}},
        {"think_end": "</think>"},
    ]
    made = [plain, *(hashes(**settings) for settings in several)]
    for task in ("sums", "answers"):
        assert len({each[task] for each in made}) == len(made)
    cooler = hashes(gen_kwargs={"max_gen_toks": 5})
    assert (cooler["sums"] == plain["sums"], cooler["answers"] == plain["answers"]) == (True, False)
    some = hashes(samples={"sums": [3, 1, 3]})
    assert (some["sums"], some["answers"]) == (made[4]["sums"], plain["answers"])


def test_samples_selects_documents(sums: Path, tiny_llama: Path, limbeck: Callable[..., Result]) -> None:
    all_rows = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["sums"], [sums])).documents.to_pylist()
    file = sums / "samples.json"
    file.write_text('{"sums": [6, 2]}')
    picked = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["sums"], [sums], samples={"sums": [6, 2]}))
    assert picked.documents.to_pylist() == [all_rows[2], all_rows[6]]
    for given in ('{"sums": [2, 6]}', file):
        ran = run(limbeck, tiny_llama, sums, "--samples", given, "--format", "json")
        assert json.loads(ran.out)[0]["tasks"]["sums"]["documents"] == 2


def run(limbeck: Callable[..., Result], model: Path, folder: Path, *options: object, tasks: str = "sums") -> Result:
    """Run `limbeck eval` on the tasks of a folder, without the cost."""
    return limbeck("eval", model, "--tasks", tasks, "--include-path", folder, "--no-cost", *options)


def test_options_that_cannot_work_are_refused(sums: Path, tiny_llama: Path, limbeck: Callable[..., Result]) -> None:
    write_task(sums, "code", questions(2), unsafe_code=True)
    wrong: list[tuple[str, list[object], str]] = [
        ("sums", ["--samples", '{"sums": [0, 8]}'], "samples of sums name document 8"),
        ("sums", ["--samples", '{"sums": [-1]}'], "samples of sums name document -1"),
        ("sums", ["--samples", '{"sums": []}'], "samples of sums name no documents"),
        ("sums", ["--samples", '{"sum": [0]}'], "samples name the task 'sum'"),
        ("sums", ["--samples", '{"sums": 3}'], "has the wrong form"),
        ("sums", ["--samples", '{"sums": [true]}'], "has the wrong form"),
        ("sums", ["--samples", "gone.json"], "neither JSON nor a JSON file"),
        ("sums", ["--samples", '{"sums": [0'], "neither JSON nor a JSON file"),
        ("sums", ["--samples", '{"sums": [0]}', "--limit", "2"], "cannot be combined"),
        ("sums", ["--fewshot-as-multiturn"], "give --apply-chat-template too"),
        ("sums", ["--apply-chat-template"], "has no chat template"),
        ("sums", ["--chat-template-args", '{"enable_thinking": false}'], "give --apply-chat-template too"),
        ("sums", ["--apply-chat-template", "--chat-template-args", "[1]"], "not a JSON object"),
        ("sums", ["--apply-chat-template", "--chat-template-args", "{"], "not JSON"),
        ("sums", ["--apply-chat-template", "--chat-template-args", '{"tokenize": true}'], "sets tokenize"),
        ("sums", ["--apply-chat-template", "--chat-template-args", '{"enable_thinking": true}'], "--think-end"),
        ("sums", ["--gen-kwargs", "temperature"], "a key without a value"),
        ("code", [], "--confirm-run-unsafe-code"),
    ]
    for tasks, options, message in wrong:
        result = run(limbeck, tiny_llama, sums, *options, tasks=tasks)
        assert (result.code, result.out) == (2, ""), options
        assert message in result.err
    assert run(limbeck, tiny_llama, sums, "--confirm-run-unsafe-code", tasks="code").code == 0


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_gsm8k_answers_end_at_a_stop_string(
    tmp_path: Path, tiny_llama: Path, onnx: Callable[[Path], Path], limbeck: Callable[..., Result], engine: str
) -> None:
    rows = [{"question": f"{n} hens lay {n} eggs. How many?", "answer": f"{n} * {n}\n#### {n * n}"} for n in range(5)]
    write_task(tmp_path, "gsm", rows, **GSM8K)
    model = tiny_llama if engine == "torch" else onnx(tiny_llama)

    def responses(**gen_kwargs: Any) -> list[str]:
        tasks = TaskSet.load(["gsm"], [tmp_path], gen_kwargs=gen_kwargs)
        return score_model(resolve_model(str(model)), tasks).documents["response"].to_pylist()

    whole = responses()
    stop = whole[0][2:4]
    assert responses(until=[stop])[0] == whole[0].split(stop)[0]
    shorter = responses(max_gen_toks=3)
    assert all(long.startswith(short) and short != long for short, long in zip(shorter, whole, strict=True))
    assert responses(do_sample=True, temperature=1.5) != whole
    ran = run(limbeck, model, tmp_path, "--gen-kwargs", "max_gen_toks=3", "--format", "json", tasks="gsm")
    assert json.loads(ran.out)[0]["tasks"]["gsm"]["documents"] == 5
    unknown = run(limbeck, model, tmp_path, "--gen-kwargs", "beam=3", tasks="gsm")
    assert unknown.code == 2
    assert "beam" in unknown.err
    assert run(limbeck, model, tmp_path, "--gen-kwargs", "max_gen_toks=500", tasks="gsm").code == 2


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(
    tmp_path: Path, tiny_llama: Path, limbeck: Callable[..., Result]
) -> None:
    texts = [{"question": "x y " * count, "choices": [" a", " b"], "label": 0} for count in (1, 90, 100)]
    write_task(tmp_path, "long", texts)
    write_task(tmp_path, "say", [{"question": "x y " * 90, "answer": "1"}], **GSM8K)
    result = run(limbeck, tiny_llama, tmp_path, tasks="long,say")
    assert result.code == 0
    warning = "requests of {} are longer than the context of 128 tokens and lost their beginning"
    assert f"4 of 6 {warning.format('long')}" in result.err
    assert f"1 of 1 {warning.format('say')}" in result.err
    again = run(limbeck, tiny_llama, tmp_path, "--samples", '{"long": [0]}', tasks="long")
    assert "lost their beginning" not in again.err


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_nan_is_refused_with_its_task_and_document(
    sums: Path, tmp_path: Path, tiny_llama: Path, home: Path, limbeck: Callable[..., Result], engine: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, but the logits overflow
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    if engine == "onnx":
        from limbeck.export.artifact.export import export_onnx

        export_onnx(broken, tmp_path / "out")
        broken = tmp_path / "out"
    write_task(sums, "say", [{"question": "1?", "answer": "1"}], **GSM8K)
    for task, *options in (["sums"], ["say"], ["say", "--gen-kwargs", "do_sample=true,temperature=1.0"]):
        result = run(limbeck, broken, sums, *options, tasks=task)
        assert (result.code, result.out) == (2, "")
        assert f"task {task}, document " in result.err
        assert "the model gives NaN" in result.err
    picked = run(limbeck, broken, sums, "--samples", '{"sums": [6]}')
    assert "task sums, document 6: " in picked.err
    assert not list(home.glob("scorecards-local/*/*"))
