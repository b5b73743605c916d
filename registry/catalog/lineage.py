"""Where a version comes from and what was made of it: teacher -> student -> ONNX variant."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Version


@dataclass(frozen=True)
class Node:
    """A version in the tree of a lineage."""

    ref: str  # NAME/VERSION
    version: Version | None  # None: named as a parent, and not there any more
    children: list[Node] = field(default_factory=list)

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


def lineage(store: Store, model: str) -> list[Node]:
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
        raise store.unknown(model)
    every = {version.ref: version for version in store.versions()}
    children: dict[str, list[str]] = defaultdict(list)
    for version in every.values():
        if made_from := ancestor(version):
            children[made_from].append(version.ref)
    if single:
        node = _down(chosen[0].ref, every, children)
        for ref in _up(chosen[0].ref, every):
            node = Node(ref, every.get(ref), [node])
        return [node]
    first = dict.fromkeys((_up(version.ref, every) or [version.ref])[-1] for version in chosen)
    return [_down(ref, every, children) for ref in first]


def ancestor(version: Version) -> str | None:
    """NAME/VERSION that a version was made from: its parent, else its teacher."""
    return version.parent or version.teacher


def path(store: Store, version: Version) -> list[Node]:
    """The way from a version's first ancestor down to it, without what else was made of these."""
    found = [Node(version.ref, version)]
    while (above := found[-1].version) and (ref := ancestor(above)) and ref not in {node.ref for node in found}:
        try:
            found.append(Node(ref, store.get(ref)))
        except BadInput:  # deleted
            found.append(Node(ref, None))
    return found[::-1]


def recipe(store: Store, version: Version) -> dict[str, str]:
    """The parameters of the run that made a version, as text; of an ONNX variant, of its student. {} without a run.

    Raises NotThere where the run is gone.
    """
    if version.run_id is None:
        return {}
    return dict(store.client.get_run(version.run_id).data.params)


def _up(ref: str, every: dict[str, Version]) -> list[str]:
    """The ancestors, nearest first."""
    found: list[str] = []
    while ref in every and (above := ancestor(every[ref])) and above not in (ref, *found):
        found.append(above)
        ref = above
    return found


def _down(ref: str, every: dict[str, Version], children: dict[str, list[str]], above: tuple[str, ...] = ()) -> Node:
    """The tree from `ref` down; `above` are the versions it hangs from, which it cannot hold again."""
    below = [child for child in children.get(ref, []) if child not in (ref, *above)]
    return Node(ref, every.get(ref), [_down(child, every, children, (ref, *above)) for child in below])
