"""Licences of teachers, texts and base models, from cards, recipes and providers, and what students inherit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.distill.recipe import load
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Data
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students.licences import text_licence
from limbeck.export.artifact.variants import export_version
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import Refused
from limbeck.registry.gate.evidence import gather_evidence
from limbeck.registry.gate.promotion import promote
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import LineageRules, Policy, QualityRules
from limbeck.registry.provenance import licences
from limbeck.registry.records import Version
from tests.conftest import Result
from tests.distill.conftest import DISTILLED


def test_the_recipe_goes_before_the_card_of_the_teacher(
    store: Store, write_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    path = write_recipe("teacher", objectives=DISTILLED)

    def allowed(*overrides: str) -> bool | None:
        return prepare_setting(
            load.load_recipe(path, list(overrides)), Source(path, overrides), store
        ).teacher_licence_allows

    assert allowed() is None
    (teacher / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert allowed() is False
    assert allowed("teacher.licence=apache-2.0") is True
    assert allowed("teacher.licence_allows_distillation=true") is True


@pytest.fixture
def train_student(
    store: Store, limbeck: Callable[..., Result], write_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> Callable[..., Version]:
    """Runs `limbeck distill` with this teacher, and returns the newest student."""

    def teach(teacher: object, name: str, *overrides: str, student: str | Path = "llama") -> Version:
        settings = (f"name={name}", "training.max_steps=1", "data.max_tokens=2000", *overrides)
        sets = [word for setting in settings for word in ("--set", setting)]
        done = limbeck("distill", write_recipe(teacher, student, objectives=DISTILLED), *sets, "--yes")
        assert done.code == 0, done.err
        return [version for version in store.versions(name) if version.kind == "student"][-1]

    return teach


RULE = Policy(quality=QualityRules(min_retention=0), lineage=LineageRules(require_distillation_licence=True))


def licence_rule(store: Store, version: Version) -> tuple[str, str]:
    rules = apply_policy(RULE, gather_evidence(store, version, RULE, "production")).rules
    return next((each.outcome, each.message) for each in rules if each.rule == "lineage.require_distillation_licence")


def test_a_student_of_a_student_inherits_the_terms_of_both_teachers(
    store: Store, train_student: Callable[..., Version], tiny_llama: Path, tmp_path: Path
) -> None:
    first = train_student(tiny_llama, "first", "teacher.licence=openai", "data.licence=CC-BY-4.0", "licence=MIT")
    assert (first.teacher_licence, first.data_licence, first.code_licence) == ("openai", "CC-BY-4.0", "Apache-2.0")
    assert (first.licence_allows_distillation, licence_rule(store, first)[0]) == (False, "fail")
    # Given as a folder, like an unknown model. It is still recognised by its files.
    laundered = shutil.copytree(store.artifacts.verified_folder(first), tmp_path / "laundered")
    second = train_student(laundered, "second", "teacher.licence=mit", "data.licence=MIT")
    assert (second.teacher_licence, second.data_licence) == ("mit AND openai", "MIT AND CC-BY-4.0")
    assert second.licence_allows_distillation is False
    [exported] = export_version(store, second, ["int8-weight"])
    variant = store.get(exported.model)
    assert (variant.teacher_licence, variant.data_licence) == (second.teacher_licence, second.data_licence)
    for version in (second, variant):
        terms = licences.lineage_licences(store, version)
        assert [(t.role, t.version, t.licence) for t in terms] == [
            ("teacher", first.ref, "openai"),
            ("data", first.ref, "CC-BY-4.0"),
            ("teacher", second.ref, "mit AND openai"),
            ("data", second.ref, "MIT AND CC-BY-4.0"),
        ]
        outcome, message = licence_rule(store, version)
        assert outcome == "fail"
        assert f"the licence of {first.parent} forbids learning from it (openai" in message
    with pytest.raises(Refused, match="the licence of first/1 forbids learning from it"):
        promote(store, variant.ref, "production", RULE)


def test_a_licence_can_be_added_later_but_not_changed(
    store: Store, train_student: Callable[..., Version], tiny_llama: Path
) -> None:
    student = train_student(tiny_llama, "later")
    assert (student.teacher_licence, student.data_licence) == (None, None)
    assert licence_rule(store, student)[0] == "inconclusive"
    again = train_student(tiny_llama, "later", "teacher.licence=mit", "data.licence=MIT")
    assert again == store.get(student.ref)  # the same student, not trained again
    assert (again.teacher_licence, again.data_licence, licence_rule(store, again)[0]) == ("mit", "MIT", "pass")
    assert train_student(tiny_llama, "later", "teacher.licence=openai", "data.licence=GPL-3.0") == again


def test_the_base_model_is_recorded(store: Store, train_student: Callable[..., Version], tiny_llama: Path) -> None:
    stated = ("teacher.licence=mit", "students.small.licence=llama3")
    student = train_student(tiny_llama, "base", *stated, student=tiny_llama)
    assert (student.base_model, student.base_model_licence) == (str(tiny_llama), "llama3")
    assert student.base_model_digest == folder_digest(tiny_llama)
    assert ("base model", "llama3") in [(term.role, term.licence) for term in licences.lineage_licences(store, student)]


def test_the_licence_of_a_data_set_comes_from_its_card(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')

    def licence_of_rows(**more: str) -> str | None:
        return text_licence(Data(path="rows.jsonl", **more), tmp_path)

    assert licence_of_rows() is None
    (tmp_path / "README.md").write_text("---\nlicense: [cc-by-4.0, mit]\n---\n")
    assert licence_of_rows() == "cc-by-4.0 AND mit"
    assert licence_of_rows(licence="PSF-2.0") == "PSF-2.0"
    assert text_licence(Data(path="owner/never-fetched"), tmp_path) is None


def test_terms_of_a_provider_go_before_the_card_of_the_tokenizer(
    store: Store, write_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    path = write_recipe("teacher", objectives=DISTILLED)
    setting = prepare_setting(load.load_recipe(path, []), Source(path), store)
    assert setting.recipe.teacher is not None
    endpoint = setting.recipe.teacher.model_copy(update={"model": "https://api.openai.com/v1#gpt"})
    with_endpoint = setting._replace(recipe=setting.recipe.model_copy(update={"teacher": endpoint}))
    assert (setting.teacher_licence_allows, with_endpoint.teacher_licence, with_endpoint.teacher_licence_allows) == (
        True,
        "openai",
        False,
    )
