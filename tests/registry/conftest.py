"""Fixtures for the registry: artifact folders, records, and the model `still`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.registry.core.home import home
from limbeck.registry.mlflow import layout
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import CostLimits, Policy, QualityRules
from limbeck.registry.records import Estimate, NewVersion, Parity, Relative, Scorecard, TaskResult, Version
from tests.conftest import make_cost

POLICY = Policy(quality=QualityRules(min_retention=0.8), cost=CostLimits(max_cost_ratio=0.5))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Creates an artifact folder that looks like a model; its digest depends on `content`."""
    return partial(make_artifact, tmp_path / "made")


def make_artifact(root: Path, content: str, onnx: bool = False) -> Path:
    """What the fixture `make_folder` creates, below `root`."""
    folder = root / content
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / ("model.onnx" if onnx else "model.safetensors")).write_text(content * 100)
    return folder


@pytest.fixture
def make_card() -> Callable[..., Scorecard]:
    """A scorecard of two tasks; `retention` is (value, low, high), `usd` the price of a million tokens."""
    return _card


@pytest.fixture
def make_parity() -> Callable[..., Parity]:
    """Makes a parity report that passes."""
    return _parity


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A parquet of two documents."""
    file = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"doc_id": [0, 1], "value": [1.0, 0.0]}), file)
    return file


@dataclass
class Still:
    """A registered model `still`: a teacher, a student and the ONNX variants fp32, int8-weight and int4."""

    store: Store
    teacher: Version
    student: Version
    variants: dict[str, Version]
    documents: Path
    copied: bool = False  # from a prepared state folder

    def score(self, version: Version, **changes: Any) -> Scorecard:
        """Add a scorecard of a version, relative to its teacher."""
        card = _card(version.digest, model=version.ref, teacher_digest=self.teacher.digest, **changes)
        self.store.findings.add_scorecard(version, card, self.documents)
        return card


@pytest.fixture
def still(
    store: Store, make_folder: Callable[..., Path], documents: Path, prepared: Callable[[bool], tuple[Path, Still]]
) -> Still:
    """Nothing is scored yet; every variant has its parity."""
    if store.is_server:
        return make_still(store, make_folder, documents)
    return copy_prepared(*prepared(False), store, documents)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Callable[[bool], tuple[Path, Still]]:
    """Creates `still` or `scored` once, in a state folder for tests to copy: copying is 100 times faster."""

    @cache
    def make(scored: bool, _author: str | None) -> tuple[Path, Still]:
        root = tmp_path_factory.mktemp("still")
        shutil.copy(empty_database, root / "mlflow.db")
        file = root / "documents.parquet"
        pq.write_table(pa.table({"doc_id": [0, 1], "value": [1.0, 0.0]}), file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIMBECK_HOME", str(root))
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            still = make_still(Store(), partial(make_artifact, root / "made"), file)
            return root, score(still) if scored else still

    return lambda scored: make(scored, os.environ.get("LIMBECK_USER"))  # the versions record their author


def copy_prepared(root: Path, still: Still, store: Store, documents: Path) -> Still:
    """Copy a prepared state folder over that of an unused store. Returns `still` as it is there."""
    shutil.copytree(root, home(), dirs_exist_ok=True)
    layout.relocate_workspace(store.tracking_uri)

    def here(version: Version) -> Version:
        return version.model_copy(update={"source": version.source.replace(str(root), str(home()))})

    variants = {precision: here(version) for precision, version in still.variants.items()}
    return Still(store, here(still.teacher), here(still.student), variants, documents, copied=True)


def make_still(store: Store, make_folder: Callable[..., Path], documents: Path) -> Still:
    """Register the model of the fixture `still` in any store."""
    teacher = store.register(NewVersion(name="still", kind="teacher"), make_folder("teacher"))
    made = dict(parent=teacher.ref, teacher=teacher.ref, recipe="small")
    student = store.register(NewVersion(name="still", kind="student", **made), make_folder("student"))
    variants = {}
    for precision in ("fp32", "int8-weight", "int4"):
        variants[precision] = store.register(
            NewVersion(
                name="still", kind="onnx", engine="onnxruntime", precision=precision, **made | {"parent": student.ref}
            ),
            make_folder(precision, onnx=True),
        )
        store.findings.add_parity(variants[precision], _parity(reference=student.digest, precision=precision))
    return Still(store, teacher, student, variants, documents)


@pytest.fixture
def scored(still: Still, documents: Path, prepared: Callable[[bool], tuple[Path, Still]]) -> Still:
    """fp32 (2 dollars) and int8 (1 dollar) pass POLICY; int4 is cheapest and fails."""
    return copy_prepared(*prepared(True), still.store, documents) if still.copied else score(still)


def score(still: Still) -> Still:
    """Add the scorecards of the fixture `scored`."""
    still.score(still.variants["fp32"], usd=2.0)
    still.score(still.variants["int8-weight"], usd=1.0)
    still.score(still.variants["int4"], usd=0.5, retention=(0.5, 0.4, 0.6))
    return still


@pytest.fixture
def policy(limbeck_home: Path) -> Path:
    """`policy.toml` in the current folder."""
    file = Path("policy.toml")
    file.write_text("[quality]\nmin_retention = 0.8\n[cost]\nmax_cost_ratio = 0.5\n")
    return file


def _card(artifact: str, **changes: Any) -> Scorecard:
    retention = changes.pop("retention", (0.97, 0.95, 0.99))
    usd = changes.pop("usd", 1.0)
    documents = changes.pop("documents", 500)
    tasks = changes.pop("tasks", ("bits", "choice"))
    cost_ratio = changes.pop("cost_ratio", 0.25)
    teacher_digest = changes.pop("teacher_digest", "0" * 64)
    result = TaskResult(
        metric="acc",
        value=0.5,
        stderr=0.01,
        higher_is_better=True,
        documents=documents,
        task_hash="t",
        prompt_hash="p",
    )
    cost = make_cost(usd)
    value, low, high = retention
    estimate = Estimate(value=value, low=low, high=high)
    relative = Relative(
        teacher="still/1",
        teacher_digest=teacher_digest,
        retention=estimate,
        task_retention=dict.fromkeys(tasks, estimate),
        difference={},
        cost_ratio=cost_ratio,
        speedup=2.0,
    )
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": "still/2",
        "tasks": dict.fromkeys(tasks, result),
        "tasks_digest": "tasks",
        "prompts_digest": "prompts",
        "harness": "lm-eval 0.4.13",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "cost": cost,
        "relative": relative,
    }
    return Scorecard(**fields | changes)


def _parity(**changes: Any) -> Parity:
    fields: dict[str, Any] = {
        "reference": "r",
        "precision": "fp32",
        "tokens": 1000,
        "max_logprob_diff": 1e-5,
        "mean_kl": 1e-4,
        "top1_agreement": 0.99,
        "bits_per_byte_reference": 2.0,
        "bits_per_byte": 2.0,
        "greedy_identical": True,
        "passed": True,
        "p99_kl": 1e-3,
        "max_kl": 1e-2,
        **dict.fromkeys(("batch_diff", "left_padding_diff", "cache_diff"), 1e-5),
        **dict.fromkeys(("batch_kl", "left_padding_kl", "cache_kl"), 1e-7),
    }
    return Parity(**fields | changes)
