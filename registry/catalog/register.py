"""Registers a checkpoint or an exported artifact that exists already as a version, with its lineage and licence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.registry.catalog.lineage import made_from_ref
from limbeck.registry.catalog.model_licence import licence_of_model, version_of_model
from limbeck.registry.catalog.model_ref import REGISTERED, ResolvedModel, resolve_model
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.digest import MANIFEST, read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.toml import describe_error
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.records import Kind, NewVersion, Parity, Version

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # of the weights of a PyTorch model


@dataclass(frozen=True)
class Statement:
    """What the user states about a model that is registered.

    Attributes:
        name: of the registered model.
        kind: of a PyTorch model; None for a student, or for what its files are registered as already.
        parent: MODEL: the teacher of a student, or the PyTorch model of an ONNX artifact; None if not stated.
        licence: None for that of the model's card.
        data_licence: of its training text; None if unknown.
        trust_remote_code: run the Python code that comes with the model, as in transformers.
    """

    name: str
    kind: Kind | None = None
    parent: str | None = None
    licence: str | None = None
    data_licence: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Registration:
    """A registered version; `is_new` is False if its files were registered under this name already."""

    version: Version
    is_new: bool


def register_model(store: Store, model: ResolvedModel, statement: Statement) -> Registration:
    """Register the files of a model as a version.

    A PyTorch model is loaded once, to be sure that it can be. An ONNX artifact has to have the manifest of
    `limbeck export`; its parity comes from there. The same files again give the same version: what was unknown about
    it is added, and what is recorded stays.

    Raises:
        BadInput: the model cannot be registered, the parent is not registered, or the statement contradicts a record.
        DamagedArtifact: the files differ from the manifest.
    """
    if model.engine == "endpoint":
        raise BadInput(f"{model.label} is an endpoint, which has no files to register", fix="name it in a recipe")
    is_onnx = model.engine == "onnxruntime"
    if is_onnx and statement.kind:
        raise BadInput(f"{model.label} is an ONNX artifact; --kind is for PyTorch models", fix="leave --kind out")
    existing = store.find_version(statement.name, digest=model.digest)
    if existing and not is_onnx:
        _require_equal(existing.ref, "kind", existing.kind, statement.kind)
        statement = replace(statement, kind=existing.kind)
    new = _describe_artifact(store, model, statement) if is_onnx else _describe_checkpoint(store, model, statement)
    if existing:
        version = _complete(store, existing, new, statement)
    else:
        if not is_onnx:
            new = new.model_copy(update=_loaded_facts(model, statement.trust_remote_code))
        version = store.register(new, model.path)
    if is_onnx and (parity := _parity(model)) and store.findings.parity(version) is None:
        store.findings.add_parity(version, parity)
    return Registration(version, existing is None)


def describe_unknown_lineage(version: Version) -> list[str]:
    """What is unknown about a version's origin, what the gate says about it, and how to state it; a line each."""
    again = f"limbeck register FOLDER --name {version.name}"
    lines = []
    if version.kind != "teacher" and version.teacher is None and version.parent is None:
        if version.kind == "onnx":
            what, fix = "its PyTorch model is not registered", f"register that, then run this again: {again}"
        else:
            what, fix = "its teacher is unknown", f"state it: {again} --parent MODEL"
        lines.append(f"{what}: rules on the teacher's licence are inconclusive; {fix}")
    if version.licence is None:
        rules = "rules on licences are inconclusive for models that learn from it"
        lines.append(f"its licence is unknown: {rules}; state it: {again} --licence SPDX")
    return lines


def _describe_checkpoint(store: Store, model: ResolvedModel, statement: Statement) -> NewVersion:
    """The record of a PyTorch model, without what only loading it shows."""
    kind = statement.kind or (model.version.kind if model.version else "student")
    new = NewVersion(name=statement.name, kind=kind)
    original = version_of_model(store, model)  # the same files, registered under another name
    if kind == "teacher":
        if statement.parent:
            raise BadInput(
                "a teacher has no --parent", fix="leave it out, or register a student: it can be a teacher too"
            )
        parent = original.ref if original else None  # as for the teacher of a recipe
        new = new.model_copy(update={"recipe": "teacher", "parent": parent})
    elif statement.parent:
        new = new.model_copy(update=_fields_of_teacher(store, _parent(store, model, statement.parent)))
    elif original and original.kind == kind:
        new = _record_of(original, statement.name)
    return _add_licences(new, model, statement)


def _fields_of_teacher(store: Store, teacher: Version) -> dict[str, Any]:
    """The lineage of a student of `teacher`: the licences of the teacher and of its own teachers."""
    terms = [each for each in licences.lineage_licences(store, teacher) if each.role != "data"]
    own = licences.allows_distillation(teacher.licence)
    return {
        "parent": teacher.ref,
        "teacher": teacher.ref,
        "teacher_licence": licences.join_licences([teacher.licence, *(each.licence for each in terms)]),
        "licence_allows_distillation": licences.all_allow([own, *(each.allows_distillation for each in terms)]),
    }


