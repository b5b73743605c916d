"""What went into a version, as a bill of materials in CycloneDX 1.6: files, models, data, code, packages, scores.

It is made from the records alone: one state of them gives the same bytes each time. A model's hash is its digest
(`registry.core.digest`, over the hashes of its files), a text's that of its documents, a recipe's that of what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from limbeck.registry.core.digest import artifact_digest, file_digests, json_digest, read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.provenance import licences
from limbeck.registry.records import Scorecard, Verdict, Version

Json = dict[str, Any]

MADE_WITH = TAG_PREFIX + "made_with"  # a tag of the run that made a version: package -> version, as JSON
COMMIT = re.compile(r"\+g([0-9a-f]{7,40})$")  # in the code version of a clone that has no changes
Z95 = 1.959964  # half of a 95% interval, in standard errors
# As SPDX spells what the hub writes small; others are given by name.
SPDX = {
    each.lower(): each
    for each in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0",
        "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MPL-2.0", "PSF-2.0", "Python-2.0", "ODC-By-1.0",
    )
}  # fmt: skip


def cyclonedx_document(store: Store, version: Version) -> Json:
    """What went into a version, whose files are verified first. Raises DamagedArtifact."""
    folder = store.artifacts.verified_folder(version)
    manifest = read_manifest(folder)
    files = manifest.get("files") or file_digests(folder)
    if artifact_digest(files) != version.digest:
        raise DamagedArtifact(version.ref, ["its manifest lists other files"])
    verdict = next(
        (each for each in reversed(store.findings.verdicts(version)) if each.artifact == version.digest), None
    )
    card = _card(store, version, verdict)
    components, uses = _components(store, version, manifest)
    main = components.pop(_ref(version)) | {
        "components": [{"type": "file", "name": name} | _hash(files[name]) for name in sorted(files)],
        "modelCard": _model_card(folder, [ref for ref in components if ref.startswith("data:")], card),
    }
    main["properties"] = main["properties"] + _properties(
        scorecard=card and card.digest(),
        tasks=card and card.tasks_digest,
        prompts=card and card.prompts_digest,
        harness=card and card.harness,
        verdict=verdict and verdict.digest(),
        outcome=verdict and verdict.outcome,
        policy=verdict and verdict.policy,
    )
    times = [version.created, *(each.created for each in (card, verdict) if each)]
    said = {
        "metadata": {"timestamp": max(times).isoformat(), "component": main},
        "components": list(components.values()),
        "dependencies": [{"ref": user} | ({"dependsOn": used} if used else {}) for user, used in uses.items()],
    }
    head = {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX"}
    serial = f"urn:uuid:{uuid5(NAMESPACE_URL, json_digest(said))}"
    return head | {"specVersion": "1.6", "serialNumber": serial, "version": 1} | said


def _card(store: Store, version: Version, verdict: Verdict | None) -> Scorecard | None:
    """The scorecard that the verdict judged by, else the newest."""
    cards = [card for card in store.findings.scorecards(version) if card.artifact == version.digest]
    judged = [card for card in cards if verdict and card.digest() == verdict.scorecard]
    return next(reversed(judged or cards), None)


def _components(store: Store, version: Version, manifest: Json) -> tuple[dict[str, Json], dict[str, list[str]]]:
    """By bom-ref: all that is in a version's lineage, the version first; and what each is made from."""
    components: dict[str, Json] = {}
    uses: dict[str, list[str]] = {}
    now: Version | None = version
    while now is not None and _ref(now) not in components:
        components[_ref(now)] = _model(now)
        above = None
        if now.parent:
            with suppress(BadInput):  # it is not there any more
                above = store.get(now.parent)
        parts = [_model(above)] if above else [_missing_component(now.parent)] if now.parent else []
        if now.kind == "onnx":
            parts += _packages(manifest.get("made_with", {}) if now is version else {})
        if now.kind != "onnx" or above is None:  # what a student is made from its variants only repeat
            parts += _ingredients(now, *_run(store, now))
        for part in parts:
            if above is None or part["bom-ref"] != _ref(above):  # that one's turn comes
                components.setdefault(part["bom-ref"], part)
        uses[_ref(now)] = list(dict.fromkeys(part["bom-ref"] for part in parts))
        now = above
    return components, uses | {ref: [] for ref in components if ref not in uses}


