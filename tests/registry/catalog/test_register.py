"""Registering what was made elsewhere: checkpoints and ONNX artifacts, their lineage and licences."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.catalog.register import Registration, Statement, describe_unknown_lineage, register_model
from limbeck.registry.core.digest import folder_digest, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Parity, Version

Register = Callable[..., Registration]


@pytest.fixture
def register(store: Store) -> Register:
    """Registers a model as `made`, with the fields of `Statement`."""

    def run(model: Path | str, **stated: Any) -> Registration:
        statement = Statement(**{"name": "made"} | stated)
        return register_model(store, resolve_model(str(model), store), statement)

    return run


@pytest.fixture
def teacher(store: Store, make_folder: Callable[..., Path]) -> Version:
    """A registered teacher under MIT, of a file that no test loads."""
    return store.register(NewVersion(name="large", kind="teacher", licence="mit"), make_folder("teacher"))


@pytest.fixture
def make_onnx(make_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Creates an artifact with the manifest of `limbeck export`, made from the files with the digest `parent`."""

    def make(parent: str, **fields: Any) -> Path:
        folder = make_folder("variant", onnx=True)
        write_manifest(folder, **{"parent": parent, "precision": "int8-weight"} | fields)
        return folder

    return make


def test_a_student_with_its_teacher(
    register: Register, store: Store, tiny_llama: Path, teacher: Version, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "tuned")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tuned\n")
    done = register(folder, parent=teacher.ref)
    version = store.get("made/1")
    assert (done.version, done.is_new) == (version, True)
    assert (version.kind, version.engine, version.precision, version.digest) == (
        "student",
        "torch",
        "fp32",
        folder_digest(folder),
    )
    assert (version.parent, version.teacher, version.teacher_licence) == ("large/1", "large/1", "mit")
    assert (version.licence, version.licence_allows_distillation) == ("apache-2.0", True)
    assert version.params == sum(each.numel() for each in _load(folder).parameters())
    assert folder_digest(store.artifacts.verified_folder(version)) == version.digest
    assert describe_unknown_lineage(version) == []
    assert register(folder) == register(folder, parent=teacher.ref) == Registration(version, False)
    assert len(store.versions("made")) == 1


def test_what_was_unknown_is_added_and_what_is_recorded_stays(
    register: Register, store: Store, tiny_llama: Path, tiny_qwen2: Path, make_folder: Callable[..., Path]
) -> None:
    register(tiny_qwen2, name="large", kind="teacher", licence="mit")
    first = register(tiny_llama).version
    assert (first.parent, first.teacher, first.licence) == (None, None, None)
    teacher_line, licence_line = describe_unknown_lineage(first)
    assert teacher_line.startswith("its teacher is unknown: rules on the teacher's licence are inconclusive; ")
    assert "--licence SPDX" in licence_line
    variant = store.register(first.onnx_variant("fp32"), make_folder("variant", onnx=True))
    done = register(tiny_llama, parent=str(tiny_qwen2), licence="MIT", data_licence="x")
    assert (done.is_new, done.version.parent, done.version.licence) == (False, "large/1", "MIT")
    variant = store.get(variant.ref)
    assert (variant.parent, variant.teacher, variant.teacher_licence) == ("made/1", "large/1", "mit")
    assert (variant.licence, variant.data_licence) == ("MIT", "x")
    other = store.register(NewVersion(name="other", kind="teacher"), make_folder("other"))
    for contradiction, message in {
        "licence": "the licence of made/1 is recorded as MIT, not gpl",
        "data_licence": "the data licence of made/1 is recorded as x, not gpl",
        "parent": "the parent of made/1 is recorded as large/1, not other/1",
        "kind": "the kind of made/1 is recorded as student, not teacher",
    }.items():
        stated = {"licence": "gpl", "data_licence": "gpl", "parent": other.ref, "kind": "teacher"}[contradiction]
        with pytest.raises(BadInput, match=message):
            register(tiny_llama, **{contradiction: stated})
    assert store.get("made/1") == done.version


