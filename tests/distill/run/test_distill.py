"""A whole recipe: what it registers and logs, and what a second run skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill.data.blocks import make_blocks
from limbeck.distill.data.corpus import read_corpus
from limbeck.distill.losses import divergences
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.load import Source
from limbeck.distill.run import distill
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students.keys import student_key
from limbeck.registry.core.machine import describe_hardware
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, TWINS

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]


def students_of(done: Any) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_recipe_makes_a_distilled_student_and_one_of_labels(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=TWINS)
    made = students_of(limbeck("distill", recipe, "--format", "json"))
    assert [(s["name"], s["version"], s["recipe"], s["trained"]) for s in made] == [
        ("tiny", 2, "small-distilled", True),
        ("tiny", 3, "small-labels", True),
    ]
    teacher = store.get("tiny/1")
    distilled, labels = store.get("tiny/2"), store.get("tiny/3")
    assert (teacher.kind, distilled.kind, labels.kind) == ("teacher", "student", "student")
    # The student of labels is compared with the teacher, but not made from it.
    assert (distilled.teacher, distilled.parent) == ("tiny/1", "tiny/1")
    assert (labels.teacher, labels.parent) == ("tiny/1", None)
    assert distilled.digest != labels.digest
    assert distilled.data_digest == labels.data_digest
    assert distilled.recipe_digest != labels.recipe_digest
    assert (distilled.licence, distilled.precision, distilled.engine) == ("CC0-1.0", "fp32", "torch")
    assert str(distilled.code_version).startswith("limbeck ")

    folder = store.artifacts.verified_folder(distilled)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == distilled.params
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()
    card = (folder / "README.md").read_text()
    assert "forward_kl from tiny/1" in card
    assert "license: cc0-1.0" in card

    run = store.client.get_run(distilled.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["objective.divergence"] == "forward_kl"
    assert run.data.params["teacher_digest"] == teacher.digest
    assert run.data.metrics["tokens"] == 4 * 4 * 32
    for curve in ("loss", "learning_rate", "tokens_per_s"):
        assert [metric.step for metric in store.client.get_metric_history(distilled.run_id, curve)] == [2, 4]
    artifacts = store.client.list_artifacts(distilled.run_id, "recipe")
    assert [artifact.path for artifact in artifacts] == ["recipe/recipe.toml"]

    again = limbeck("distill", recipe, "--format", "json")
    assert [(s["version"], s["trained"]) for s in students_of(again)] == [(2, False), (3, False)]
    assert "small-distilled: already made, tiny/2" in again.err
    other = students_of(limbeck("distill", recipe, "--set", "training.max_steps=2", "--format", "json"))
    assert [(s["version"], s["trained"]) for s in other] == [(4, True), (5, True)]
    table = limbeck("distill", recipe)
    assert "tiny/2" in table.out
    assert "small-labels" in table.out


def test_the_training_cost_of_each_student_is_recorded(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path
) -> None:
    third = '\n[objectives.mixed]\ndivergence = "jsd"\n'
    recipe = write_recipe(tiny_llama, objectives=TWINS + third, extra="[cache]\nform = 'topk'\n")
    students_of(limbeck("distill", recipe, "--format", "json"))
    distilled, mixed, labels = (store.runs.training_cost(store.get(f"tiny/{number}")) for number in (2, 3, 4))
    assert distilled
    assert labels
    assert mixed
    shards = [json.loads(path.read_text()) for path in (limbeck_home / "teacher-cache").glob("*/0*.json")]
    captured = sum(shard["seconds"] for shard in shards)
    assert captured > 0
    # Two of the three students use the cache; its whole cost counts for each of them.
    assert (distilled.teacher_seconds, distilled.students_sharing_teacher) == (captured, 2)
    assert (mixed.teacher_seconds, mixed.students_sharing_teacher) == (captured, 2)
    assert (labels.teacher_seconds, labels.students_sharing_teacher) == (0, 1)
    assert distilled.tokens == 4 * 4 * 32
    assert distilled.machine == describe_hardware()
    metrics = store.client.get_run(store.get("tiny/2").run_id).data.metrics
    assert distilled.training_seconds == pytest.approx(metrics["seconds"])
    assert distilled.teacher_seconds == pytest.approx(metrics["teacher_seconds"])
    assert store.runs.training_cost(store.get("tiny/1")) is None
    # A later run uses the cache of the first one.
    students_of(limbeck("distill", recipe, "--set", "training.max_steps=2", "--format", "json"))
    again = store.runs.training_cost(store.get("tiny/5"))
    assert again
    assert again.teacher_seconds == captured


def test_a_distilled_student_comes_nearer_to_its_teacher_than_one_of_labels(
    store: Store, limbeck_home: Path, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_gpt2: Path
) -> None:
    """In KL divergence, after 80 steps."""
    recipe = write_recipe(tiny_gpt2, objectives=TWINS)
    sets = ("training.max_steps=80", "training.learning_rate=0.01", "training.optim=muon", "data.max_tokens=4096")
    students_of(limbeck("distill", recipe, *(word for s in sets for word in ("--set", s)), "--format", "json"))
    teacher = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    heldout = make_blocks(read_corpus(next((limbeck_home / "data").rglob("heldout.jsonl"))), tokenizer, 32)
    ids = torch.from_numpy(heldout.ids[:32]).long()
    distance = {}
    with torch.no_grad():
        log_p = teacher(ids).logits.log_softmax(-1)
        for ref in ("tiny/2", "tiny/3"):
            student = AutoModelForCausalLM.from_pretrained(store.artifacts.verified_folder(store.get(ref))).eval()
            log_q = student(ids).logits.log_softmax(-1)
            distance[ref] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert distance["tiny/2"] < distance["tiny/3"] / 2


@pytest.mark.parametrize("student", ["qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("online", [False, True])
def test_students_of_another_architecture(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    request: pytest.FixtureRequest,
    student: str,
    online: bool,
) -> None:
    name = {"qwen2": "tiny_gpt2", "gpt2": "tiny_neox", "gpt_neox": "tiny_qwen2"}[student]
    recipe = write_recipe(request.getfixturevalue(name), student, DISTILLED)
    args = ("--set", "cache.form=online", "--set", "objectives.distilled.temperature=2.0") if online else ()
    [made] = students_of(limbeck("distill", recipe, *args, "--yes", "--format", "json"))
    model = AutoModelForCausalLM.from_pretrained(store.artifacts.verified_folder(store.get("tiny/2")))
    assert model.config.model_type == student
    assert made["recipe"] == "small"


def test_a_chain_of_recipes(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tmp_path: Path, tiny_llama: Path
) -> None:
    """A recipe without a teacher makes a teacher; the next names it; the last begins from the next's student."""
    recipe = write_recipe(None)
    [first] = students_of(
        limbeck("distill", recipe, "--set", "name=old", "--output", tmp_path / "copy", "--format", "json")
    )
    assert (first["kind"], first["teacher"], first["recipe"]) == ("teacher", None, "small")
    assert (tmp_path / "copy" / "model.safetensors").is_file()

    recipe = write_recipe("old/1", objectives=DISTILLED)
    [second] = students_of(limbeck("distill", recipe, "--format", "json"))
    assert (second["kind"], second["teacher"]) == ("student", "tiny/1")
    teacher = store.get("tiny/1")
    assert (teacher.kind, teacher.digest, teacher.parent) == ("teacher", first["digest"], "old/1")
    assert teacher.licence == "CC0-1.0"

    table = '[students.small]\nmodel = "tiny/2"\n'
    text = recipe.read_text()
    begin, end = text.index("[students.small.config]"), text.index("[objectives")
    recipe.write_text(text[:begin] + table + text[end:])
    [third] = students_of(limbeck("distill", recipe, "--format", "json"))
    assert third["version"] == 3
    assert third["digest"] != second["digest"]
    assert [s["trained"] for s in students_of(limbeck("distill", recipe, "--format", "json"))] == [False]


