"""Whether the giant is a waste: real scorecards and documents in a real store, judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from scipy.stats import t as student

from limbeck.evals.cost.measure import median_estimate
from limbeck.evals.cost.prices import ApiEntry, Prices
from limbeck.evals.stats.noninferiority import Margins, holm_adjusted_p_values
from limbeck.evals.stats.retention import compare_with_teacher, mean_and_stderr
from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA
from limbeck.evals.verdict.decide import decide_verdict
from limbeck.evals.verdict.page import render_html, render_markdown
from limbeck.evals.verdict.records import Candidate, VerdictReport
from limbeck.registry.core.digest import write_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.runs import TRAINING_COST_TAG
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import BatchCost, Cost, NewVersion, Relative, Scorecard, TaskResult, TrainingCost, Version

DOCUMENTS = 2000
MS = [100.0, 101, 99, 100, 102, 98]  # the teacher's requests
WIDE = Margins(default=0.02)

TRAINING_COST = TrainingCost(training_seconds=3600, tokens=10, machine="a test machine, 2 cores")

Scores = dict[str, np.ndarray]
Add = Callable[..., Version]


def wrong(documents: int, lost: int, won: int = 0) -> np.ndarray:
    """The teacher's answers to `documents`, but for `lost` that become wrong and `won` that become right."""
    right = np.arange(documents) % 5 > 0  # 80%
    answers = right.astype(float)
    answers[np.flatnonzero(right)[:lost]] = 0
    answers[np.flatnonzero(~right)[:won]] = 1
    return answers


def table(scores: Scores, one_group: Sequence[str] = ()) -> pa.Table:
    """The documents of tasks; those of `one_group` are all of one file."""
    rows = [
        {
            "task": task,
            "doc_id": number,
            "doc_hash": f"{task}{number}",
            "prompt_hash": f"{task}{number}",
            "metric": "bits_per_byte" if task.startswith("bits") else "acc",
            "value": float(value),
            "weight": 1.0,
            "cluster": task if task in one_group else f"{task}{number}",
        }
        for task, values in scores.items()
        for number, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, DOCUMENT_SCHEMA)


def results(scores: Scores) -> dict[str, TaskResult]:
    found = {}
    for task, values in scores.items():
        value, stderr = mean_and_stderr(values, np.ones(len(values)), np.arange(len(values)))
        bits = task.startswith("bits")
        found[task] = TaskResult(
            metric="bits_per_byte" if bits else "acc",
            value=value,
            stderr=stderr,
            higher_is_better=not bits,
            documents=len(values),
            chance=8.0 if bits else 0.25,
            task_hash=task,
            prompt_hash=task,
        )
    return found


def cost(factor: float, **changes: Any) -> Cost:
    """Requests of batch 1 and of batch 8 that take `factor` times as long as the teacher's."""
    loads = tuple(
        BatchCost(
            batch=batch,
            request_ms=tuple(factor * ms for ms in MS),
            prefill_tokens_per_s=1e3,
            decode_tokens_per_s=500.0,
            p50_ms=100 * factor,
            p95_ms=110 * factor,
            usd_per_million_tokens=100 * factor / 3.6e6 / (128 * batch) * 1e6,
            peak_rss_bytes=10**8,
        )
        for batch in (1, 8)
    )
    fields: dict[str, Any] = {
        "params": 10**6,
        "disk_bytes": 4 * 10**6,
        "requests": len(MS),
        "usd_per_hour": 1.0,
        "prompt_tokens": 64,
        "new_tokens": 64,
        "threads": 2,
        "machine": "a test machine, 2 cores; torch 2",
        "protocol": 2,
        "run": "r",
        "loads": loads,
        **loads[0].model_dump(exclude={"batch", "request_ms"}),
    }
    return Cost(**fields | changes)


NOISE = np.array([1, 1.01, 0.99, 1, 1.01, 0.99])  # of a candidate's rounds


