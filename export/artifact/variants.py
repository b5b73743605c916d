"""The ONNX variants of a model: export them, check parity with PyTorch, and store them in a folder or the registry."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from limbeck.export.artifact.export import Engine, export_onnx
from limbeck.export.artifact.parity import measure_parity, parity_failures, quality_failures
from limbeck.export.quantize.precisions import PRECISIONS
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.registry.core.digest import (
    extra_manifest_fields,
    folder_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Refused
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.records import Parity, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

# Fields of the parent version in the manifest of a variant, as `lineage`.
LINEAGE_FIELDS = {
    "teacher", "recipe", "recipe_digest", "data_digest",
    "licence", "licence_allows_distillation", "teacher_licence", "data_licence", "code_licence",
    "base_model", "base_model_digest", "base_model_licence",
}  # fmt: skip
MISSING_KERNEL = re.compile(r"Could not find an implementation for (\w+)")


@dataclass(frozen=True)
class ExportOptions:
    """How variants are made and checked.

    Attributes:
        texts: held-out text for parity; None takes the passages that come with Limbeck.
        quantization: settings of the quantized variants; `quantization.report` gets the lines of progress.
        trust_remote_code: run the Python code that comes with the model, as in transformers.
        engine: makes the graph; None takes "fused" if the model has a fused graph, else "optimum".
    """

    texts: Sequence[str] | None = None
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    trust_remote_code: bool = False
    engine: Engine | None = None


@dataclass(frozen=True)
class Variant:
    """One ONNX variant of a model, as `limbeck export` reports it.

    Attributes:
        model: NAME/VERSION of the variant, or its folder.
        parent: NAME/VERSION or folder of the PyTorch model.
        bytes: total size of its files.
        new: False if it already existed.
        graph: "fused" or "optimum".
        graph_reason: why a model got optimum's graph without asking for it; else None.
        quantization: `quantization` of the manifest: settings, choice and trials; None for fp32.
    """

    model: str
    parent: str
    precision: str
    digest: str
    bytes: int
    parity: Parity
    new: bool
    graph: str
    graph_reason: str | None = None
    quantization: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return asdict(self) | {"parity": self.parity.model_dump(mode="json")}


def export_version(
    store: Store, parent: Version, precisions: Sequence[str], options: ExportOptions | None = None
) -> list[Variant]:
    """Register the ONNX variants of a registered PyTorch version; existing ones are skipped.

    Each becomes a version of the same name, with `parent` as its parent and with its parity.

    Raises Refused, before anything is registered, if the results of a variant differ from PyTorch's.
    """
    options = options or ExportOptions()
    variants = {}
    missing = []
    for precision in _fp32_first(precisions):
        existing = _registered_variant(store, parent, precision, options)
        if existing:
            options.quantization.report(f"{parent.ref} {precision}: already exported as {existing.model}")
            variants[precision] = existing
        else:
            missing.append(precision)
    if missing:
        source = store.artifacts.verified_folder(parent)
        lineage = {"model": parent.ref, **parent.model_dump(include=LINEAGE_FIELDS)}
        with TemporaryDirectory(dir=home(), prefix="export-") as temporary:
            parities = _write_variants(source, Path(temporary), missing, options, parent.ref, lineage)
            for precision, parity in parities.items():
                variants[precision] = _register(store, parent, Path(temporary) / precision, precision, parity)
                options.quantization.report(f"{parent.ref} {precision}: registered as {variants[precision].model}")
    return [variants[precision] for precision in _fp32_first(precisions)]


def export_folder(
    model: Path, output_folder: Path, precisions: Sequence[str], options: ExportOptions | None = None
) -> list[Variant]:
    """Write the ONNX variants of the checkpoint `model` to `output_folder`/PRECISION; existing ones are skipped.

    Raises:
        Refused: the results of a variant differ from PyTorch's.
        BadInput: a target folder holds something else.
    """
    options = options or ExportOptions()
    parent = folder_digest(model)
    variants = {}
    missing = []
    for precision in _fp32_first(precisions):
        folder = output_folder / precision
        manifest = read_manifest(folder)
        if _is_checked_export(folder, parent) and _has_same_settings(manifest, precision, options):
            options.quantization.report(f"{model} {precision}: already exported to {folder}")
            variants[precision] = _variant_in_folder(folder, model, new=False)
        elif folder.exists() and not manifest and any(folder.iterdir()):
            raise BadInput(f"{folder} holds something else", fix="choose another folder with --output")
        else:
            missing.append(precision)
    for precision in _write_variants(model, output_folder, missing, options, str(model)):
        variants[precision] = _variant_in_folder(output_folder / precision, model, new=True)
    return [variants[precision] for precision in _fp32_first(precisions)]


def require_parity(parity: Parity, label: str) -> None:
    """Raise Refused, with the numbers, if a variant did not pass."""
    label = f"{label} {parity.precision}"
    if broken := parity_failures(parity):
        raise Refused(
            f"{label}: the ONNX graph differs from PyTorch: over {parity.tokens} tokens, {'; '.join(broken)}",
            fix="nothing was stored; this architecture is not exported correctly",
        )
    if too_far := quality_failures(parity):
        allowed = max(0.01, math.ceil(105 * parity.quality["bits_per_byte_change"].high) / 100)
        other = "int8-weight" if parity.precision == "int4" else "fp32"
        raise Refused(
            f"{label}: too far from PyTorch: over {parity.tokens} tokens of {parity.documents} texts, with 95% "
            f"intervals, {'; '.join(too_far)}",
            fix=f"nothing was stored; use {other}, or allow more bits per byte: --max-change {allowed:g}",
        )


def _fp32_first(precisions: Sequence[str]) -> list[str]:
    """Return the distinct precisions in the order of the table: fp32 first, since the others are made from it."""
    return [precision for precision in PRECISIONS if precision in precisions]


def _write_variants(
    model: Path,
    output_folder: Path,
    precisions: Sequence[str],
    options: ExportOptions,
    label: str,
    lineage: dict[str, Any] | None = None,
) -> dict[str, Parity]:
    """Write the variants to `output_folder`/<precision>, each with its parity in its manifest. Returns the parities.

    The others are made from the fp32 variant. If fp32 is not requested and does not exist, it is made and checked in a
    temporary folder.
    """
    if not precisions:
        return {}
    parities = {}
    output_folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_folder, prefix=".export-") as temporary:
        fp32 = output_folder / "fp32"
        steps = list(precisions)
        if "fp32" not in precisions and not _is_usable_fp32(fp32, folder_digest(model), options):
            fp32 = Path(temporary) / "fp32"
            steps.append("fp32")
        for precision in _fp32_first(steps):
            options.quantization.report(f"{label} {precision}: exporting")
            target = fp32 if precision == "fp32" else output_folder / precision
            parity = _write_variant(model, target, precision, fp32, options, label, lineage)
            if precision in precisions:
                parities[precision] = parity
    return parities


def _write_variant(
    model: Path,
    target: Path,
    precision: str,
    fp32: Path,
    options: ExportOptions,
    label: str,
    lineage: dict[str, Any] | None,
) -> Parity:
    """Write one variant to `target`, unless its results differ from PyTorch's. Returns its parity."""
    with atomic_write(target) as part, _explain_missing_kernel(label, precision):
        export_onnx(
            model,
            part,
            precision,
            fp32_artifact=None if precision == "fp32" else fp32,
            settings=options.quantization,
            engine=options.engine,
            trust_remote_code=options.trust_remote_code,
        )
        texts = options.texts or SAMPLE_TEXTS
        parity = measure_parity(model, part, texts, trust_remote_code=options.trust_remote_code)
        require_parity(parity, label)
        fields = extra_manifest_fields(read_manifest(part))
        if lineage:
            fields["lineage"] = lineage
        write_manifest(part, **fields, parity=parity.model_dump(mode="json"))
    return parity