def _describe_artifact(store: Store, model: ResolvedModel, statement: Statement) -> NewVersion:
    """The record of an ONNX artifact: that of its PyTorch model, if it is registered."""
    manifest = read_manifest(model.path)
    reference, precision = manifest.get("parent"), manifest.get("precision")
    if not isinstance(reference, str) or not isinstance(precision, str):
        raise BadInput(
            f"{model.label} was not exported by Limbeck: it has no {MANIFEST} with its PyTorch model",
            fix="register the PyTorch model, then: limbeck export NAME/VERSION",
        )
    parent: Version | None
    if statement.parent:
        parent = _parent(store, model, statement.parent)
        if parent.digest != reference:
            raise BadInput(
                f"{model.label} was exported from files with the digest {reference[:12]}, and {parent.ref} has "
                f"{parent.digest[:12]}",
                fix="leave --parent out: the manifest names it",
            )
    else:
        found = _versions_of_files(store, reference, statement.name)
        parent = found[0] if found else None
    if parent is None:
        new = NewVersion(name=statement.name, kind="onnx", engine="onnxruntime", precision=precision)
    else:
        new = parent.onnx_variant(precision).model_copy(update={"name": statement.name})
        _require_equal(parent.ref, "licence", parent.licence, statement.licence)
        _require_equal(parent.ref, "data_licence", parent.data_licence, statement.data_licence)
    return _add_licences(new, model, statement)


def _add_licences(new: NewVersion, model: ResolvedModel, statement: Statement) -> NewVersion:
    """The record with the licences that are stated, else those that it has, else that of the model's card."""
    licence = statement.licence or new.licence or licence_of_model(model)
    return new.model_copy(update={"licence": licence, "data_licence": statement.data_licence or new.data_licence})


def _record_of(version: Version, name: str) -> NewVersion:
    """The record of the same files under another name."""
    return NewVersion(**version.model_dump(include=set(NewVersion.model_fields)) | {"name": name})


def _parent(store: Store, model: ResolvedModel, text: str) -> Version:
    """The registered PyTorch model or endpoint that --parent names. Raises BadInput if it is none."""
    if REGISTERED.fullmatch(text) and not (Path(text).expanduser() / "config.json").exists():
        parent = store.get(text)
    else:
        found = resolve_model(text, store)
        versions = [found.version] if found.version else _versions_of_files(store, found.digest, "")
        if not versions:
            raise BadInput(
                f"--parent {text} is not registered", fix=f"register it first: limbeck register {text} --name NAME"
            )
        parent = versions[0]
    if parent.kind == "onnx":
        raise BadInput(f"--parent {text} is an ONNX artifact", fix="name the PyTorch model that it came from")
    if parent.digest == model.digest:
        raise BadInput(f"--parent {text} has the same files as {model.label}", fix="name the model that it came from")
    return parent


def _versions_of_files(store: Store, digest: str, name: str) -> list[Version]:
    """The PyTorch versions with these files: those of `name` first, then oldest first."""
    found = [version for version in store.versions() if version.digest == digest and version.kind != "onnx"]
    return sorted(found, key=lambda version: (version.name != name, version.created))


def _loaded_facts(model: ResolvedModel, trust_remote_code: bool) -> dict[str, Any]:
    """Load a PyTorch model with its tokenizer; returns its parameters and precision."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "label": model.label}
    config = load_config(model.path, **options)
    load_tokenizer(model.path, **options)
    parameters = sum(each.numel() for each in load_model(model.path, **options).parameters())
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    return {"params": parameters, "precision": PRECISIONS.get(dtype, dtype)}


def _parity(model: ResolvedModel) -> Parity | None:
    """The parity in the manifest of an ONNX artifact; None if it has none. Raises DamagedArtifact."""
    recorded = read_manifest(model.path).get("parity")
    if recorded is None:
        return None
    try:
        return Parity.model_validate(recorded)
    except ValidationError as error:
        problem = f"the parity of {MANIFEST} is invalid: {describe_error(error.errors()[0])}"
        raise DamagedArtifact(model.path, [problem]) from None


def _complete(store: Store, existing: Version, new: NewVersion, statement: Statement) -> Version:
    """The existing version of the same files, with what was unknown about it; its ONNX variants get the same."""
    _require_equal(existing.ref, "licence", existing.licence, statement.licence)
    _require_equal(existing.ref, "data_licence", existing.data_licence, statement.data_licence)
    made_from = made_from_ref(existing)
    _require_equal(existing.ref, "parent", made_from, new.parent if statement.parent else None)
    fields = {"licence", "data_licence"}
    if made_from is None:
        fields |= {"parent", "teacher", "teacher_licence", "licence_allows_distillation"}
    licences.fill_missing_fields(store, existing, new.model_dump(include=fields))
    return store.get(existing.ref)


def _require_equal(ref: str, field: str, recorded: str | None, stated: str | None) -> None:
    """Raise BadInput if something is recorded and something else is stated."""
    if recorded is not None and stated is not None and recorded != stated:
        raise BadInput(
            f"the {field.replace('_', ' ')} of {ref} is recorded as {recorded}, not {stated}",
            fix=f"leave --{field.replace('_', '-')} out, or register under another --name",
        )