@pytest.fixture
def add(store: Store, tmp_path: Path) -> Add:
    """Register another version of m, scored; the first one is the teacher of the others.

    Its parameters are the version's answers and its cost as a factor of the teacher's. Options: `alone` for a
    scorecard without a teacher, `card` for other fields of the scorecard, `training_cost` for what making it took,
    `one_group` for the tasks whose documents are all of one file.
    """
    first: list[tuple[str, str, Scores]] = []

    def relative(scores: Scores, factor: float | None) -> Relative:
        label, digest, theirs = first[0]
        found = compare_with_teacher(table(scores), table(theirs), results(theirs))
        ratio = median_estimate(factor * NOISE) if factor else None
        return Relative(
            teacher=label,
            teacher_digest=digest,
            retention=found.retention,
            task_retention=found.task_retention,
            difference=found.difference,
            cost_ratio=factor,
            speedup=1 / factor if factor else None,
            cost_ratio_interval=ratio,
            teacher_cost=cost(1.0) if ratio else None,
        )

    def run(scores: Scores | None = None, factor: float | None = None, name: str = "m", **fields: Any) -> Version:
        alone, one_group = fields.pop("alone", False), fields.pop("one_group", ())
        changes, training_cost = fields.pop("card", {}), fields.pop("training_cost", None)
        if training_cost:
            with store.runs.start("train") as training:
                store.client.set_tag(training.id, TRAINING_COST_TAG, training_cost.model_dump_json())
            fields["run_id"] = training.id
        folder = tmp_path / f"{name}-{len(store.versions(name))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        version = store.register(NewVersion(name=name, **{"kind": "student", **fields}), folder)
        if scores is None:
            return version
        parquet.write_table(table(scores, one_group), tmp_path / "documents.parquet")
        card_fields: dict[str, Any] = {
            "artifact": version.digest,
            "model": version.ref,
            "tasks": results(scores),
            "tasks_digest": "+".join(scores),
            "prompts_digest": "+".join(scores),
            "harness": "lm-eval 0",
            "created": datetime(2026, 1, version.version, tzinfo=UTC),
            "cost": cost(factor) if factor else None,
            "relative": relative(scores, factor) if first and not alone else None,
        }
        store.findings.add_scorecard(
            version, Scorecard.model_validate(card_fields | changes), tmp_path / "documents.parquet"
        )
        first.append((version.ref, version.digest, scores))
        return version

    return run


def teacher_of(add: Add, tasks: Sequence[str] = ("qa",)) -> Version:
    return add({task: wrong(DOCUMENTS, 0) for task in tasks}, 1.0, kind="teacher")


def candidate(judgement: VerdictReport, version: Version) -> Candidate:
    return next(each for each in judgement.candidates if each.version == version.ref)


def test_yes(store: Store, add: Add) -> None:
    teacher_of(add)
    dear = add({"qa": wrong(DOCUMENTS, 4, 4)}, 0.5, recipe="base")
    cheap = add({"qa": wrong(DOCUMENTS, 6, 4)}, 0.2, recipe="small")
    bad = add({"qa": wrong(DOCUMENTS, 200)}, 0.1, recipe="tiny")
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate, found.teacher) == ("yes", cheap.ref, "m/1")
    # As good first, the cheapest of them first.
    assert [(each.version, each.quality) for each in found.candidates] == [
        (cheap.ref, "pass"),
        (dear.ref, "pass"),
        (bad.ref, "fail"),
    ]
    best = candidate(found, cheap)
    [task] = best.tasks
    assert task.difference.value == pytest.approx(-2 / DOCUMENTS)
    assert task.noninferiority.margin == 0.02
    assert best.retention
    assert best.retention.value == pytest.approx((0.8 - 0.001 - 0.25) / 0.55)
    assert found.next_steps == ()
    assert (found.tests, found.default_margins, found.margins) == (3, False, {"qa": 0.02})
    assert found.sentence.startswith(
        f"small torch ({cheap.ref}) is as good as m/1 within the margins on qa, at 20.0% [19.8%, 20.2%] of its cost "
        "and 5.0 times its speed."
    )
    assert VerdictReport.model_validate_json(found.model_dump_json()) == found


def test_the_best_that_is_as_good_has_to_be_cheaper(store: Store, add: Add) -> None:
    teacher_of(add)
    same = add({"qa": wrong(DOCUMENTS, 0)}, 1.2)
    add({"qa": wrong(DOCUMENTS, 400)}, 0.1)
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate) == ("no", same.ref)
    assert candidate(found, same).cheaper is False
    assert "as good as m/1 within the margins, but not cheaper: 120.0% [118.8%, 121.2%] of its cost" in found.sentence
    # Where the rounds do not tell which is cheaper, nobody knows.
    add({"qa": wrong(DOCUMENTS, 0)}, 0.999)
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate) == ("not settled", "m/4")
    assert "which may not be less than the teacher's" in found.sentence
    [words] = found.next_steps
    assert words.startswith("Measure its cost again on an idle machine: limbeck eval m/4 ")