def test_a_teacher_is_registered_as_a_recipe_registers_it(register: Register, store: Store, tiny_llama: Path) -> None:
    version = register(tiny_llama, kind="teacher", licence="mit").version
    assert (version.kind, version.recipe, version.parent, version.teacher) == ("teacher", "teacher", None, None)
    of_recipe = NewVersion(name="made", kind="teacher", licence="mit", recipe="teacher", params=version.params)
    assert store.register(of_recipe, tiny_llama) == version
    with pytest.raises(BadInput, match="a teacher has no --parent"):
        register(tiny_llama, parent="made/1")
    student = register(tiny_llama, name="elsewhere").version
    assert register(tiny_llama, name="third", kind="teacher").version.parent == student.ref  # a copy of a student


def test_the_files_of_a_student_keep_its_lineage_under_another_name(
    register: Register, store: Store, tiny_llama: Path, teacher: Version
) -> None:
    first = register(tiny_llama, name="first", parent=teacher.ref, data_licence="cc-by-4.0").version
    lineage = {"parent", "teacher", "teacher_licence", "data_licence", "licence_allows_distillation", "params", "kind"}
    for name, model in (("second", tiny_llama), ("third", first.ref)):
        version = register(model, name=name, licence="mit").version
        assert version.model_dump(include=lineage) == first.model_dump(include=lineage)
        assert (version.name, version.licence) == (name, "mit")
    corrected = register(tiny_llama, name="fourth", data_licence="mit").version
    assert (corrected.parent, corrected.data_licence) == (teacher.ref, "mit")


def test_an_onnx_artifact_finds_its_pytorch_model(
    register: Register,
    store: Store,
    teacher: Version,
    make_onnx: Callable[..., Path],
    make_parity: Callable[..., Parity],
    make_folder: Callable[..., Path],
) -> None:
    student = store.register(
        NewVersion(name="made", kind="student", parent=teacher.ref, teacher=teacher.ref, licence="mit"),
        make_folder("student"),
    )
    parity = make_parity(reference=student.digest, precision="int8-weight")
    folder = make_onnx(student.digest, parity=parity.model_dump(mode="json"))
    done = register(folder)
    version = store.get("made/2")
    assert done == Registration(version, True)
    assert (version.kind, version.engine, version.precision) == ("onnx", "onnxruntime", "int8-weight")
    assert (version.parent, version.teacher, version.licence) == ("made/1", "large/1", "mit")
    assert store.findings.parity(version) == parity
    assert register(folder, parent=student.ref) == Registration(version, False)
    with pytest.raises(BadInput, match=f"was exported from files with the digest {student.digest[:12]}, and large/1"):
        register(folder, parent=teacher.ref)
    with pytest.raises(BadInput, match="the licence of made/1 is recorded as mit, not gpl"):
        register(folder, licence="gpl", name="other")


def test_an_onnx_artifact_whose_pytorch_model_comes_later(
    register: Register, store: Store, make_onnx: Callable[..., Path], make_folder: Callable[..., Path]
) -> None:
    student = make_folder("student")
    artifact = make_onnx(folder_digest(student))
    version = register(artifact).version
    assert (version.parent, store.findings.parity(version)) == (None, None)
    assert describe_unknown_lineage(version)[0].startswith("its PyTorch model is not registered")
    parent = store.register(NewVersion(name="made", kind="student", licence="mit"), student)
    again = register(artifact)
    assert (again.is_new, again.version.version, again.version.parent) == (False, version.version, parent.ref)
    assert again.version.licence == "mit"


def test_models_that_are_refused(
    register: Register, store: Store, tiny_llama: Path, make_onnx: Callable[..., Path], make_folder: Callable[..., Path]
) -> None:
    artifact = make_onnx("0" * 64)
    for model, stated, message in (
        (make_folder("foreign", onnx=True), {}, "was not exported by Limbeck"),
        (artifact, {"kind": "student"}, "--kind is for PyTorch models"),
        (artifact, {"parent": "absent/1"}, "no model is registered as 'absent'"),
        (artifact, {"parent": str(tiny_llama)}, "is not registered\n.*register it first"),
    ):
        with pytest.raises(BadInput, match=message):
            register(model, **stated)
    (artifact / "model.onnx").write_text("changed")
    with pytest.raises(DamagedArtifact):
        register(artifact)
    assert store.versions("made") == []


def test_a_checkpoint_that_cannot_be_loaded_is_not_registered(
    register: Register, store: Store, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "broken")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(BadInput, match="tokenizer"):
        register(folder)
    with pytest.raises(BadInput, match="has the same files as"):
        register(tiny_llama, parent=str(register(tiny_llama, name="first").version.ref))
    assert store.versions("made") == []


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
