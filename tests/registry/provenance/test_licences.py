"""Licences: expressions, spellings, whether they allow training on outputs, and those along a lineage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.records import NewVersion


@pytest.mark.parametrize(
    ("licence", "allows"),
    [
        ("apache-2.0", True),
        ("Apache License, Version 2.0", True),
        ("CC0-1.0", True),
        ("llama2", False),
        ("Llama 3", False),
        ("llama3.1", True),  # with a name that begins with Llama
        ("gemma", True),
        ("openai", False),
        ("other", None),
        ("", None),
        (None, None),
    ],
)
def test_whether_a_licence_allows_distillation(licence: str | None, allows: bool | None) -> None:
    assert licences.allows_distillation(licence) is allows


def test_every_entry_has_a_source() -> None:
    for name in licences.TERMS:
        terms = licences.terms_of_licence(name.upper())
        assert terms is not None
        assert terms.summary
        assert terms.source.startswith("https://")


def test_the_licence_of_an_endpoint() -> None:
    assert licences.licence_of_endpoint("https://api.openai.com/v1#gpt-4o") == "openai"
    assert licences.licence_of_endpoint("http://127.0.0.1:8000/v1#student") is None


@pytest.mark.parametrize(
    ("licence", "names", "allows"),
    [
        ("MIT AND Apache-2.0", ["MIT", "Apache-2.0"], True),
        ("MIT AND openai", ["MIT", "openai"], False),
        ("MIT AND my-own", ["MIT", "my-own"], None),
        ("my-own AND openai", ["my-own", "openai"], False),
        ("MIT OR openai", ["MIT OR openai"], True),
        ("my-own OR openai", ["my-own OR openai"], None),
        ("(MIT OR openai) AND PSF-2.0", ["MIT OR openai", "PSF-2.0"], True),
        ("(MIT)", ["MIT"], True),
        (None, [], None),
    ],
)
def test_expressions_of_several_licences(licence: str | None, names: list[str], allows: bool | None) -> None:
    assert licences.licence_names(licence) == names
    assert licences.allows_distillation(licence) is allows


def test_joined_licences_occur_once() -> None:
    assert licences.join_licences([None, "MIT", "mit AND openai", None, "PSF-2.0 OR GPL-3.0"]) == (
        "mit AND openai AND (PSF-2.0 OR GPL-3.0)"
    )
    assert licences.join_licences([None]) is None
    assert licences.join_licences(["MIT OR GPL-3.0"]) == "MIT OR GPL-3.0"


def test_the_lineage_ends_at_a_deleted_ancestor(store: Store, make_folder: Callable[..., Path]) -> None:
    teacher = store.register(NewVersion(name="a", kind="teacher", licence="mit"), make_folder("t"))
    licence = {"teacher_licence": "mit", "licence_allows_distillation": True}
    student = store.register(NewVersion(name="a", kind="student", parent=teacher.ref, **licence), make_folder("s"))

    def teachers() -> list[tuple[str, bool | None]]:
        terms = licences.lineage_licences(store, student)
        return [(each.origin, each.allows_distillation) for each in terms if each.role == "teacher"]

    assert teachers() == [("a/1", True)]
    store.client.delete_model_version("a", "1")
    assert teachers() == [("a/1", True), ("a/1, which was deleted", None)]


def test_what_a_registered_student_was_made_from_is_unknown(store: Store, make_folder: Callable[..., Path]) -> None:
    student = store.register(NewVersion(name="a", kind="student"), make_folder("s"))
    variant = store.register(student.onnx_variant("fp32"), make_folder("v", onnx=True))
    unknown = [
        licences.LineageLicence("teacher", "a/1", licences.UNKNOWN_TEACHER, None, None),
        licences.LineageLicence("data", "a/1", licences.UNKNOWN_TEXT, None, None),
    ]
    assert licences.lineage_licences(store, student) == licences.lineage_licences(store, variant) == unknown
    teacher = store.register(NewVersion(name="a", kind="teacher"), make_folder("t"))
    assert licences.lineage_licences(store, teacher) == []
