"""Endpoints: a real `limbeck serve` in another process, directly and behind a proxy that fails."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from limbeck.evals.cost.measure import measure_costs
from limbeck.evals.cost.runner import TimingPlan
from limbeck.evals.engines.lazy import open_engine
from limbeck.evals.engines.lm_eval_model import LimbeckLM
from limbeck.evals.scores import scorecard
from limbeck.evals.scores.harness import score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog import endpoint
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput, Unreachable
from tests.conftest import Result
from tests.evals.task_files import questions, write_task
from tests.export.export_helpers import Served, serving

KEY = "k3y-of-the-test"
GENERATE = {"until": ["\n\n", "zzz"], "max_gen_toks": 9}


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tiny_llama_bos: Path) -> dict[str, Path]:
    return {"plain": tiny_llama, "bos": tiny_llama_bos}


@pytest.fixture(scope="module")
def servers(folders: dict[str, Path], onnx: Callable[[Path], Path]) -> Iterator[dict[str, Served]]:
    """`limbeck serve` of each folder's ONNX artifact, with an API key."""
    with serving(onnx(folders["plain"]), KEY) as plain, serving(onnx(folders["bos"]), KEY) as bos:
        yield {"plain": plain, "bos": bos}


@pytest.fixture
def served(servers: dict[str, Served]) -> Served:
    return servers["plain"]


