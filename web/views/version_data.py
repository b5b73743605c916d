"""All data of a version's page. Each part is read separately, so that a damaged one does not hide the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from limbeck.registry.catalog import snippets
from limbeck.registry.catalog.lineage import LineageNode, lineage_trees, run_parameters
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError, Unreachable
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.records import Parity, Scorecard, TrainingCost, Verdict, Version
from limbeck.web.views.plots import Series

Part = TypeVar("Part")
# Shown first.
MAIN_CURVES = ("loss", "heldout_sample_bits_per_byte", "heldout_bits_per_byte", "learning_rate", "agreement")
MAX_CURVES = 24


@dataclass
class VersionData:
    """The data of a version's page; each part is read on first use.

    Attributes:
        problems: part -> why it cannot be shown; filled as the parts are read.
    """

    store: Store
    version: Version
    problems: dict[str, LimbeckError] = field(default_factory=dict)

    def _read_part(self, name: str, read: Callable[[], Part], default: Part) -> Part:
        """The value of `read`; `default` if it fails, with the error in `problems`. Raises Unreachable."""
        try:
            return read()
        except Unreachable:
            raise
        except LimbeckError as error:
            self.problems[name] = error
        except ValueError as error:  # an invalid record
            reason = str(error).partition("\n")[0]
            self.problems[name] = DamagedArtifact(self.version.ref, [f"its {name} cannot be read: {reason}"])
        return default

    @cached_property
    def scorecards(self) -> list[Scorecard]:
        """Newest last."""
        read = self.store.findings.scorecards_and_missing
        nothing: tuple[list[Scorecard], list[str]] = ([], [])
        cards, missing = self._read_part("scorecards", lambda: read(self.version), nothing)
        if missing:
            self.problems["scorecards"] = BadInput("; ".join(missing))
        return cards

    @property
    def card(self) -> Scorecard | None:
        """The newest scorecard."""
        return self.scorecards[-1] if self.scorecards else None

    @cached_property
    def parity(self) -> Parity | None:
        return self._read_part("parity", lambda: self.store.findings.parity(self.version), None)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Newest last."""
        return self._read_part("verdicts", lambda: self.store.findings.verdicts(self.version), [])

    @cached_property
    def training_cost(self) -> TrainingCost | None:
        return self._read_part("training_cost", lambda: self.store.runs.training_cost(self.version), None)

    @cached_property
    def recipe(self) -> dict[str, str]:
        return self._read_part("recipe", lambda: run_parameters(self.store, self.version), {})

    @cached_property
    def lineage(self) -> list[LineageNode]:
        return self._read_part("lineage", lambda: lineage_trees(self.store, self.version.ref), [])

    @cached_property
    def licences(self) -> list[licences.LineageLicence]:
        return self._read_part("licences", lambda: licences.lineage_licences(self.store, self.version), [])

    @cached_property
    def files(self) -> list[VersionFile]:
        return self._read_part("files", lambda: version_files(self.store, self.version), [])

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics of its training run, `MAIN_CURVES` first."""
        return self._read_part("curves", lambda: training_metrics(self.store, self.version), [])

    def curves(self, names: list[str]) -> list[Series]:
        """The curves of at most MAX_CURVES of these metrics; a metric with a single point has no curve."""
        wanted = [name for name in names if name in self.metrics][:MAX_CURVES]
        return self._read_part("curves", lambda: training_curves(self.store, self.version, wanted), [])

    @property
    def usage(self) -> tuple[list[str], dict[str, list[str]]]:
        """How to use the version: Limbeck commands, and lines of Python by library."""
        return snippets.command_snippets(self.version), snippets.python_snippets(self.version)

    def to_json(self) -> dict[str, Any]:
        """The data as JSON values: the fields of `limbeck models show --format json`, and the other parts."""
        return self.version.model_dump(mode="json") | {
            "scorecards": [card.model_dump(mode="json") for card in self.scorecards],
            "parity": self.parity.model_dump(mode="json") if self.parity else None,
            "verdicts": [verdict.model_dump(mode="json") for verdict in self.verdicts],
            "training_cost": self.training_cost.model_dump(mode="json") if self.training_cost else None,
            "recipe_parameters": self.recipe,
            "lineage": [tree.json() for tree in self.lineage],
            "licences": [term._asdict() for term in self.licences],
            "files": [{"name": file.name, "bytes": file.size, "digest": file.digest} for file in self.files],
            "curves": {series.label: series.points for series in self.curves(self.metrics)},
            "usage": self.usage[0],
            "problems": {part: str(error) for part, error in self.problems.items()},
        }


@dataclass(frozen=True)
class VersionFile:
    """A file of a version."""

    name: str
    size: int  # bytes
    digest: str | None  # hex SHA-256 from the manifest; None: not in the manifest


def version_files(store: Store, version: Version) -> list[VersionFile]:
    """The files of a version; [] if they are not on this machine. Does not fetch or verify them, nor follow links."""
    folder = store.artifacts.find_local_folder(version)
    if folder is None:
        return []
    digests: Mapping[str, str] = read_manifest(folder).get("files") or {}
    return [_file(folder, path, digests) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]


def _file(folder: Path, path: Path, digests: Mapping[str, str]) -> VersionFile:
    name = path.relative_to(folder).as_posix()
    return VersionFile(name, path.lstat().st_size, digests.get(name))


def training_metrics(store: Store, version: Version) -> list[str]:
    """The metrics of a version's training run, `MAIN_CURVES` first; [] if there is no run."""
    if version.run_id is None:
        return []
    try:
        names = store.client.get_run(version.run_id).data.metrics
    except NotFound:
        return []
    return sorted(names, key=lambda name: (MAIN_CURVES.index(name) if name in MAIN_CURVES else len(MAIN_CURVES), name))


def training_curves(store: Store, version: Version, names: list[str]) -> list[Series]:
    """The curves of those metrics that have finite values at more than one step."""
    curves = []
    for name in names:
        history = store.client.get_metric_history(version.run_id, name)
        points = sorted((metric.step, metric.value) for metric in history if math.isfinite(metric.value))
        if len({step for step, _ in points}) > 1:
            curves.append(Series(name, points))
    return curves
