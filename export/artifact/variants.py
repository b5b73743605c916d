"""The ONNX variants of a model: exported, held against PyTorch, then kept in a folder or the registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from limbeck.export.artifact.export import PRECISIONS, export
from limbeck.export.artifact.parity import compare, faults
from limbeck.export.quantize.quantize import Settings
from limbeck.registry.core.digest import folder_digest, read_manifest, told_fields, verify, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Refused
from limbeck.registry.core.home import home, written_whole
from limbeck.registry.core.jsonl import rows, training_text
from limbeck.registry.records import Parity, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

# What a variant is under as its student is.
LICENCES = {
    "licence", "licence_allows_distillation", "teacher_licence", "data_licence", "code_licence",
    "base_model", "base_model_digest", "base_model_licence",
}  # fmt: skip
NO_KERNEL = re.compile(r"Could not find an implementation for (\w+)")


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

    def row(self) -> dict[str, Any]:
        """The variant as JSON-able fields."""
        return asdict(self) | {"parity": self.parity and self.parity.model_dump(mode="json")}


def export_version(
    store: Store,
    parent: Version,
    precisions: Sequence[str],
    texts: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    tell: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> list[Variant]:
    """Register the ONNX variants of a registered PyTorch version; those that are there are skipped.

    Each is a version of the same name with `parent` as its parent and with its parity.
    Raises Refused, before anything is registered, where the fp32 graph does not give what PyTorch gives.
    """
    variants = {}
    missing = []
    settings = replace(settings or Settings(), tell=tell)
    for precision in _in_order(precisions):
        version = store.find(parent.name, kind="onnx", parent=parent.ref, precision=precision)
        if version and not _as_asked(read_manifest(store.folder(version)), precision, settings):
            version = None
        parity = store.parity(version) if version else None
        if version and parity:
            tell(f"{parent.ref} {precision}: already exported as {version.ref}")
            variants[precision] = _registered(store, version, parity, new=False)
        else:
            missing.append(precision)
    if missing:
        lineage = {
            "model": parent.ref,
            **parent.model_dump(include={"teacher", "recipe", "recipe_digest", "data_digest", *LICENCES}),
        }
        source = store.folder(parent)
        with TemporaryDirectory(dir=home(), prefix="export-") as temporary:
            made = _make(source, Path(temporary), missing, texts, settings, lineage, parent.ref, trust_remote_code)
            for precision, parity in made.items():
                version = store.register(
                    parent.name,
                    Path(temporary) / precision,
                    kind="onnx",
                    engine="onnxruntime",
                    precision=precision,
                    parent=parent.ref,
                    teacher=parent.teacher,
                    recipe=parent.recipe,
                    recipe_digest=parent.recipe_digest,
                    family=parent.family,
                    control=parent.control,
                    data_digest=parent.data_digest,
                    code_version=parent.code_version,
                    **parent.model_dump(include=LICENCES),
                    params=parent.params,
                    run_id=parent.run_id,
                )
                store.add_parity(version, parity)
                tell(f"{parent.ref} {precision}: registered as {version.ref}")
                variants[precision] = _registered(store, version, parity, new=True)
    return [variants[precision] for precision in _in_order(precisions)]


def export_folder(
    model: Path,
    to: Path,
    precisions: Sequence[str],
    texts: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    tell: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> list[Variant]:
    """Write the ONNX variants of the checkpoint in `model` to `to/fp32`, `to/int8` and so on.

    Those that are there are skipped. Raises Refused where the fp32 graph does not give what PyTorch gives,
    BadInput where something else is in the way.
    """
    parent = folder_digest(model)
    variants = {}
    missing = []
    settings = replace(settings or Settings(), tell=tell)
    for precision in _in_order(precisions):
        folder = to / precision
        manifest = read_manifest(folder)
        if _is_export(folder, parent) and _as_asked(manifest, precision, settings):
            tell(f"{model} {precision}: already exported to {folder}")
            variants[precision] = _in_folder(folder, model, new=False)
        elif folder.exists() and not manifest and any(folder.iterdir()):
            raise BadInput(f"{folder} holds something else", fix="choose another folder with --to")
        else:
            missing.append(precision)
    for precision in _make(model, to, missing, texts, settings, {}, str(model), trust_remote_code):
        variants[precision] = _in_folder(to / precision, model, new=True)
    return [variants[precision] for precision in _in_order(precisions)]


def settings_for(
    version: Version | None,
    *,
    calibration: Path | None = None,
    texts: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    max_change: float = Settings.max_change,
) -> Settings:
    """Quantization by the text in `calibration`, else by what the version was trained on where it is at hand, else by
    the held-out `texts`, else by short passages."""
    trained = training_text(version.data_digest) if version and version.data_digest else None
    for corpus, source in ((calibration, "--calibration"), (trained, "the recipe's training text"), (texts, "--texts")):
        if corpus:
            return Settings(read_texts(corpus), source, max_change, device)
    return Settings(max_change=max_change, device=device)


def read_texts(corpus: Path, limit: int = 64) -> list[str]:
    """The first texts of a corpus, a file with {"path": ..., "text": ...} a line.

    Raises BadInput, naming the line.
    """
    texts = [text for (text,) in rows(corpus, ("text",), limit)]
    if not texts:
        raise BadInput(f"{corpus} is empty")
    return texts


def _in_order(precisions: Sequence[str]) -> list[str]:
    """fp32 first: the others are made from it."""
    return sorted(dict.fromkeys(precisions), key=PRECISIONS.index)


def _make(
    model: Path,
    to: Path,
    precisions: Sequence[str],
    texts: Sequence[str] | None,
    settings: Settings,
    lineage: dict[str, Any],
    label: str,
    trust_remote_code: bool,
) -> dict[str, Parity]:
    """Write the variants `to/<precision>`, each with its parity in its manifest. The fp32 graph that the
    others are made from is made, and checked, even where it is not asked for, unless it is there."""
    if not precisions:
        return {}
    made = {}
    to.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=to, prefix=".export-") as temporary:
        fp32 = to / "fp32"
        made_before = "fp32" not in precisions and _is_export(fp32, folder_digest(model))
        if not made_before:
            fp32 = Path(temporary) / "fp32"
        for precision in _in_order(precisions if made_before else ["fp32", *precisions]):
            target = to / precision if precision in precisions else fp32
            settings.tell(f"{label} {precision}: exporting")
            with written_whole(target) as part, _kernels(label, precision):
                export(
                    model,
                    part,
                    precision,
                    fp32=None if precision == "fp32" else fp32,
                    settings=settings,
                    trust_remote_code=trust_remote_code,
                )
                parity = compare(model, part, *([texts] if texts else []), trust_remote_code=trust_remote_code)
                check(parity, label)
                fields = told_fields(read_manifest(part))
                extra = {"lineage": lineage} if lineage else {}
                write_manifest(part, **fields, **extra, parity=parity.model_dump(mode="json"))
            if precision == "fp32":
                fp32 = target
            if precision in precisions:
                made[precision] = parity
    return made


@contextmanager
def _kernels(label: str, precision: str) -> Iterator[None]:
    """Raise BadInput where onnxruntime has no kernel for an operator of the graph just written."""
    try:
        yield
    except DamagedArtifact as error:
        found = NO_KERNEL.search(str(error))
        if found is None:
            raise
        raise BadInput(
            f"{label} {precision}: onnxruntime has no kernel for the operator {found[1]} of this graph on this machine",
            fix="use another --precision" + ("" if precision == "fp32" else ", such as fp32"),
        ) from error


def _is_export(folder: Path, parent: str) -> bool:
    """Whether `folder` holds a variant of the model with the digest `parent` that was held against it."""
    manifest = read_manifest(folder)
    if manifest.get("parent") != parent or "parity" not in manifest:
        return False
    verify(folder)
    return True


def _as_asked(manifest: dict[str, Any], precision: str, settings: Settings) -> bool:
    """Whether a variant made before is what would be made now."""
    asked = manifest.get("quantization", {}).get("asked", {"device": "cpu"})
    return precision == "fp32" or asked == settings.asked(precision)


def check(parity: Parity, label: str) -> None:
    """Raise Refused, with the numbers, where a variant does not hold against PyTorch."""
    if not parity.passed:
        raise Refused(
            f"{label} {parity.precision}: the ONNX graph does not give what PyTorch gives: over "
            f"{parity.tokens} tokens, {'; '.join(faults(parity))}",
            fix="nothing was kept; this architecture is not exported faithfully",
        )


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in read_manifest(folder)["files"])


def _registered(store: Store, version: Version, parity: Parity, new: bool) -> Variant:
    folder = store.folder(version)
    quantization = read_manifest(folder).get("quantization")
    return Variant(
        version.ref, str(version.parent), version.precision, version.digest, _size(folder), parity, new, quantization
    )


def _in_folder(folder: Path, model: Path, new: bool) -> Variant:
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
