"""lm-eval's own `local-completions` with a running `limbeck serve` gives the scores of `limbeck eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from tests.evals.task_files import questions, write_task
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


def run_lm_eval(model: Path, folder: Path, url: str, **arguments: Any) -> dict[str, Any]:
    """lm-eval's results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    served = {"model": model.name, "base_url": f"{url}/completions", "max_length": CONTEXT, "num_concurrent": 4}
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=served | arguments,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
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
