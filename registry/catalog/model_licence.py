"""The licence of a model, from its card or the registry, and the licences of its lineage."""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import Version


def licence_of_model(model: ResolvedModel) -> str | None:
    """The licence of a model, from the registry or its own card; None if neither states it."""
    return model.version.licence if model.version else licence_of_card(model.path)


def licence_of_card(folder: Path) -> str | None:
    """The licence in the card of a model or data set; None if it states none."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None
    licence = data.get("license_name") if data.license == "other" else data.license
    if isinstance(data.license, list):  # one for each part of a data set
        return licences.join_licences(map(str, data.license))
    return str(licence or data.license) if data.license else None


def version_of_model(store: Store, model: ResolvedModel) -> Version | None:
    """The registered version of a model: the one it was named by, or a student with the same files; else None."""
    if model.version or model.endpoint:
        return model.version
    return next((v for v in store.versions() if v.digest == model.digest and v.kind == "student"), None)


def inherited_terms(store: Store, model: ResolvedModel) -> tuple[LineageLicence, ...]:
    """The licences of a model's lineage; empty if the model is not registered."""
    version = version_of_model(store, model)
    return tuple(licences.lineage_licences(store, version)) if version else ()
