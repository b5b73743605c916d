"""Where a version comes from and what was made of it: teacher -> student -> ONNX variant."""

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
    version: Version | None  # None: named as a parent, and not there any more
    children: list[LineageNode] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The tree from here as `{version, kind, precision, recipe, control, digest, aliases, missing, children}`."""
        known = self.version
        return {
            "version": self.ref,
            "kind": known.kind if known else None,
            "precision": known.precision if known else None,
            "recipe": known.recipe if known else None,
            "control": known.control if known else None,
            "digest": known.digest if known else None,
            "aliases": list(known.aliases) if known else [],
            "missing": known is None,
            "children": [child.json() for child in self.children],
        }


def lineage_trees(store: Store, model: str) -> list[LineageNode]:
    """The trees that `model` is in, from the first ancestor down.

    Args:
        store: where the versions are.
        model: `NAME/VERSION` or `NAME@ALIAS`: the way up to its teacher, and all that was made of it; a bare
            NAME: the trees of all its versions.

    Raises:
        BadInput: no such version.
    """
    single = "/" in model or "@" in model
    chosen = [store.get(model)] if single else store.versions(model)
    if not chosen:
        raise store.not_found_error(model)
    every = {version.ref: version for version in store.versions()}
    children: dict[str, list[str]] = defaultdict(list)
    for version in every.values():
        if made_from := made_from_ref(version):
            children[made_from].append(version.ref)
    if single:
        node = _descendant_tree(chosen[0].ref, every, children)
        for ref in _ancestors(chosen[0].ref, every):
            node = LineageNode(ref, every.get(ref), [node])
        return [node]
    first = dict.fromkeys((_ancestors(version.ref, every) or [version.ref])[-1] for version in chosen)
    return [_descendant_tree(ref, every, children) for ref in first]


def made_from_ref(version: Version) -> str | None:
    """NAME/VERSION that a version was made from: its parent, else its teacher."""
    return version.parent or version.teacher


def lineage_path(store: Store, version: Version) -> list[LineageNode]:
    """The way from a version's first ancestor down to it, without what else was made of these."""
    found = [LineageNode(version.ref, version)]
    while (above := found[-1].version) and (ref := made_from_ref(above)) and ref not in {node.ref for node in found}:
        try:
            found.append(LineageNode(ref, store.get(ref)))
        except BadInput:  # deleted
            found.append(LineageNode(ref, None))
    return found[::-1]


def run_parameters(store: Store, version: Version) -> dict[str, str]:
    """The parameters of the run that made a version, as text; of an ONNX variant, of its student. {} without a run.

    Raises NotThere where the run is gone.
    """
    if version.run_id is None:
        return {}
    return dict(store.client.get_run(version.run_id).data.params)


def _ancestors(ref: str, versions: dict[str, Version]) -> list[str]:
    """The ancestors, nearest first."""
    found: list[str] = []
    while ref in versions and (above := made_from_ref(versions[ref])) and above not in (ref, *found):
        found.append(above)
        ref = above
    return found


def _descendant_tree(
    ref: str, versions: dict[str, Version], children: dict[str, list[str]], ancestors: tuple[str, ...] = ()
) -> LineageNode:
    """The tree from `ref` down; `ancestors` are the versions it hangs from, which it cannot hold again."""
    below = [child for child in children.get(ref, []) if child not in (ref, *ancestors)]
    return LineageNode(
        ref, versions.get(ref), [_descendant_tree(child, versions, children, (ref, *ancestors)) for child in below]
    )