def test_no(store: Store, add: Add) -> None:
    teacher_of(add, ["qa", "more"])
    add({"qa": wrong(DOCUMENTS, 0), "more": wrong(DOCUMENTS, 300)}, 0.1)
    best = add({"qa": wrong(DOCUMENTS, 200), "more": wrong(DOCUMENTS, 0)}, 0.2, recipe="base")
    found = decide_verdict(store, "m")
    # One task that it surely fails is enough, and what it costs is not asked.
    assert (found.answer, found.candidate, found.next_steps) == ("no", best.ref, ())
    assert [task.noninferiority.verdict for task in candidate(found, best).tasks] == ["fail", "pass"]
    assert "each of the 2 candidates is surely worse than m/1 by more than the margin on some task" in found.sentence
    assert "The closest, base torch (m/3), retains 90.9% [" in found.sentence
    # The tasks that it is judged by make the difference.
    assert decide_verdict(store, "m", tasks=["more"]).answer == "yes"


def test_what_would_settle_it_does(store: Store, add: Add) -> None:
    add({"qa": wrong(300, 0)}, 1.0, kind="teacher")
    add({"qa": wrong(300, 6, 4)}, 0.2)
    found = decide_verdict(store, "m")
    assert (found.answer, found.default_margins) == ("not settled", True)
    [words] = found.next_steps
    documents, margin = re.search(r"About ([\d,]+) documents .* Or accept a wider margin of ([\d.]+), ", words).groups()
    assert int(documents.replace(",", "")) > 2000
    assert "would settle it and show it as good" in words
    assert decide_verdict(store, "m", margins=Margins(default=float(margin))).answer == "yes"
    assert decide_verdict(store, "m", margins=Margins(default=0.95 * float(margin))).answer == "not settled"
    # That many documents with the same difference.
    many = int(documents.replace(",", ""))
    add({"qa": wrong(many, 0)}, 1.0, name="n", kind="teacher", alone=True)
    add({"qa": wrong(many, many * 6 // 300, many * 4 // 300)}, 0.2, name="n", teacher="n/1", alone=True)
    [settled] = decide_verdict(store, "n", against="n/1").candidates
    assert settled.quality == "pass"


def test_the_correction_is_over_candidates_too(store: Store, add: Add) -> None:
    add({"qa": wrong(400, 0)}, 1.0, kind="teacher")
    close = add({"qa": wrong(400, 4, 2)}, 0.2)
    allowed = Margins(default=0.025)
    alone = decide_verdict(store, "m", margins=allowed)
    assert (alone.answer, alone.tests) == ("yes", 1)
    for _ in range(3):
        add({"qa": wrong(400, 7)}, 0.3)
    found = decide_verdict(store, "m", margins=allowed)
    [task] = candidate(found, close).tasks
    assert (found.answer, found.candidate, found.tests) == ("not settled", close.ref, 4)
    assert (task.noninferiority.uncorrected, task.noninferiority.verdict) == ("pass", "inconclusive")
    p_values = [each.tasks[0].noninferiority.p_value for each in found.candidates]
    assert [each.tasks[0].noninferiority.p_holm for each in found.candidates] == pytest.approx(
        holm_adjusted_p_values(p_values)
    )
    [words] = found.next_steps
    assert "Alone it would pass; corrected for all 4 tests it does not" in words
    # As many as a single test at a quarter of the level needs.
    [still] = candidate(found, close).open_tasks
    assert still.as_good
    spread = 0.025 * (1 - 0.025)  # of 0/1 scores that are worse by the margin
    quantiles = student.isf(0.05 / 4, 399) + student.isf(0.2, 399)
    assert still.documents == pytest.approx(spread * (quantiles / (0.025 - 0.005)) ** 2, rel=0.01)
    margin = float(re.search(r"a wider margin of ([\d.]+),", words)[1])
    assert 0.025 < margin < 0.04
    assert decide_verdict(store, "m", margins=Margins(default=margin)).answer == "yes"


def test_nothing_measured_of_cost(store: Store, add: Add) -> None:
    add({"qa": wrong(DOCUMENTS, 0)}, kind="teacher")
    as_good = add({"qa": wrong(DOCUMENTS, 0)})
    found = decide_verdict(store, "m")
    assert (found.answer, candidate(found, as_good).quality) == ("not settled", "pass")
    assert found.next_steps == (
        "Measure its cost in one run with the teacher's: limbeck eval m/2 --tasks qa --against m/1",
    )
    assert "The cost of running m/2: speed, memory, dollars." in found.not_measured
    for text in (render_markdown(found), render_html(found)):
        assert "Not measured." in text


def test_payback(store: Store, add: Add) -> None:
    teacher_of(add)
    add({"qa": wrong(DOCUMENTS, 0)}, 0.5, training_cost=TRAINING_COST)
    [best] = decide_verdict(store, "m", tokens_per_day=1e6, prices=Prices.load(usd_per_hour=2.0)).candidates
    assert best.payback
    assert best.payback.training_cost_usd == pytest.approx(2.0)
    # The teacher takes 0.1 s for 128 tokens, the student half of that: 2 / 3600 * 0.05 s / 128 saved on each.
    assert best.payback.break_even_tokens.value == pytest.approx(2.0 / (2 / 3600 * 0.05 / 128))
    found = decide_verdict(store, "m", tokens_per_day=1e6, prices=Prices.load(usd_per_hour=2.0))
    assert found.sentence.endswith(
        "Making it cost $2; it pays back after 9.22 million [9.04 million, 9.4 million] tokens: 9.2 days at 1 million "
        "tokens a day."
    )
    assert not any(words.startswith("The cost of making") for words in found.not_measured)
    assert "| training | 3,600 s | $2 |" in render_markdown(found)
    assert "Dollars: your price, 2 USD/h (--usd-per-hour)" in render_markdown(found).replace("\\-", "-")


def test_what_was_not_measured_is_said(store: Store, add: Add) -> None:
    guess = np.tile([1.0, 0, 0, 0], 100)
    add({"qa": wrong(DOCUMENTS, 0), "guess": guess, "one": wrong(10, 0)}, 1.0, kind="teacher", one_group=["one"])
    best = add(
        {"qa": wrong(DOCUMENTS, 0), "guess": guess, "one": wrong(10, 0)},
        0.5,
        recipe="small",
        kind="onnx",
        engine="onnxruntime",
        parent="m/9",
        one_group=["one"],
    )
    add({"other": wrong(50, 0)}, 0.1, alone=True)
    add()
    found = decide_verdict(store, "m")
    assert found.left_out == {"m/3": "scored on other", "m/4": "not scored on these tasks"}
    assert found.other_tasks == ("other",)
    assert candidate(found, best).unknown_tasks.keys() == {"one"}
    # A task of which nothing can be told is not passed.
    allowed = decide_verdict(store, "m", margins=Margins(default=0.1))
    assert {task.noninferiority.verdict for task in candidate(allowed, best).tasks} == {"pass"}
    assert (allowed.answer, candidate(allowed, best).quality) == ("not settled", "inconclusive")
    for words in (
        "Retention on guess: retention is undefined",
        "Quality on one: a confidence interval needs documents of two groups",
        "(qa, guess, one): other languages",
        "Other tasks that versions of m are scored on: other.",
        "Luck in training: only one student of small was trained",
        "Other requests than 64 tokens in and 64 out, in batches of 1 and 8",
        "Other machines than a test machine, 2 cores; no GPU was used.",
        "Dollars: no price of this machine is known",
        "m/1 ran in torch, m/2 in onnxruntime. To separate the two, run limbeck export m/1",
        "The cost of making m/2, and so when it pays back",
        "m/3 is not a candidate: scored on other",
    ):
        assert any(words in said for said in found.not_measured), words
    # The teacher exported tells the engine's share.
    add({"qa": wrong(DOCUMENTS, 0), "guess": guess, "one": wrong(10, 0)}, 0.7, kind="onnx", parent="m/1")
    found = decide_verdict(store, "m")
    assert any("The teacher itself, as m/5 fp32, runs at 70.0% [" in said for said in found.not_measured)


def test_the_teacher_in_another_form_is_no_smaller_model(store: Store, add: Add) -> None:
    teacher_of(add)
    add({"qa": wrong(DOCUMENTS, 0)}, 0.5, kind="onnx", engine="onnxruntime", precision="int8", parent="m/1")
    found = decide_verdict(store, "m")
    assert found.answer == "yes"
    assert "It is the teacher itself in another form" in found.sentence
    assert not any(words.startswith("The cost of making") for words in found.not_measured)


def test_which_scores_are_held_against_the_teacher(store: Store, add: Add, tmp_path: Path) -> None:
    teacher_of(add)
    version = add({"qa": wrong(DOCUMENTS, 300)}, 0.5)
    later = {"created": datetime(2026, 3, 1, tzinfo=UTC)}
    card = store.findings.scorecards(version)[0]
    parquet.write_table(table({"qa": wrong(DOCUMENTS, 0)}), tmp_path / "new.parquet")
    # Scored anew on another machine, then without a teacher: the newest with both counts.
    elsewhere = cost(0.5, machine="another machine, 8 cores; torch 2")
    store.findings.add_scorecard(
        version, card.model_copy(update={**later, "cost": elsewhere}), tmp_path / "new.parquet"
    )
    last = {"created": datetime(2026, 4, 1, tzinfo=UTC), "relative": None}
    store.findings.add_scorecard(version, card.model_copy(update=last), tmp_path / "new.parquet")
    add({"qa": wrong(DOCUMENTS, 2)}, 0.6)
    # Other prompts are another setting.
    add({"qa": wrong(DOCUMENTS, 0)}, 0.1, card={"prompts_digest": "changed"})
    found = decide_verdict(store, "m")
    assert {each.version for each in found.candidates} == {"m/2", "m/3"}
    assert candidate(found, version).quality == "pass"
    assert found.left_out.keys() == {"m/4"}
    assert any("m/3 measured on another machine" in words for words in found.not_measured)


def test_a_teacher_behind_an_api(store: Store, add: Add, limbeck_home: Path) -> None:
    url, digest, answers = "http://localhost:1/v1#giant", "e" * 64, {"qa": wrong(DOCUMENTS, 0)}
    version = add(answers, 0.5, alone=True)
    mine = store.findings.scorecards(version)[0]
    nothing: dict[str, Any] = {"retention": None, "task_retention": {}, "difference": {}}
    relative = Relative(teacher=url, teacher_digest=digest, cost_ratio=None, speedup=None, **nothing)
    against = mine.model_copy(update={"relative": relative})
    store.findings.add_scorecard(version, against, store.findings.documents(version, mine))
    with pytest.raises(BadInput, match="is not scored"):
        decide_verdict(store, "m")
    folder = limbeck_home / "scorecards-local" / digest / "x"
    folder.mkdir(parents=True)
    theirs = mine.model_copy(update={"artifact": digest, "model": url, "cost": None})
    (folder / "scorecard.json").write_text(theirs.model_dump_json())
    parquet.write_table(table(answers), folder / "documents.parquet")
    write_manifest(folder)
    found = decide_verdict(store, "m")
    assert (found.teacher, found.teacher_engine, found.answer) == (url, "endpoint", "not settled")
    # With its price the two can be set beside each other: 0.05 s of 128 tokens at 1 dollar an hour, and 1 dollar.
    giant = ApiEntry(
        usd_per_million_input_tokens=0.5, usd_per_million_output_tokens=1.5, date=date(2026, 1, 1), source="s"
    )
    prices = Prices(apis={"giant": giant}, machines=Prices.load(usd_per_hour=1.0).machines)
    found = decide_verdict(store, "m", against=url, prices=prices)
    [best] = found.candidates
    assert best.cost_ratio == pytest.approx(0.05 / 3600 / 128 * 1e6)
    assert (found.answer, best.cheaper) == ("yes", True)


def test_what_is_not_there(store: Store, add: Add) -> None:
    with pytest.raises(BadInput, match="no model is registered"):
        decide_verdict(store, "m")
    add({"qa": wrong(DOCUMENTS, 0)}, 1.0, kind="teacher")
    with pytest.raises(BadInput, match="no version of m was scored against a teacher") as error:
        decide_verdict(store, "m")
    assert error.value.fix == "limbeck eval m --tasks ... --against TEACHER"
    with pytest.raises(BadInput, match="no other version was scored on the same tasks and prompts as m/1"):
        decide_verdict(store, "m", against="m/1")
    bare = add()
    with pytest.raises(BadInput, match="m/2 is not scored") as error:
        decide_verdict(store, "m", against=bare.ref)
    assert error.value.fix == "limbeck eval MODEL --tasks ... --against m/2"
    with pytest.raises(BadInput, match="m has no version 9"):
        decide_verdict(store, "m", against="m/9")
    with pytest.raises(BadInput, match="did you mean qa"):
        decide_verdict(store, "m", against="m/1", tasks=["qaa"])
    add({"qa": wrong(DOCUMENTS, 0)}, 0.5)
    with pytest.raises(BadInput, match="did you mean acc"):
        decide_verdict(store, "m", margins=Margins(by_name={"ac": 0.1}))


NASTY = "<b>x</b>|*a* [c](http://d) `e` _f_ \x1b[31m"


def test_formats_say_the_same(
    store: Store, add: Add, limbeck: Callable[..., Any], limbeck_home: Path, tmp_path: Path
) -> None:
    tasks = ["qa", "1. <i>|*"]
    teacher_of(add, tasks)
    add({task: wrong(DOCUMENTS, 0) for task in tasks}, 0.5, recipe=NASTY, training_cost=TRAINING_COST)
    found = json.loads(limbeck("verdict", "m", "--format", "json").out)
    kept = VerdictReport.model_validate(found)
    assert (kept.answer, kept.candidate) == ("yes", "m/2")
    assert kept == decide_verdict(store, "m").model_copy(update={"created": kept.created})
    for form in ("table", "markdown"):
        done = limbeck("verdict", "m", "--format", form)
        assert done.code == 0
        assert "m: is the giant a waste here? Yes." in done.out.lstrip().splitlines()[0]
        assert "50.0% [49.5%, 50.5%]" in " ".join(done.out.replace("\u00a0", " ").split())
        assert "\x1b[31m" not in done.out
    written = limbeck("verdict", "m", "--format", "html")
    assert (written.code, written.out) == (0, "home/reports/m-verdict.html\n")
    page = Page((limbeck_home / "reports" / "m-verdict.html").read_text())
    # Names are text and nothing else.
    assert page.foreign == []
    assert page.text.count("<b>x</b>|*a* [c](http://d) `e` _f_ ") == 4  # the answer, a heading, the table, luck
    assert "1. <i>|*" in page.text
    assert page.open == []
    assert page.count["svg"] == 2
    assert page.count["li"] == len(kept.not_measured)
    for form in ("markdown", "html", "json"):
        limbeck("verdict", "m", "--format", form, "--output", tmp_path / f"out.{form}")
        assert "m/2" in (tmp_path / f"out.{form}").read_text()
    assert limbeck("verdict", "m", "--output", tmp_path / "x").code == 2
    below = limbeck("verdict", "m", "--format", "html", "--output", tmp_path / "out.json" / "x")
    assert (below.code, "cannot be written" in below.err) == (2, True)


def test_options_of_the_command(store: Store, add: Add, limbeck: Callable[..., Any]) -> None:
    teacher_of(add, ["qa", "more"])
    add({"qa": wrong(DOCUMENTS, 30), "more": wrong(DOCUMENTS, 0)}, 0.5, training_cost=TRAINING_COST)
    options = (
        "--margin",
        0.02,
        "--margin",
        "qa=0.05",
        "--tokens-per-day",
        1e6,
        "--usd-per-hour",
        3,
        "--against",
        "m/1",
    )
    found = VerdictReport.model_validate_json(limbeck("verdict", "m", *options, "--format", "json").out)
    assert (found.margins, found.default_margins) == ({"qa": 0.05, "more": 0.02}, False)
    [best] = found.candidates
    assert best.payback
    assert best.payback.tokens_per_day == 1e6
    assert best.cost
    assert best.cost.usd_per_hour == 3
    one = VerdictReport.model_validate_json(limbeck("verdict", "m", "--task", "more", "--format", "json").out)
    assert one.margins == {"more": 0.01}
    assert limbeck("verdict", "m", "--margin", "no").code == 2
    assert limbeck("verdict", "m", "--tokens-per-day", 0).code == 2


class Page(HTMLParser):
    """What a page shows, its tags, and those that no text may bring in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.foreign: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.foreign += [tag] if tag in ("b", "i", "a", "script", "link", "img", "iframe") else []
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
