"""Time `limbeck leaderboard` for models of 100 and 1,000 versions with 10 tasks each.

One version is registered and scored through `Store`. The others are copies of its rows in MLflow's database, each
with its own digest, scorecard and run: 10,000 versions through MLflow's API would take most of an hour, and readers
see no difference. `python -m tests.bench.leaderboard 10000` adds that size.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.home import home
from limbeck.registry.core.terminal import print_status, print_table
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Cost, Estimate, NewVersion, Relative, Scorecard, TaskResult, Version

SIZES = [100, 1000]
TASKS = 10
ROUNDS = 5
NAME = "many"


def main(largest: int = SIZES[-1]) -> None:
    """Measure and print a table."""
    lines = []
    for size in sorted({*SIZES, largest}):
        with TemporaryDirectory() as temporary:
            os.environ["LIMBECK_HOME"] = temporary
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            print_status(f"{size:,} versions of {TASKS} tasks")
            make_versions(size)
            before = os.times()
            commands = [time_command() for _ in range(ROUNDS)]
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            rows = [time_rows() for _ in range(ROUNDS)]
            shutil.rmtree(Path(temporary) / "scorecards")
            fetched = format_median([time_command()]) if size == SIZES[0] else None
            medians = [format_median(commands), format_median([cpu / ROUNDS]), format_median(rows)]
            lines.append([f"{size:,}", *medians, fetched])
    columns = [
        "versions",
        "the command",
        "its CPU time",
        "leaderboard_rows alone",
        "scorecards fetched from MLflow first",
    ]
    print_table(f"median of {ROUNDS}, load {os.getloadavg()[0]:.1f}", columns, lines)


def format_median(times: list[float]) -> str:
    """The median, in seconds."""
    return f"{statistics.median(times):.2f} s"


def time_command() -> float:
    """Seconds of the command line, from its start to its end."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "leaderboard", NAME], capture_output=True, text=True, check=True
    )
    assert "recipe-2 torch" in done.stdout
    return time.perf_counter() - begin


def time_rows() -> float:
    """Seconds of `leaderboard_rows` alone, in this process, with a new store."""
    from limbeck.evals.leaderboard.rows import leaderboard_rows

    begin = time.perf_counter()
    leaderboard_rows(Store(), NAME)
    return time.perf_counter() - begin


def make_versions(count: int) -> None:
    """Register a model with `count` versions in the store of LIMBECK_HOME."""
    store = Store()
    folder = home() / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    documents = home() / "documents.parquet"
    documents.write_bytes(b"never read")
    dice = random.Random(0)
    first = store.register(
        NewVersion(name=NAME, kind="teacher", params=1000, data_digest="d" * 64, licence="MIT"), folder
    )
    store.findings.add_scorecard(first, make_scorecard(first.ref, first.digest, dice, teacher=True), documents)
    with closing(sqlite3.connect(home() / "mlflow.db")) as database, database:
        copy_versions(database, first, count, dice)


def copy_versions(database: sqlite3.Connection, first: Version, count: int, dice: random.Random) -> None:
    """Add versions 2 to `count`, copies of the first; their scorecards are where MLflow would store them."""
    pointers = "SELECT key, value FROM model_version_tags WHERE key LIKE 'limbeck.scorecard.%'"
    key, pointer = next(iter(database.execute(pointers)))
    run = json.loads(pointer)["run_id"]
    artifacts = Path(database.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", [run]).fetchone()[0])
    for number in range(2, count + 1):
        digest = f"{number:064x}"
        card = make_scorecard(f"{NAME}/{number}", digest, dice)
        new_run = f"{number:032x}"
        folder = artifacts.parent.parent / new_run / "artifacts"
        folder.mkdir(parents=True)
        file = folder / "scorecard.json"
        file.write_text(card.model_dump_json(indent=1))
        cached = home() / "scorecards" / card.digest() / file.name  # as after scoring on this machine
        cached.parent.mkdir(parents=True)
        shutil.copyfile(file, cached)
        clone_row(database, "runs", {"run_uuid": run}, run_uuid=new_run, artifact_uri=str(folder))
        clone_row(database, "model_versions", {"name": NAME, "version": 1}, version=number)
        pointer = json.dumps(
            json.loads(pointer) | {"digest": card.digest(), "run_id": new_run, "file": file_digest(file)}
        )
        changed = {
            "limbeck.digest": digest,
            "limbeck.kind": "student",
            "limbeck.recipe": f"recipe-{number}",
            "limbeck.teacher": first.ref,
            f"limbeck.scorecard.{card.digest()[:16]}": pointer,
        }
        before = database.execute("SELECT key, value FROM model_version_tags WHERE name = ? AND version = 1", [NAME])
        tags = {k: v for k, v in before if k != key} | changed
        rows = [(k, v, NAME, number, "default") for k, v in tags.items()]
        database.executemany(
            "INSERT INTO model_version_tags (key, value, name, version, workspace) VALUES (?, ?, ?, ?, ?)", rows
        )


def clone_row(database: sqlite3.Connection, table: str, where: dict[str, Any], **changes: Any) -> None:
    """Insert the row of `table` with the values `where` again, with `changes`."""
    condition = " AND ".join(f"{column} = ?" for column in where)
    cursor = database.execute(f"SELECT * FROM {table} WHERE {condition}", [*where.values()])
    columns = [column[0] for column in cursor.description]
    values = dict(zip(columns, cursor.fetchone(), strict=True)) | changes
    database.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", [*values.values()])


def make_scorecard(model: str, digest: str, dice: random.Random, teacher: bool = False) -> Scorecard:
    """A scorecard of TASKS tasks, relative to version 1."""
    retention = 1.0 if teacher else dice.uniform(0.3, 0.99)
    speed = 1.0 if teacher else dice.uniform(1, 20)
    task_names = [f"task_{number}" for number in range(TASKS)]
    return Scorecard(
        artifact=digest,
        model=model,
        tasks=dict(make_results(retention)),
        tasks_digest="t" * 64,
        prompts_digest="p" * 64,
        harness="lm-eval 0.4.13",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        cost=Cost(
            params=1000,
            disk_bytes=4000,
            peak_rss_bytes=100_000_000,
            prefill_tokens_per_s=1e4 * speed,
            decode_tokens_per_s=300 * speed,
            p50_ms=200 / speed,
            p95_ms=220 / speed,
            usd_per_million_tokens=0.1 / speed,
            usd_per_hour=0.1,
            prompt_tokens=64,
            new_tokens=64,
            requests=10,
            threads=2,
            machine="a processor, 2 cores, Linux; an engine",
            protocol=2,
        ),
        relative=Relative(
            teacher=f"{NAME}/1",
            teacher_digest="0" * 64,
            retention=Estimate(value=retention, low=retention - 0.03, high=retention + 0.03),
            task_retention=dict.fromkeys(task_names, interval(retention)),
            difference=dict.fromkeys(task_names, interval(retention - 1)),
            cost_ratio=1 / speed,
            speedup=speed,
        ),
    )


def interval(value: float) -> Estimate:
    """An estimate with an interval of ± 0.1."""
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


def make_results(retention: float) -> Iterator[tuple[str, TaskResult]]:
    """The name and result of each task."""
    for number in range(TASKS):
        yield (
            f"task_{number}",
            TaskResult(
                metric="acc",
                value=0.25 + 0.5 * retention,
                stderr=0.01,
                higher_is_better=True,
                documents=1000,
                chance=0.25,
                task_hash=f"{number:064x}",
                prompt_hash=f"{number:064x}",
            ),
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
