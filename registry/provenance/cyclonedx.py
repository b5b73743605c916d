"""The SBOM of a version in CycloneDX 1.6: its files, models, data, code, packages and scores.

It is made from the records alone, so the same records give the same bytes. The hash of a model is its digest
(`limbeck.registry.core.digest`, over the hashes of its files), of a text the digest of its documents, of a recipe the
digest of its values.
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

MADE_WITH = TAG_PREFIX + "made_with"  # tag of the run that made a version: package -> version, as JSON
COMMIT = re.compile(r"\+g([0-9a-f]{7,40})$")  # in the code version of a clone without changes
NORMAL_95 = 1.959964  # half the width of a 95% interval, in standard errors
# The hub's lower-case identifier -> the identifier of SPDX; other licences are listed by name.
SPDX = {
    each.lower(): each
    for each in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0",
        "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MPL-2.0", "PSF-2.0", "Python-2.0", "ODC-By-1.0",
    )
}  # fmt: skip


def cyclonedx_document(store: Store, version: Version) -> Json:
    """The SBOM of a version. Verifies the version's files; raises DamagedArtifact."""
    folder = store.artifacts.verified_folder(version)
    manifest = read_manifest(folder)
    files = manifest.get("files") or file_digests(folder)
    if artifact_digest(files) != version.digest:
        raise DamagedArtifact(version.ref, ["its manifest lists other files"])
    verdict = next(
        (each for each in reversed(store.findings.verdicts(version)) if each.artifact == version.digest), None
    )
    card = _scorecard(store, version, verdict)
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
    content = {
        "metadata": {"timestamp": max(times).isoformat(), "component": main},
        "components": list(components.values()),
        "dependencies": [{"ref": user} | ({"dependsOn": used} if used else {}) for user, used in uses.items()],
    }
    head = {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX"}
    serial = f"urn:uuid:{uuid5(NAMESPACE_URL, json_digest(content))}"
    return head | {"specVersion": "1.6", "serialNumber": serial, "version": 1} | content


def _scorecard(store: Store, version: Version, verdict: Verdict | None) -> Scorecard | None:
    """The scorecard that the verdict is based on, else the newest; None without one."""
    cards = [card for card in store.findings.scorecards(version) if card.artifact == version.digest]
    judged = [card for card in cards if verdict and card.digest() == verdict.scorecard]
    return next(reversed(judged or cards), None)


def _components(store: Store, version: Version, manifest: Json) -> tuple[dict[str, Json], dict[str, list[str]]]:
    """The components of a version's lineage by bom-ref, the version first; and the refs that each is made from."""
    components: dict[str, Json] = {}
    uses: dict[str, list[str]] = {}
    current: Version | None = version
    while current is not None and _ref(current) not in components:
        components[_ref(current)] = _model(current)
        parent = _parent(store, current)
        parts: list[Json] = []
        if parent is not None:
            parts.append(_model(parent))
        elif current.parent:
            parts.append(_missing_component(current.parent))
        if current is version and current.kind == "onnx":
            parts += _packages(manifest.get("made_with", {}))
        if current.kind != "onnx" or parent is None:  # a variant is made from the same parts as its student
            parts += _ingredients(current, *_run(store, current))
        for part in parts:
            if parent is None or part["bom-ref"] != _ref(parent):  # the next round adds the parent
                components.setdefault(part["bom-ref"], part)
        uses[_ref(current)] = list(dict.fromkeys(part["bom-ref"] for part in parts))
        current = parent
    return components, uses | {ref: [] for ref in components if ref not in uses}


def _parent(store: Store, version: Version) -> Version | None:
    """None without a parent, or if it was deleted."""
    if version.parent:
        with suppress(BadInput):
            return store.get(version.parent)
    return None


def _run(store: Store, version: Version) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The parameters and tags of the run that made a version; empty without a run, or if it was deleted."""
    with suppress(BadInput):
        if version.run_id:
            data = store.client.get_run(version.run_id).data
            return data.params, data.tags
    return {}, {}


def _ref(version: Version) -> str:
    return f"model:{version.ref}"


def _missing_component(ref: str) -> Json:
    named = {"type": "machine-learning-model", "bom-ref": f"model:{ref}", "name": ref}
    return named | {"description": "It was deleted from the registry."}


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
    """The components that a version was made from besides its parent."""
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
    """The architecture, data and scores in CycloneDX's fields."""
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
        half = NORMAL_95 * result.stderr if result.stderr is not None else None
        limits = None if half is None else (result.value - half, result.value + half)
        yield _metric(result.metric, result.value, limits, task)
    relative = card.relative
    if relative and relative.retention:
        interval = (relative.retention.low, relative.retention.high)
        yield _metric(f"retention against {relative.teacher}", relative.retention.value, interval)
    if relative and relative.cost_ratio is not None:
        yield _metric(f"cost over that of {relative.teacher}", relative.cost_ratio)
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
