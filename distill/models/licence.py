"""The licence of a model: its card's, the registry's, and those of what went into it."""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import Version


def licence_of_model(model: ResolvedModel) -> str | None:
    """The licence of a model, as the registry or its own card states it, or None."""
    return model.version.licence if model.version else licence_of_card(model.path)


def licence_of_card(folder: Path) -> str | None:
    """The licence that the card of a model or data set states, or None."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None
    licence = data.get("license_name") if data.license == "other" else data.license
    if isinstance(data.license, list):  # of a data set's parts
        return licences.join_licences(map(str, data.license))
    return str(licence or data.license) if data.license else None


def version_of_model(store: Store, model: ResolvedModel) -> Version | None:
    """The version that a model is: as it was named, else the student that has the very files of its folder."""
    if model.version or model.endpoint:
        return model.version
    return next((v for v in store.versions() if v.digest == model.digest and v.kind == "student"), None)


def inherited_terms(store: Store, model: ResolvedModel) -> tuple[LineageLicence, ...]:
    """The licences of what went into a model, as far as the registry knows it."""
    version = version_of_model(store, model)
    return tuple(licences.lineage_licences(store, version)) if version else ()
