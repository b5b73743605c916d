"""The ONNX variants of a model: exported, held against PyTorch, then kept in a folder or the registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from limbeck.export.artifact.export import PRECISIONS, export_onnx
from limbeck.export.artifact.parity import measure_parity, parity_failures
from limbeck.export.quantize.quantize import QuantizationSettings
from limbeck.registry.core.digest import (
    extra_manifest_fields,
    folder_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Refused
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.jsonl import find_training_text, read_rows
from limbeck.registry.records import NewVersion, Parity, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

# What a variant is under as its student is.
LICENCE_FIELDS = {
    "licence", "licence_allows_distillation", "teacher_licence", "data_licence", "code_licence",
    "base_model", "base_model_digest", "base_model_licence",
}  # fmt: skip
MISSING_KERNEL = re.compile(r"Could not find an implementation for (\w+)")


@dataclass(frozen=True)
class Variant:
    """One ONNX variant of a model, as `limbeck export` reports it."""

    model: str  # NAME/VERSION of the variant, or its folder
    parent: str  # NAME/VERSION or folder of the PyTorch model
    precision: str
    digest: str
    bytes: int
    parity: Parity | None
    new: bool  # False: it was there already
    quantization: dict[str, Any] | None = None  # what was chosen, and what was tried on the way

    def to_json(self) -> dict[str, Any]:
        """The variant as JSON-able fields."""
        return asdict(self) | {"parity": self.parity and self.parity.model_dump(mode="json")}


def export_version(
    store: Store,
    parent: Version,
    precisions: Sequence[str],
    texts: Sequence[str] | None = None,
    settings: QuantizationSettings | None = None,
    *,
    report: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> list[Variant]:
    """Register the ONNX variants of a registered PyTorch version; those that are there are skipped.

    Each is a version of the same name with `parent` as its parent and with its parity.
    Raises Refused, before anything is registered, where the fp32 graph does not give what PyTorch gives.
    """
    variants = {}
    missing = []
    settings = replace(settings or QuantizationSettings(), report=report)
    for precision in _fp32_first(precisions):
        version = store.find_version(parent.name, kind="onnx", parent=parent.ref, precision=precision)
        if version and not _has_same_settings(read_manifest(store.verified_folder(version)), precision, settings):
            version = None
        parity = store.parity(version) if version else None
        if version and parity:
            report(f"{parent.ref} {precision}: already exported as {version.ref}")
            variants[precision] = _variant_of_version(store, version, parity, new=False)
        else:
            missing.append(precision)
    if missing:
        lineage = {
            "model": parent.ref,
            **parent.model_dump(include={"teacher", "recipe", "recipe_digest", "data_digest", *LICENCE_FIELDS}),
        }
        source = store.verified_folder(parent)
        with TemporaryDirectory(dir=home(), prefix="export-") as temporary:
            made = _make(source, Path(temporary), missing, texts, settings, lineage, parent.ref, trust_remote_code)
            for precision, parity in made.items():
                version = store.register(_new_version(parent, precision), Path(temporary) / precision)
                store.add_parity(version, parity)
                report(f"{parent.ref} {precision}: registered as {version.ref}")
                variants[precision] = _variant_of_version(store, version, parity, new=True)
    return [variants[precision] for precision in _fp32_first(precisions)]


def _new_version(parent: Version, precision: str) -> NewVersion:
    """The ONNX variant of a version in a precision: all its other fields are its parent's."""
    made_from = parent.model_dump(include=set(NewVersion.model_fields))
    variant = {"kind": "onnx", "engine": "onnxruntime", "precision": precision, "parent": parent.ref}
    return NewVersion(**made_from | variant)