@contextmanager
def _explain_missing_kernel(label: str, precision: str) -> Iterator[None]:
    """Raise BadInput if onnxruntime has no kernel for an operator of the new graph."""
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
    """Return True if `folder` holds a variant of the model with digest `parent` that passed parity.

    Raises DamagedArtifact if its files were changed.
    """
    manifest = read_manifest(folder)
    if manifest.get("parent") != parent or "parity" not in manifest:
        return False
    verify_files(folder)
    return True


def _is_usable_fp32(folder: Path, parent: str, options: ExportOptions) -> bool:
    """Return True if `folder` holds an fp32 variant of the model with digest `parent` to make others from."""
    return _is_checked_export(folder, parent) and _has_same_settings(read_manifest(folder), "fp32", options)


def _has_same_settings(manifest: dict[str, Any], precision: str, options: ExportOptions) -> bool:
    """Return True if an existing variant was requested with the same settings, and made by an engine that will do."""
    if options.engine not in (None, manifest.get("graph")):
        return False
    requested = manifest.get("quantization", {}).get("requested")
    return precision == "fp32" or requested == PRECISIONS[precision].settings_for_manifest(options.quantization)


def _registered_variant(store: Store, parent: Version, precision: str, options: ExportOptions) -> Variant | None:
    """Return the newest registered variant of `parent` with this precision and the settings of `options`, or None."""
    for version in reversed(store.versions(parent.name)):
        if (version.kind, version.parent, version.precision) != ("onnx", parent.ref, precision):
            continue
        parity = store.findings.parity(version)
        if parity and _has_same_settings(read_manifest(store.artifacts.verified_folder(version)), precision, options):
            return _variant_of_version(store, version, parity, new=False)
    return None


def _register(store: Store, parent: Version, folder: Path, precision: str, parity: Parity) -> Variant:
    """Register a variant with its parity."""
    version = store.register(parent.onnx_variant(precision), folder)
    store.findings.add_parity(version, parity)
    return _variant_of_version(store, version, parity, new=True)


def _variant_of_version(store: Store, version: Version, parity: Parity, new: bool) -> Variant:
    manifest = read_manifest(store.artifacts.verified_folder(version))
    return Variant(
        version.ref,
        str(version.parent),
        version.precision,
        version.digest,
        _size(store.artifacts.verified_folder(version), manifest),
        parity,
        new,
        manifest["graph"],
        manifest.get("graph_reason"),
        manifest.get("quantization"),
    )


def _variant_in_folder(folder: Path, model: Path, new: bool) -> Variant:
    manifest = read_manifest(folder)
    return Variant(
        str(folder),
        str(model),
        manifest["precision"],
        manifest["digest"],
        _size(folder, manifest),
        Parity.model_validate(manifest["parity"]),
        new,
        manifest["graph"],
        manifest.get("graph_reason"),
        manifest.get("quantization"),
    )


def _size(folder: Path, manifest: dict[str, Any]) -> int:
    return sum((folder / name).stat().st_size for name in manifest["files"])