def test_text_from_jsonl_and_from_a_folder(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tmp_path: Path, text_file: Path, tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama)
    pieces = text_file.read_text().split("\n\n")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for number, piece in enumerate(pieces):
        (tmp_path / "folder" / "below" / f"{number}.txt").write_text(piece)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": piece}) + "\n" for piece in pieces))
    [one] = students_of(limbeck("distill", recipe, "--set", "data.path=folder", "--format", "json"))
    sets = ("--set", "data.path=rows.jsonl", "--set", "data.text_column=body")
    [two] = students_of(limbeck("distill", recipe, *sets, "--format", "json"))
    assert one["data_digest"] != two["data_digest"]
    done = limbeck("data", recipe, *sets, "--format", "json")
    counts = json.loads(done.out)
    assert counts["train_documents"] + counts["heldout_documents"] == len([p for p in pieces if p.strip()])


def test_students_of_one_seed_read_the_same_batches(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[np.ndarray] = []
    loss = divergences.loss
    monkeypatch.setattr(
        divergences, "loss", lambda logits, labels, *rest: batches.append(labels.numpy()) or loss(logits, labels, *rest)
    )
    distill.distill(write_recipe(tiny_llama, objectives=TWINS), [], store)
    assert len(batches) == 8
    for distilled, other in zip(batches[:4], batches[4:], strict=True):
        assert (distilled == other).all()
    assert not (batches[0] == batches[1]).all()


def test_a_students_key_changes_with_everything_that_decides_it(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    def keys(*overrides: str) -> list[str]:
        path = write_recipe(tiny_llama, objectives=TWINS)
        recipe = load.load_recipe(path, list(overrides))
        setting = prepare_setting(recipe, Source(path, overrides), store)
        return [student_key(setting, plan) for plan in grid.plan_students(recipe)]

    base = keys()
    assert keys("training.logging_steps=1", "licence=MIT") == base
    for override in (
        "seed=1",
        "data.max_length=16",
        "students.small.config.hidden_size=16",
        "students.small.training.learning_rate=0.1",
        "data.max_tokens=640",
    ):
        changed = keys(override)
        assert changed[0] != base[0], override
        assert changed[1] != base[1], override
    fewer = keys("cache.top_k=4")  # the cache does not concern the student of labels
    assert (fewer[0] != base[0], fewer[1] == base[1]) == (True, True)