def export_folder(
    model: Path,
    output_folder: Path,
    precisions: Sequence[str],
    texts: Sequence[str] | None = None,
    settings: QuantizationSettings | None = None,
    *,
    report: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> list[Variant]:
    """Write the ONNX variants of the checkpoint in `model` to `to/fp32`, `to/int8` and so on.

    Those that are there are skipped. Raises Refused where the fp32 graph does not give what PyTorch gives,
    BadInput where something else is in the way.
    """
    parent = folder_digest(model)
    variants = {}
    missing = []
    settings = replace(settings or QuantizationSettings(), report=report)
    for precision in _fp32_first(precisions):
        folder = output_folder / precision
        manifest = read_manifest(folder)
        if _is_checked_export(folder, parent) and _has_same_settings(manifest, precision, settings):
            report(f"{model} {precision}: already exported to {folder}")
            variants[precision] = _variant_in_folder(folder, model, new=False)
        elif folder.exists() and not manifest and any(folder.iterdir()):
            raise BadInput(f"{folder} holds something else", fix="choose another folder with --to")
        else:
            missing.append(precision)
    for precision in _make(model, output_folder, missing, texts, settings, {}, str(model), trust_remote_code):
        variants[precision] = _variant_in_folder(output_folder / precision, model, new=True)
    return [variants[precision] for precision in _fp32_first(precisions)]


def quantization_settings(
    version: Version | None,
    *,
    calibration: Path | None = None,
    texts: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    max_change: float = QuantizationSettings.max_change,
) -> QuantizationSettings:
    """Quantization by the text in `calibration`, else by what the version was trained on where it is at hand, else by
    the held-out `texts`, else by short passages."""
    trained = find_training_text(version.data_digest) if version and version.data_digest else None
    for corpus, source in ((calibration, "--calibration"), (trained, "the recipe's training text"), (texts, "--texts")):
        if corpus:
            return QuantizationSettings(read_texts(corpus), source, max_change, device)
    return QuantizationSettings(max_change=max_change, device=device)


def read_texts(corpus: Path, limit: int = 64) -> list[str]:
    """The first texts of a corpus, a file with {"path": ..., "text": ...} a line.

    Raises BadInput, naming the line.
    """
    texts = [text for (text,) in read_rows(corpus, ("text",), limit)]
    if not texts:
        raise BadInput(f"{corpus} is empty")
    return texts


def _fp32_first(precisions: Sequence[str]) -> list[str]:
    """fp32 first: the others are made from it."""
    return sorted(dict.fromkeys(precisions), key=PRECISIONS.index)


def _make(
    model: Path,
    output_folder: Path,
    precisions: Sequence[str],
    texts: Sequence[str] | None,
    settings: QuantizationSettings,
    lineage: dict[str, Any],
    label: str,
    trust_remote_code: bool,
) -> dict[str, Parity]:
    """Write the variants `to/<precision>`, each with its parity in its manifest. The fp32 graph that the
    others are made from is made, and checked, even where it is not asked for, unless it is there."""
    if not precisions:
        return {}
    made = {}
    output_folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_folder, prefix=".export-") as temporary:
        fp32 = output_folder / "fp32"
        made_before = "fp32" not in precisions and _is_checked_export(fp32, folder_digest(model))
        if not made_before:
            fp32 = Path(temporary) / "fp32"
        for precision in _fp32_first(precisions if made_before else ["fp32", *precisions]):
            target = output_folder / precision if precision in precisions else fp32
            settings.report(f"{label} {precision}: exporting")
            with atomic_write(target) as part, _explain_missing_kernel(label, precision):
                export_onnx(
                    model,
                    part,
                    precision,
                    fp32_artifact=None if precision == "fp32" else fp32,
                    settings=settings,
                    trust_remote_code=trust_remote_code,
                )
                parity = measure_parity(model, part, *([texts] if texts else []), trust_remote_code=trust_remote_code)
                require_parity(parity, label)
                fields = extra_manifest_fields(read_manifest(part))
                extra = {"lineage": lineage} if lineage else {}
                write_manifest(part, **fields, **extra, parity=parity.model_dump(mode="json"))
            if precision == "fp32":
                fp32 = target
            if precision in precisions:
                made[precision] = parity
    return made


@contextmanager
def _explain_missing_kernel(label: str, precision: str) -> Iterator[None]:
    """Raise BadInput where onnxruntime has no kernel for an operator of the graph just written."""
    try:
        yield
    except DamagedArtifact as error:
        found = MISSING_KERNEL.search(str(error))
        if found is None:
            raise
        raise BadInput(
            f"{label} {precision}: onnxruntime has no kernel for the operator {found[1]} of this graph on this machine",
            fix="use another --precision" + ("" if precision == "fp32" else ", such as fp32"),
        ) from error


def _is_checked_export(folder: Path, parent: str) -> bool:
    """Whether `folder` holds a variant of the model with the digest `parent` that was held against it."""
    manifest = read_manifest(folder)
    if manifest.get("parent") != parent or "parity" not in manifest:
        return False
    verify_files(folder)
    return True


def _has_same_settings(manifest: dict[str, Any], precision: str, settings: QuantizationSettings) -> bool:
    """Whether a variant made before is what would be made now."""
    asked = manifest.get("quantization", {}).get("asked", {"device": "cpu"})
    return precision == "fp32" or asked == settings.requested_settings(precision)


def require_parity(parity: Parity, label: str) -> None:
    """Raise Refused, with the numbers, where a variant does not hold against PyTorch."""
    if not parity.passed:
        raise Refused(
            f"{label} {parity.precision}: the ONNX graph does not give what PyTorch gives: over "
            f"{parity.tokens} tokens, {'; '.join(parity_failures(parity))}",
            fix="nothing was kept; this architecture is not exported faithfully",
        )


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in read_manifest(folder)["files"])


def _variant_of_version(store: Store, version: Version, parity: Parity, new: bool) -> Variant:
    folder = store.verified_folder(version)
    quantization = read_manifest(folder).get("quantization")
    return Variant(
        version.ref, str(version.parent), version.precision, version.digest, _size(folder), parity, new, quantization
    )


def _variant_in_folder(folder: Path, model: Path, new: bool) -> Variant:
    manifest = read_manifest(folder)
    parity = Parity.model_validate(manifest["parity"])
    return Variant(
        str(folder),
        str(model),
        manifest["precision"],
        manifest["digest"],
        _size(folder),
        parity,
        new,
        manifest.get("quantization"),
    )
