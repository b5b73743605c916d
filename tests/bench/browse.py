"""Time of `limbeck models list` over 10,000 versions, compared with a plain search by MLflow's client.

A student and its ONNX variant are registered and scored through `Store`. The other versions are copies of their rows
in MLflow's database, with their own tags and metrics, since 10,000 versions through MLflow's API would take most of
an hour. `python -m tests.bench.browse 1000` takes another number.
"""

from __future__ import annotations

import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from tempfile import TemporaryDirectory

from limbeck.registry.core.home import home
from limbeck.registry.core.terminal import print_table
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.bench.leaderboard import scorecard

COUNT = 10_000
MODELS = 20
ROUNDS = 3
FILTER = "tags.`limbeck.precision` = 'int8-weight' and tags.`limbeck.recipe` LIKE 'recipe-1%'"
LISTINGS = {
    "all, table": [],
    "all, json": ["--format", "json"],
    "one model": ["model-7"],
    "by recipe and kind": ["--recipe", "recipe-11", "--kind", "onnx"],
    "by metric": ["--metric", "retention >= 0.9"],
    "newest 20": ["--sort", "-created", "--limit", "20"],
    "--filter": ["--filter", FILTER],
}
PLAIN = """
import sys
from mlflow import MlflowClient
client, query = MlflowClient(sys.argv[1], sys.argv[1]), sys.argv[2]
token, count = None, 0
while True:
    page = client.search_model_versions(query, max_results=10_000, page_token=token)
    count, token = count + len(page), page.token
    if not token:
        break
print(count)
"""


def main(count: int = COUNT) -> None:
    """Measure and print a table."""
    with TemporaryDirectory() as temporary:
        os.environ["LIMBECK_HOME"] = temporary
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        make(count)
        uri = f"sqlite:///{home() / 'mlflow.db'}"
        plain = {query: seconds([sys.executable, "-c", PLAIN, uri, query]) for query in ("", FILTER)}
        lines = []
        reference = {"all, json": plain[""], "--filter": plain[FILTER]}
        for label, options in LISTINGS.items():
            took = seconds([sys.executable, "-m", "limbeck", "models", "list", *options])
            search = reference.get(label)
            lines.append([label, f"{took:.2f} s", search and f"{search:.2f} s", search and f"{took / search:.2f}"])
    columns = ["limbeck models list", "time", "MLflow's search", "ratio"]
    print_table(f"{count:,} versions, median of {ROUNDS}, load {os.getloadavg()[0]:.1f}", columns, lines)


def seconds(command: list[str]) -> float:
    """The median time of a command."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def make(count: int, models: int = MODELS) -> None:
    """Make `count` versions of `models` registered models in LIMBECK_HOME, each with about 20 tags and 40 metrics."""
    store = Store()
    dice = random.Random(0)
    documents = home() / "documents.parquet"
    documents.write_bytes(b"unused")
    for kind, engine in (("student", "torch"), ("onnx", "onnxruntime")):
        folder = home() / f"made-{kind}"
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"of": "{kind}"}}')
        first = store.register(
            NewVersion(
                name="model-0",
                kind=kind,
                engine=engine,
                recipe="small",
                params=1000,
                data_digest="d" * 64,
                licence="MIT",
                family="f" * 64,
                code_version="limbeck 0.1.0",
                teacher="teacher/1",
                recipe_digest="r" * 64,
            ),
            folder,
        )
        store.findings.add_scorecard(first, scorecard(first.ref, first.digest, dice), documents)
    with closing(sqlite3.connect(home() / "mlflow.db")) as database, database:
        copy(database, count, models, dice)


def copy(database: sqlite3.Connection, count: int, models: int, dice: random.Random) -> None:
    """Insert the other versions, as copies of the first two in turn."""
    first = {
        number: (
            select("model_versions", database, "name = 'model-0' AND version = ?", number)[0],
            dict(database.execute("SELECT key, value FROM model_version_tags WHERE version = ?", [number])),
        )
        for number in (1, 2)
    }
    made: dict[str, list[dict]] = {name: [] for name in TABLES}
    made["registered_models"] = [
        select("registered_models", database, "name = ?", "model-0")[0] | {"name": f"model-{place}"}
        for place in range(1, models)
    ]
    logged = {
        number: (
            select("logged_models", database, "model_id = ?", tags["limbeck.model_id"])[0],
            select("logged_model_metrics", database, "model_id = ?", tags["limbeck.model_id"]),
        )
        for number, (_, tags) in first.items()
    }
    for place in range(2, count):
        like = 1 + place % 2
        name, number = f"model-{place % models}", place // models + 3
        version, tags = first[like]
        model_id = f"m-{place:032x}"
        recipe = f"recipe-{place // models % 50}"
        tags = tags | {"limbeck.digest": f"{place:064x}", "limbeck.model_id": model_id, "limbeck.recipe": recipe}
        tags["limbeck.precision"] = dice.choice(["fp32", "int8-weight", "int4"])
        created = version["creation_time"] + 1000 * place
        made["model_versions"].append(version | {"name": name, "version": number, "creation_time": created})
        key = {"name": name, "version": number, "workspace": "default"}
        made["model_version_tags"] += [key | {"key": tag, "value": value} for tag, value in tags.items()]
        model, metrics = logged[like]
        made["logged_models"].append(model | {"model_id": model_id})
        factor = dice.uniform(0.8, 1.0)
        made["logged_model_metrics"] += [
            metric | {"model_id": model_id, "metric_value": metric["metric_value"] * factor} for metric in metrics
        ]
    for table, rows in made.items():
        columns = list(rows[0])
        marks = ", ".join(f":{column}" for column in columns)
        names = ", ".join(f'"{column}"' for column in columns)
        database.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)


TABLES = ["registered_models", "model_versions", "model_version_tags", "logged_models", "logged_model_metrics"]


def select(table: str, database: sqlite3.Connection, condition: str, value: object) -> list[dict]:
    """The rows of a table that meet a condition, as dictionaries."""
    cursor = database.execute(f"SELECT * FROM {table} WHERE {condition}", [value])
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, values, strict=True)) for values in cursor]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
