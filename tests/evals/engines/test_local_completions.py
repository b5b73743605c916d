"""lm-eval's own `local-completions` and `local-chat-completions` with a running `limbeck serve`.

The former gives the scores of `limbeck eval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from tests.evals.task_files import questions, write_task
from tests.export.chat_artifacts import CHATML, copy_with_template
from tests.export.export_helpers import serving

pytest.importorskip("tenacity", reason="lm-eval's local-completions needs tenacity")

TASKS = ["live_choice", "live_bits", "live_line"]
CONTEXT = 128  # of the model; every document fits, so nothing is cut


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks: choices with common prefixes, log-probabilities of whole texts, and generated text."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "live_choice", questions(8))
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    texts = [{"text": f"def café_{n}(x):\n    return x + {n}\n"} for n in range(6)]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(folder, "live_bits", texts, **rolling, doc_to_choice=None, metric_list=[bits])
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    settings = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0}
    generated = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": settings}
    write_task(folder, "live_line", questions(4), **generated, doc_to_target="{{label}}", metric_list=[exact])
    return folder


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_llama_bos"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def offline(model: Path, folder: Path, onnx: Callable[[Path], Path]) -> Scores:
    return score_model(resolve_model(str(onnx(model))), TaskSet.load(TASKS, [folder]))


@pytest.fixture(scope="module")
def url(model: Path, onnx: Callable[[Path], Path]) -> Iterator[str]:
    with serving(onnx(model)) as served:
        yield served.url


def test_the_scores_of_the_running_server_equal_those_of_the_artifact(
    model: Path, folder: Path, offline: Scores, url: str
) -> None:
    with_bos = model.name.startswith("llama-bos")
    check_scores(
        run_lm_eval(model, folder, url, tokenizer_backend="huggingface", tokenizer=str(model), add_bos_token=with_bos),
        offline,
    )
    if not with_bos:  # lm-eval adds no BOS to what it lets the server tokenize
        check_scores(run_lm_eval(model, folder, url, tokenizer_backend="remote"), offline)


def test_local_chat_completions_get_the_servers_answers(
    tiny_llama: Path, folder: Path, onnx: Callable[[Path], Path], tmp_path: Path
) -> None:
    with serving(copy_with_template(onnx(tiny_llama), tiny_llama, tmp_path / "chat", CHATML)) as served:
        url = f"{served.url}/chat/completions"
        chat: dict[str, Any] = dict(model="local-chat-completions", tasks=["live_line"], apply_chat_template=True)
        results = evaluate(folder, {"model": "chat", "base_url": url, "num_concurrent": 2}, **chat)
        for sample in results["samples"]["live_line"]:
            body = {"messages": [{"role": "user", "content": sample["doc"]["question"]}], "stop": ["\n\n"]}
            answer = httpx.post(url, json=body | {"max_tokens": 9, "temperature": 0}).json()
            assert sample["resps"] == [[answer["choices"][0]["message"]["content"]]]


def run_lm_eval(model: Path, folder: Path, url: str, **arguments: Any) -> dict[str, Any]:
    """lm-eval's results."""
    served = {"model": model.name, "base_url": f"{url}/completions", "max_length": CONTEXT, "num_concurrent": 4}
    return evaluate(folder, served | arguments, model="local-completions", tasks=TASKS, batch_size=4)


def evaluate(folder: Path, model_args: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """lm-eval's results with the tasks in `folder`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model_args=model_args, task_manager=tasks, bootstrap_iters=0, **settings)
    assert results is not None
    return results


def check_scores(results: dict[str, Any], offline: Scores) -> None:
    for name, result in offline.tasks.items():
        assert results["results"][name][f"{result.metric},none"] == pytest.approx(result.value, abs=1e-5)
    ours = {(row["task"], row["doc_id"]): row for row in offline.documents.to_pylist()}
    theirs = {(name, row["doc_id"]): row for name, rows in results["samples"].items() for row in rows}
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        sample = theirs[key]
        assert row["prompt_hash"] == sample["prompt_hash"]
        if key[0] == "live_choice":
            assert row["choice_logprobs"] == pytest.approx([logprob for ((logprob, _),) in sample["resps"]], abs=1e-4)
        elif key[0] == "live_line":
            assert row["response"] == sample["resps"][0][0]
        else:
            nats, size = sample["bits_per_byte"]
            assert (row["value"], row["weight"]) == pytest.approx((-nats / size / math.log(2), size), abs=1e-5)