@pytest.fixture(autouse=True)
def home(limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    return limbeck_home


class Flaky(ThreadingHTTPServer):
    """A proxy that fails: it handles the next POSTs as `script` lists, then forwards all, or fails after `dead_after`.

    Items of the script: "ok", a status, a status with Retry-After as "429:1", "drop" (close the connection before the
    answer), "cut" (in the middle of the answer).
    """

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = url
        self.script: list[str] = []
        self.dead_after: int | None = None  # fail after this number of successful POSTs
        self.change_choice: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice
        self.posts: list[tuple[float, str, dict[str, Any]]] = []  # time, action, request body
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def prompts(self) -> int:
        """The number of prompts that were answered, without the one that checks the tokenizer."""
        return sum(len(body["prompt"]) for _, action, body in self.posts if action == "ok") - 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that closed the connection is not an error."""


class Handler(BaseHTTPRequestHandler):
    server: Flaky

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(*self.forward("GET", None))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            answered = sum(action == "ok" for _, action, _ in self.server.posts)
            dead = self.server.dead_after is not None and answered >= self.server.dead_after
            action = "500" if dead else "ok"
            if self.server.script:
                action = self.server.script.pop(0)
            self.server.posts.append((time.monotonic(), action, json.loads(body)))
        if action == "drop":
            self.connection.close()
        elif action in ("ok", "cut"):
            status, answer = self.forward("POST", body)
            whole = json.loads(answer)
            whole["choices"] = [self.server.change_choice(choice) for choice in whole["choices"]]
            answer = json.dumps(whole).encode()
            self.answer(status, answer, cut=action == "cut")
        else:
            status, _, wait = action.partition(":")
            self.answer(int(status), json.dumps({"error": {"message": f"not now, {KEY}"}}).encode(), wait)

    def forward(self, method: str, body: bytes | None) -> tuple[int, bytes]:
        target = urlsplit(self.server.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
        connection.request(method, self.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def answer(self, status: int, body: bytes, retry_after: str = "", cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)


def without_logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice of a server that ignores requests for log-probabilities."""
    return choice | {"logprobs": None}


def without_new_token(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice of a server that generates no token after the prompt."""
    return choice | {"logprobs": {name: values[:-1] for name, values in choice["logprobs"].items()}}


@pytest.fixture
def flaky(served: Served) -> Iterator[Flaky]:
    server = Flaky(served.url)
    yield server
    server.shutdown()
    server.server_close()


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0, ("t", number, 1)) for number, each in enumerate(arguments)]


def pairs(prefix: str) -> list[tuple[str, str]]:
    """Empty, short and too long contexts; single tokens, several tokens, parts of characters, a repeated pair."""
    return [
        ("", "def add(a, b):"),
        ("def add(a, b):\n", "    return a + b"),
        ("def add(a, b):\n", "    return"),
        ("def add(a, b):\n", "    return"),
        ("The quick brown", " fox"),
        ("café ", "é"),
        (prefix + "x", "y"),
        ("for i in range(10):\n    print(i)\n" * 9, "print(i)"),
        ("x " * 90, " y z" * 20),
        *((f"{n} + {n} =", f" {2 * n}") for n in range(30)),
    ]


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_scores_and_texts_equal_those_of_hflm(name: str, folders: dict[str, Path], servers: dict[str, Served]) -> None:
    from lm_eval.models.huggingface import HFLM

    model = resolve_model(servers[name].url, tokenizer=str(folders[name]))
    engine = open_engine(model)
    assert engine.max_length == 126
    ours = LimbeckLM(engine, batch_tokens=300)
    theirs = HFLM(pretrained=str(folders[name]), device="cpu", dtype="float32", batch_size=1, max_length=126)

    requests = pairs("<s>" if name == "bos" else "<|endoftext|>")
    scores = ours.loglikelihood(instances("loglikelihood", requests))
    expected = theirs.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    assert np.allclose([score for score, _ in scores], [score for score, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]

    one_token = [(context, {"max_gen_toks": 1}) for context in ("def add(", "class A", "import", "The", "for i in")]
    likeliest = ours.generate_until(instances("generate_until", one_token))
    greedy_pairs = [(context, text) for (context, _), text in zip(one_token, likeliest, strict=True) if text.strip()]
    scores = ours.loglikelihood(instances("loglikelihood", greedy_pairs))
    expected = theirs.loglikelihood(instances("loglikelihood", greedy_pairs), disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in scores)  # above, all are False

    texts = [("def add(a, b):\n    return a + b\n" * repeats,) for repeats in (1, 4, 30)]
    rolling = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected_rolling = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert np.allclose(rolling, expected_rolling, atol=1e-3)  # a sum over 500 tokens

    prompts = [(context, dict(GENERATE)) for context, _ in requests[1:12]]
    assert ours.generate_until(instances("generate_until", prompts)) == theirs.generate_until(
        instances("generate_until", prompts), disable_tqdm=True
    )


def test_samples_of_one_prompt_differ(tiny_llama: Path, served: Served) -> None:
    lm = LimbeckLM(open_engine(resolve_model(served.url, tokenizer=str(tiny_llama))))
    requests = [("def add(", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8})] * 4
    assert len(set(lm.generate_until(instances("generate_until", requests)))) > 1


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    write_task(folder, "sums", questions(40))
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(folder, "say", [{"question": f"{n} + 1 =", "answer": f"{n + 1}"} for n in range(20)],
               output_type="generate_until", doc_to_choice=None, doc_to_target="{{answer}}", metric_list=match,
               generation_kwargs=dict(GENERATE))  # fmt: skip
    return folder


def run(limbeck: Callable[..., Result], *args: object, tasks: str = "sums,say") -> Result:
    return limbeck("eval", *args, "--tasks", tasks, "--include-path", "tasks", "--format", "json")


def test_an_endpoint_is_compared_with_the_model_that_it_serves(
    tmp_path: Path,
    tiny_llama: Path,
    onnx: Callable[[Path], Path],
    served: Served,
    limbeck: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tasks(tmp_path / "tasks")
    result = run(limbeck, served.url, "--tokenizer", tiny_llama, "--against", tiny_llama, "--no-cost")
    assert result.code == 0, result.err
    teacher, card = json.loads(result.out)
    assert card["model"] == f"{served.url}#{card['model'].partition('#')[2]}"
    for task in ("sums", "say"):
        assert card["tasks"][task]["value"] == teacher["tasks"][task]["value"]
        assert card["tasks"][task]["prompt_hash"] == teacher["tasks"][task]["prompt_hash"]
        assert card["relative"]["difference"][task]["value"] == 0
    assert KEY not in result.out + result.err
    plan = TimingPlan(prompt_tokens=8, new_tokens=4, rounds=3, batches=(1,), threads=1)
    monkeypatch.setattr(scorecard, "measure_costs", lambda models, **more: measure_costs(models, plan, **more))
    timed = run(limbeck, onnx(tiny_llama), "--tokenizer", tiny_llama, "--against", served.url, tasks="sums")
    assert "the cost of an endpoint cannot be measured" in timed.err
    teacher, card = json.loads(timed.out)
    assert teacher["cost"] is None
    assert card["cost"]["params"] > 0
    assert card["relative"]["cost_ratio"] is None


def test_temporary_failures_are_retried(tmp_path: Path, tiny_llama: Path, flaky: Flaky) -> None:
    folder = write_tasks(tmp_path / "tasks")
    local = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["sums", "say"], [folder]))
    flaky.script = ["503", "ok", "500", "drop", "cut", "ok", "429:0", "429", "ok", "502", "cut", "408"]
    model = resolve_model(flaky.url, tokenizer=str(tiny_llama), num_concurrent=3)
    scores = score_model(model, TaskSet.load(["sums", "say"], [folder]))
    assert flaky.script == []
    for ours, theirs in zip(scores.documents.to_pylist(), local.documents.to_pylist(), strict=True):
        assert np.allclose(ours.pop("choice_logprobs") or [], theirs.pop("choice_logprobs") or [], atol=1e-4)
        assert ours == theirs


def test_retry_after_is_respected(tmp_path: Path, tiny_llama: Path, flaky: Flaky) -> None:
    folder = write_tasks(tmp_path / "tasks")
    flaky.script = ["429:1"]
    model = resolve_model(flaky.url, tokenizer=str(tiny_llama), num_concurrent=1)
    score_model(model, TaskSet.load(["say"], [folder], limit=1))
    (first_time, first_action, body), (second_time, second_action, second_body) = flaky.posts
    assert (first_action, second_action, body) == ("429:1", "ok", second_body)
    assert second_time - first_time >= 1
    flaky.script = ["429:3600"]
    with pytest.raises(Unreachable, match="its Retry-After is 3600 s"):
        score_model(model, TaskSet.load(["say"], [folder], limit=2))


def test_a_run_resumes_after_its_endpoint_died(
    tmp_path: Path, tiny_llama: Path, flaky: Flaky, home: Path, limbeck: Callable[..., Result]
) -> None:
    write_tasks(tmp_path / "tasks")
    flaky.dead_after = 4
    command = (flaky.url, "--tokenizer", tiny_llama, "--no-cost", "--num-concurrent", 2)
    dead = run(limbeck, *command, tasks="sums")
    kept = flaky.prompts()
    assert 0 < kept < 80
    assert (dead.code, dead.out) == (2, "")
    assert f"cannot be used: 500 not now, ***; {kept} of 80 requests are answered and stored" in dead.err
    assert KEY not in dead.err
    assert not list(home.glob("scorecards-local/*/*"))
    flaky.dead_after = None
    flaky.posts.clear()
    alive = run(limbeck, *command, tasks="sums")
    assert alive.code == 0, alive.err
    assert flaky.prompts() == 80 - kept
    local = run(limbeck, tiny_llama, "--no-cost", tasks="sums")
    assert json.loads(alive.out)[0]["tasks"] == json.loads(local.out)[0]["tasks"]
    flaky.posts.clear()
    assert run(limbeck, *command, "--limit", 5, tasks="sums").code == 0
    assert flaky.posts == []


def test_generated_texts_are_cached_when_an_endpoint_dies(tmp_path: Path, tiny_llama: Path, flaky: Flaky) -> None:
    folder = write_tasks(tmp_path / "tasks")
    model = resolve_model(flaky.url, tokenizer=str(tiny_llama), num_concurrent=1)
    flaky.dead_after = 1
    with pytest.raises(Unreachable, match="8 of 20 requests are answered"):
        score_model(model, TaskSet.load(["say"], [folder]))
    flaky.dead_after = None
    score_model(model, TaskSet.load(["say"], [folder]))
    assert flaky.prompts() + 1 == 20


def test_a_server_that_generates_no_new_token_gives_the_same_scores(
    tiny_llama: Path, served: Served, flaky: Flaky
) -> None:
    flaky.change_choice = without_new_token
    requests = [("def add(a, b):\n", "    return a + b"), ("The quick brown", " fox")]
    ours, theirs = (
        LimbeckLM(open_engine(resolve_model(url, tokenizer=str(tiny_llama)))).loglikelihood(
            instances("loglikelihood", requests)
        )
        for url in (flaky.url, served.url)
    )
    assert ours == theirs


def test_an_endpoint_without_logprobs_can_generate(
    tmp_path: Path, tiny_llama: Path, flaky: Flaky, limbeck: Callable[..., Result]
) -> None:
    write_tasks(tmp_path / "tasks")
    flaky.change_choice = without_logprobs
    command = (flaky.url, "--tokenizer", tiny_llama, "--no-cost")
    assert run(limbeck, *command, tasks="say").code == 0
    result = run(limbeck, *command, tasks="sums")
    assert result.code == 2
    assert "gives no log-probabilities of the prompt" in result.err


def test_unusable_endpoints_are_reported(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_llama_bos: Path,
    served: Served,
    limbeck: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tasks(tmp_path / "tasks")
    secret = served.url.replace("http://", "http://me:pa55@")
    cases: list[tuple[list[object], str]] = [
        ([served.url], "is an endpoint, which has no files"),
        ([secret, "--tokenizer", tiny_llama], "no password or query"),
        ([secret], "is an endpoint, which has no files"),
        ([f"{served.url}#other", "--tokenizer", tiny_llama], "does not serve 'other'"),
        ([served.url.removesuffix("/v1"), "--tokenizer", tiny_llama], "404"),
        (["http://127.0.0.1:9/v1", "--tokenizer", tiny_llama], "cannot be used: connection refused"),
        ([served.url, "--tokenizer", tmp_path], "has no tokenizer"),
    ]
    for command, message in cases:
        result = run(limbeck, *command, "--no-cost")
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert "pa55" not in result.err
    assert limbeck("export", served.url).code == 2
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    result = run(limbeck, served.url, "--tokenizer", tiny_llama, "--no-cost")
    assert result.code == 2
    assert "refuses the API key" in result.err
    assert "wrong" not in result.err.replace("a wrong one", "")


def test_another_tokenizer_is_detected(tmp_path: Path, tiny_llama: Path, served: Served) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    changed = json.loads((other / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    lm = LimbeckLM(open_engine(resolve_model(served.url, tokenizer=str(other))))
    with pytest.raises(BadInput, match="has another tokenizer"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b")]))


def test_the_digest_covers_url_name_and_tokenizer(served: Served, flaky: Flaky, folders: dict[str, Path]) -> None:
    first = resolve_model(served.url, tokenizer=str(folders["plain"]))
    assert first.endpoint is not None
    again = resolve_model(f"{served.url}/completions#{first.endpoint.name}", tokenizer=str(folders["plain"]))
    assert (again.digest, again.label) == (first.digest, first.label)
    other_tokenizer = resolve_model(served.url, tokenizer=str(folders["bos"]))
    other_url = resolve_model(flaky.url, tokenizer=str(folders["plain"]))
    local = resolve_model(str(folders["plain"]))
    assert len({first.digest, other_tokenizer.digest, other_url.digest, local.digest}) == 4