def _run(store: Store, version: Version) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The parameters and tags of the run that made a version; empty where it is gone."""
    with suppress(BadInput):
        if version.run_id:
            data = store.client.get_run(version.run_id).data
            return data.params, data.tags
    return {}, {}


def _ref(version: Version) -> str:
    return f"model:{version.ref}"


def _missing_component(ref: str) -> Json:
    named = {"type": "machine-learning-model", "bom-ref": f"model:{ref}", "name": ref}
    return named | {"description": "It is not in the registry any more."}


def _model(version: Version) -> Json:
    return {
        "type": "machine-learning-model",
        "bom-ref": _ref(version),
        "name": version.name,
        "version": str(version.version),
        **_hash(version.digest),
        **_licence_field(version.licence),
        "properties": _properties(
            kind=version.kind,
            engine=version.engine,
            precision=version.precision,
            parameters=version.params,
            author=version.author,
            recipe=version.recipe,
            code=version.code_version,
            teacher_licence=version.teacher_licence,
            data_licence=version.data_licence,
            licence_allows_distillation=version.licence_allows_distillation,
        ),
    }


def _ingredients(version: Version, params: Mapping[str, str], tags: Mapping[str, str]) -> Iterator[Json]:
    """What a version was made from besides its parent."""
    if version.data_digest:
        path, source = (params.get(f"data.{key}", "None") for key in ("path", "source"))
        named = next((each for each in (path, source) if each != "None"), "text")
        data = {"type": "data", "bom-ref": f"data:{version.data_digest}", "name": named, "data": [{"type": "dataset"}]}
        yield data | _hash(version.data_digest) | _licence_field(version.data_licence)
    if version.recipe_digest:
        kind = {"type": "data", "bom-ref": f"recipe:{version.recipe_digest}", "data": [{"type": "configuration"}]}
        yield kind | {"name": f"recipe {version.recipe}"} | _hash(version.recipe_digest)
    if version.base_model:
        base = {"type": "machine-learning-model", "bom-ref": f"base:{version.base_model}", "name": version.base_model}
        hashed = _hash(version.base_model_digest) if version.base_model_digest else {}
        yield base | hashed | _licence_field(version.base_model_licence)
    if version.code_version:
        name, _, number = version.code_version.partition(" ")
        code = {"type": "application", "bom-ref": f"code:{version.code_version}", "name": name, "version": number}
        commit = COMMIT.search(version.code_version)
        clean = {"pedigree": {"commits": [{"uid": commit[1]}]}} if commit else {}
        yield code | _licence_field(version.code_licence) | clean
    yield from _packages(json.loads(tags.get(MADE_WITH, "{}")))


def _packages(made_with: Mapping[str, str]) -> Iterator[Json]:
    for name, number in sorted(made_with.items()):
        purl = f"pkg:pypi/{name}@{quote(number)}"
        yield {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}


def _model_card(folder: Path, data: list[str], card: Scorecard | None) -> Json:
    """What it is and how it scored, in CycloneDX's fields."""
    config = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
    text = [{"format": "text"}]
    parameters: Json = {"task": "text-generation", "inputs": text, "outputs": text}
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        parameters["architectureFamily"] = config["model_type"]
    if data:
        parameters["datasets"] = [{"ref": ref} for ref in data]
    measured = list(_metrics(card)) if card else []
    analysis = {"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {}
    return {"modelParameters": parameters} | analysis


def _metrics(card: Scorecard) -> Iterator[Json]:
    for task, result in card.tasks.items():
        half = Z95 * result.stderr if result.stderr is not None else None
        limits = None if half is None else (result.value - half, result.value + half)
        yield _metric(result.metric, result.value, limits, task)
    if card.relative and (kept := card.relative.retention):
        yield _metric(f"retention against {card.relative.teacher}", kept.value, (kept.low, kept.high))
    if card.relative and card.relative.cost_ratio is not None:
        yield _metric(f"cost over that of {card.relative.teacher}", card.relative.cost_ratio)
    if card.cost:
        for name, value in card.cost.figures().items():
            if value is not None:
                yield _metric(name, value)


def _metric(kind: str, value: float, limits: tuple[float, float] | None = None, task: str | None = None) -> Json:
    low_high = dict(zip(("lowerBound", "upperBound"), (f"{limit:.6g}" for limit in limits or ()), strict=False))
    sliced = {"slice": task} if task else {}
    return {"type": kind, "value": f"{value:.6g}"} | sliced | ({"confidenceInterval": low_high} if limits else {})


def _hash(digest: str) -> Json:
    return {"hashes": [{"alg": "SHA-256", "content": digest}]}


def _licence_field(licence: str | None) -> Json:
    each = [
        {"id": SPDX[name.lower()]} if name.lower() in SPDX else {"name": name}
        for name in licences.licence_names(licence)
    ]
    return {"licenses": [{"license": one} for one in each]} if each else {}


def _properties(**values: Any) -> list[Json]:
    return [
        {"name": f"{TAG_PREFIX.rstrip('.')}:{name}", "value": str(v)} for name, v in values.items() if v is not None
    ]
