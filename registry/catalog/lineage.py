"""The lineage of a version, walkable both ways: teacher -> student -> ONNX variant."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Version


@dataclass(frozen=True)
class LineageNode:
    """A version in the tree of a lineage."""

    ref: str  # NAME/VERSION
    version: Version | None  # None: named as a parent, but deleted
    children: list[LineageNode] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The tree as `{version, kind, precision, recipe, control, digest, aliases, missing, children}`."""
        version = self.version
        return {
            "version": self.ref,
            "kind": version.kind if version else None,
            "precision": version.precision if version else None,
            "recipe": version.recipe if version else None,
            "control": version.control if version else None,
            "digest": version.digest if version else None,
            "aliases": list(version.aliases) if version else [],
            "missing": version is None,
            "children": [child.json() for child in self.children],
        }


def lineage_trees(store: Store, model: str) -> list[LineageNode]:
    """The trees that contain `model`, from the first ancestor down.

    Args:
        store: where the versions are.
        model: `NAME/VERSION` or `NAME@ALIAS`: its ancestors and all its descendants; a bare NAME: the trees of all its
            versions.

    Raises:
        BadInput: no such version.
    """
    single = "/" in model or "@" in model
    chosen = [store.get(model)] if single else store.versions(model)
    if not chosen:
        raise store.not_found_error(model)
    versions = {version.ref: version for version in store.versions()}
    children: dict[str, list[str]] = defaultdict(list)
    for version in versions.values():
        made_from = made_from_ref(version)
        if made_from:
            children[made_from].append(version.ref)
    if single:
        node = _descendant_tree(chosen[0].ref, versions, children)
        for ref in _ancestors(chosen[0].ref, versions):
            node = LineageNode(ref, versions.get(ref), [node])
        return [node]
    roots = dict.fromkeys((_ancestors(version.ref, versions) or [version.ref])[-1] for version in chosen)
    return [_descendant_tree(ref, versions, children) for ref in roots]


def made_from_ref(version: Version) -> str | None:
    """NAME/VERSION that a version was made from: its parent, else its teacher; None without one."""
    return version.parent or version.teacher


def lineage_path(store: Store, version: Version) -> list[LineageNode]:
    """The nodes from a version's first ancestor down to it, without other descendants."""
    path: list[LineageNode] = []
    current: Version | None = version
    ref: str | None = version.ref
    while ref and ref not in {node.ref for node in path}:
        path.append(LineageNode(ref, current))
        ref = made_from_ref(current) if current else None
        current = _version_or_none(store, ref) if ref else None
    return path[::-1]


def _version_or_none(store: Store, ref: str) -> Version | None:
    try:
        return store.get(ref)
    except BadInput:  # deleted
        return None


def run_parameters(store: Store, version: Version) -> dict[str, str]:
    """The parameters, as text, of the run that made a version, or the student of an ONNX variant. {} without a run.

    Raises NotFound if the run was deleted.
    """
    if version.run_id is None:
        return {}
    return dict(store.client.get_run(version.run_id).data.params)


def _ancestors(ref: str, versions: dict[str, Version]) -> list[str]:
    """The refs of the ancestors, nearest first. The last one may be deleted."""
    found: list[str] = []
    parent = made_from_ref(versions[ref]) if ref in versions else None
    while parent and parent not in (ref, *found):
        found.append(parent)
        parent = made_from_ref(versions[parent]) if parent in versions else None
    return found


def _descendant_tree(
    ref: str, versions: dict[str, Version], children: dict[str, list[str]], ancestors: tuple[str, ...] = ()
) -> LineageNode:
    """The tree below `ref`; `ancestors` are those of `ref`, left out so that a circle ends."""
    refs = [child for child in children.get(ref, []) if child not in (ref, *ancestors)]
    return LineageNode(
        ref, versions.get(ref), [_descendant_tree(child, versions, children, (ref, *ancestors)) for child in refs]
    )
