"""The preflight: errors, warnings, confirmations and forecasts; it makes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.load import Source
from limbeck.distill.run import forecast, resources
from limbeck.distill.run.preflight import preflight
from limbeck.distill.run.prepare import prepare_setting
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model
from tests.distill.conftest import DISTILLED, STUDENTS, TWINS

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]
BIG = STUDENTS["llama"].replace("hidden_size = 32", "hidden_size = 64")


@pytest.fixture
def check(store: Store, limbeck: Limbeck) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Run `limbeck distill --check` and return the findings by check."""

    def run(path: Path, *overrides: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
        done = limbeck("distill", path, "--check", "--format", "json", *(w for o in overrides for w in ("--set", o)))
        assert done.code == code, done.err
        found: dict[str, list[dict[str, Any]]] = {}
        for finding in json.loads(done.out):
            found.setdefault(finding["check"], []).append(finding)
        return found

    return run


def test_a_recipe_that_fits(
    check: Any, write_recipe: WriteRecipe, tiny_llama: Path, store: Store, limbeck_home: Path, limbeck: Limbeck
) -> None:
    path = write_recipe(tiny_llama, objectives=TWINS, extra="[cache]\nform = 'topk'\ntop_k = 8\n")
    sets = ("teacher.licence=apache-2.0", "budget.usd_per_hour=1.0")
    found = check(path, *sets)
    assert list(found) == [
        "text", "students", "vocabulary", "context", "size", "licence", "text licence", "cache", "memory", "disk",
        "time",
    ]  # fmt: skip
    assert {finding["level"] for several in found.values() for finding in several} == {"ok"}
    assert "small: equal: 300 tokens" in found["vocabulary"][0]["message"]
    assert "positions: teacher 128, small 32" in found["context"][0]["message"]
    assert "100.0% of the teacher's" in found["size"][0]["message"]
    assert "topk: miss" in found["cache"][0]["message"]
    assert "measured on a few steps" in found["time"][0]["message"]
    assert "dollars" in found["time"][0]["message"]
    # The check made nothing.
    assert store.versions() == []
    assert not (limbeck_home / "runs").exists()
    assert not list((limbeck_home / "teacher-cache").glob("*/*.safetensors"))

    args = [word for each in sets for word in ("--set", each)]
    assert limbeck("distill", path, *args).code == 0
    found = check(path, *sets)
    assert "2 of them already made" in found["students"][0]["message"]
    assert "memory" not in found  # no student is missing
    # Another objective uses the same cache.
    found = check(path, *sets, "objectives.distilled.divergence=jsd", "budget.max_minutes=0.5")
    assert "topk: hit" in found["cache"][0]["message"]
    table = limbeck("distill", path, *args, "--check")
    assert table.code == 0
    assert "already made" in table.out


def test_padded_vocabularies_are_distinguished_from_unequal_ones(
    check: Any, write_recipe: WriteRecipe, tokenizer_folder: Path, tmp_path: Path
) -> None:
    teacher = make_model(tmp_path / "padded", tokenizer_folder, "llama", vocab_size=384)
    found = check(write_recipe(teacher, objectives=DISTILLED))
    assert "equal: 300 tokens, embeddings padded to 384 and 300" in found["vocabulary"][0]["message"]
    from limbeck.distill.data.blocks import train_tokenizer
    from limbeck.distill.data.document import Document

    train_tokenizer([Document("a", "other words, other tokens " * 9)], 270, 128).save_pretrained(tmp_path / "tokens")
    student = make_model(tmp_path / "student", tmp_path / "tokens", "llama")
    found = check(write_recipe(teacher, student, DISTILLED), code=2)
    [error] = [finding for several in found.values() for finding in several if finding["level"] == "error"]
    assert "students.small.model" in error["message"]
    assert "chunks" in error["fix"]


def test_a_teacher_smaller_than_its_student_needs_confirmation(
    store: Store, limbeck: Limbeck, check: Any, write_recipe: WriteRecipe, tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_recipe(tiny_llama, BIG, DISTILLED)
    [size] = check(path)["size"]
    assert (size["level"], size["needs_confirmation"]) == ("warning", True)
    assert "its teacher is smaller" in size["message"]
    done = limbeck("distill", path)
    assert (done.code, store.versions()) == (2, [])
    assert "add --yes to continue anyway" in done.err
    assert f"{path}:" in done.err

    # With a terminal to ask in.
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda text, err: False)
    assert (limbeck("distill", path).code, store.versions()) == (2, [])
    monkeypatch.setattr("click.confirm", lambda text, err: True)
    assert limbeck("distill", path).code == 0
    monkeypatch.undo()

    # A student of labels does not use the teacher: nothing to confirm.
    assert limbeck("distill", write_recipe(tiny_llama, BIG)).code == 0


def test_yes_confirms(store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    done = limbeck("distill", write_recipe(tiny_llama, BIG, DISTILLED), "--yes")
    assert done.code == 0
    assert "warning: " in done.err


def test_the_teachers_licence_is_a_finding(check: Any, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    assert [(f["level"], "is not known to allow distillation" in f["message"]) for f in check(path)["licence"]] == [
        ("warning", True)
    ]
    [forbidden] = check(path, "teacher.licence=llama2")["licence"]
    assert (forbidden["level"], "forbids" in forbidden["message"]) == ("warning", True)
    [allowed] = check(path, "teacher.licence=llama2", "teacher.licence_allows_distillation=true")["licence"]
    assert allowed["level"] == "ok"


def test_too_little_memory_or_disk(
    store: Store, limbeck: Limbeck, check: Any, write_recipe: WriteRecipe, tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    monkeypatch.setattr(resources, "available_memory", lambda: 2**30)
    assert {finding["level"] for finding in check(path)["memory"]} == {"ok", "warning"}
    monkeypatch.setattr(resources, "available_memory", lambda: 10_000)
    [finding] = check(path, code=2)["memory"]
    assert (finding["level"], "weights, gradients and optimizer alone take" in finding["message"]) == ("error", True)
    assert "disk" not in check(path, code=2)
    assert limbeck("distill", path).code == 2
    monkeypatch.undo()


def test_a_full_disk(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    recipe = load.load_recipe(path)
    setting = prepare_setting(recipe, Source(path), store)
    usage = shutil.disk_usage(path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda where: usage._replace(free=1000))
    [finding] = [f for f in preflight(setting, grid.plan_students(recipe)) if f.check == "disk"]
    assert (finding.level, "not enough disk space" in finding.message) == ("error", True)


def test_the_findings_on_other_recipes(
    check: Any, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path
) -> None:
    """Across tokenizers, from a teacher that runs online, from text that it is yet to write."""
    chunks = '[objectives.chunks]\ndivergence = "chunks"\n'
    found = check(write_recipe(tiny_llama, objectives=chunks, extra="[tokenizer]\nvocab_size = 270\n"))
    assert "unequal: 300 and 270 tokens" in found["vocabulary"][0]["message"]
    assert found["vocabulary"][0]["level"] == "ok"
    assert "text chunks: miss" in found["cache"][0]["message"]

    path = write_recipe(tiny_llama, objectives=DISTILLED)
    found = check(path, "cache.form=online", "budget.usd_per_hour=2.0", "budget.max_usd=1e-9")
    assert "runs online for 1 students" in found["cache"][0]["message"]
    assert "with the teacher online" in found["memory"][1]["message"]
    assert "more than budget.max_usd = 1e-09" in found["time"][0]["message"]
    assert found["time"][0]["level"] == "warning"

    found = check(write_recipe(tiny_llama, extra="[generate]\nmax_new_tokens = 8\n"), "name=unwritten")
    assert "the teacher writes it" in found["text"][0]["message"]
    assert "without the time in which the teacher writes" in found["time"][0]["message"]
    assert "cache" not in found
    assert not (limbeck_home / "data" / "unwritten").exists()


def test_an_error_in_the_recipe_is_a_finding(check: Any, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe()
    path.write_text(path.read_text().replace("max_steps = 4", "max_step = 4"))
    [finding] = check(path, code=2)["recipe"]
    assert f"{path}:" in finding["message"]
    assert "did you mean max_steps" in finding["message"]


def test_memory_counts_weights_gradients_and_states(store: Store, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED)

    def certain(*sets: str, teacher: int = 0) -> int:
        recipe = load.load_recipe(path, list(sets))
        return forecast.memory(
            prepare_setting(recipe, Source(path), store), grid.plan_students(recipe)[0], teacher
        ).certain

    config = AutoConfig.from_pretrained(tiny_llama)
    parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert certain() == 16 * parameters  # weights, gradients, two moments
    assert certain("training.optim=muon") == 12 * parameters
    assert certain(teacher=1000) == 16 * parameters + 4000


def test_the_speed_is_measured_or_estimated(store: Store, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    """Estimated if a step would take too long to measure."""
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    recipe = load.load_recipe(path)
    setting, [plan] = prepare_setting(recipe, Source(path), store), grid.plan_students(recipe)
    assert forecast.tokens(setting, plan) == 4 * 4 * 32
    measured = forecast.training_speed(setting, plan)
    assert measured.measured
    assert 0 < measured.seconds_per_token < 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "flops", lambda: 1e3)
        estimated = forecast.training_speed(setting, plan)
    assert not estimated.measured
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    assert estimated.seconds_per_token == pytest.approx(6 * parameters / (forecast.SHARE_OF_PEAK * 1e3), rel=0.2)
