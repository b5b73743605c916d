"""`limbeck cache`: what is told of the caches that are kept, what is found damaged, what goes and what stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from limbeck.distill.cache import teacher_cache as caches
from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.recipe.cache_form import Form
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_TOKENS", 4 * 12)


def fill(teacher: str, blocks: int = 10, form: Form = Form("topk", 4, 300), days_ago: float = 0) -> TeacherCache:  # noqa: B008
    """A cache of zeros, not held; last used so long ago."""
    about = {"teacher": f"{teacher}-model", "recipe": "recipe.toml"}
    made = TeacherCache({"teacher": teacher}, (blocks, 12), form, about)

    def capture(numbers: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(numbers), 12, form.size)
        return {"ids": np.zeros(shape, np.uint16), "logprobs": np.zeros(shape, np.float16)}

    made.fill(capture)
    then = time.time() - days_ago * DAY
    os.utime(made.folder / "settings.json", (then, then))
    made.storage.unlock()
    return made


def there() -> set[str]:
    return {path.name for path in (Path(os.environ["LIMBECK_HOME"]) / "teacher-cache").glob("*")}


def test_list_tells_what_is_stored(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    assert limbeck("cache", "list").code == 0  # none yet
    first = fill("a", days_ago=2)
    second = fill("b", form=Form("topk", 4, 300, temperature=2.0))
    (first.folder / "00001.json").unlink()
    own = TeacherCache({"teacher": "c", "kind": "chunks"}, (1, 12))
    own.fill(lambda blocks: {"a": blocks})
    (limbeck_home / "teacher-cache" / "0123").mkdir()  # whatever this is, it can be seen
    done = limbeck("cache", "list", "--format", "json")
    assert done.code == 0
    found = {cache["id"]: cache for cache in json.loads(done.out)}
    assert [*found] == sorted(found, key=lambda id: found[id]["last_used"], reverse=True)
    told = found[second.folder.name]
    assert told["form"] == "topk 4 at temperature 2"
    assert (told["tokens"], told["shards"], told["captured"]) == (120, 3, 3)
    assert told["about"] == {"teacher": "b-model", "recipe": "recipe.toml"}
    on_disk = sum(path.stat().st_size for path in second.folder.iterdir())
    assert told["disk_bytes"] == on_disk
    assert told["bytes_per_token"] == pytest.approx(on_disk / 120)
    assert found[first.folder.name]["captured"] == 2
    assert (found["0123"]["form"], found[own.folder.name]["form"]) == ("unknown", "chunks")
    table = limbeck("cache", "list").out
    assert "topk 4 at temperature 2" in table
    assert "2 of 3" in table


def test_verify_finds_what_is_damaged_and_says_what_rebuilds_it(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    whole, harmed = fill("a"), fill("b")
    assert limbeck("cache", "verify").code == 0
    path = harmed.folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (harmed.folder / "00002.safetensors").unlink()
    done = limbeck("cache", "verify", "--format", "json")
    assert done.code == 1
    damaged = {cache["id"]: cache["damaged"] for cache in json.loads(done.out)}
    assert damaged == {whole.folder.name: [], harmed.folder.name: ["00001", "00002"]}
    assert "limbeck distill recipe.toml" in done.err
    assert limbeck("cache", "verify", whole.folder.name[:6]).code == 0
    assert limbeck("cache", "verify", harmed.folder.name).code == 1
    unknown = limbeck("cache", "verify", "nothing")
    assert (unknown.code, "limbeck cache list" in unknown.err) == (2, True)


def test_prune_by_age_by_size_and_by_id(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    made = [fill(name, days_ago=days) for name, days in (("a", 1), ("b", 5), ("c", 10), ("d", 20))]
    ids = [cache.folder.name for cache in made]
    assert limbeck("cache", "prune", "--yes").code == 2  # what?
    asked = limbeck("cache", "prune", "--all")
    assert (asked.code, "--yes" in asked.err) == (2, True)  # no terminal to ask at
    assert limbeck("cache", "prune", "--all", "--dry-run").code == 0
    assert there() == set(ids)
    assert limbeck("cache", "prune", "--older-than", 15, "--yes").code == 0
    assert there() == set(ids[:3])
    size = sum(path.stat().st_size for path in made[0].folder.iterdir())
    done = limbeck("cache", "prune", "--to-size", 2.5 * size / 1e9, "--yes", "--format", "json")
    assert [(cache["id"], cache["removed"]) for cache in json.loads(done.out)] == [(ids[2], True)]
    assert there() == set(ids[:2])
    assert limbeck("cache", "prune", ids[0][:8], "--yes").code == 0
    assert there() == {ids[1]}
    assert limbeck("cache", "prune", "--all", "--yes").code == 0
    assert there() == set()


def test_prune_leaves_what_a_run_reads(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    cache = fill("a")
    run = TeacherCache({"teacher": "a"}, (10, 12), cache.form)
    assert run.fill(lambda blocks: pytest.fail("it is whole")) == 0
    done = limbeck("cache", "prune", "--all", "--yes", "--format", "json")
    assert done.code == 0
    assert [cache["removed"] for cache in json.loads(done.out)] == [False]
    assert len(run.load_batch(np.array([9]))["ids"]) == 1
    del run
    assert limbeck("cache", "prune", "--all", "--yes").code == 0
    assert there() == set()
    assert fill("a").missing_blocks() == 0  # and it can be made again


def test_prune_of_teachers_that_are_not_registered(limbeck, store: Store, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    version = store.register(NewVersion(name="tiny", kind="teacher"), tiny_llama)
    known, gone = fill(version.digest), fill("gone")
    assert limbeck("cache", "prune", "--unregistered", "--yes").code == 0
    assert there() == {known.folder.name}
    assert not gone.folder.exists()
