"""`limbeck cache`: lists caches, finds damaged ones, and removes the selected ones."""

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


def make_cache(teacher: str, blocks: int = 10, form: Form = Form("topk", 4, 300), days_ago: float = 0) -> TeacherCache:  # noqa: B008
    """A cache of zeros that no run uses, last used some days ago."""
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


def cache_ids() -> set[str]:
    return {path.name for path in (Path(os.environ["LIMBECK_HOME"]) / "teacher-cache").glob("*")}


def test_list_shows_the_caches(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    assert limbeck("cache", "list").code == 0  # no cache yet
    first = make_cache("a", days_ago=2)
    second = make_cache("b", form=Form("topk", 4, 300, temperature=2.0))
    (first.folder / "00001.json").unlink()
    own = TeacherCache({"teacher": "c", "kind": "chunks"}, (1, 12))
    own.fill(lambda blocks: {"a": blocks})
    (limbeck_home / "teacher-cache" / "0123").mkdir()  # an unknown folder is listed too
    done = limbeck("cache", "list", "--format", "json")
    assert done.code == 0
    listed = {cache["id"]: cache for cache in json.loads(done.out)}
    assert [*listed] == sorted(listed, key=lambda id: listed[id]["last_used"], reverse=True)
    info = listed[second.folder.name]
    assert info["form"] == "topk 4 at temperature 2"
    assert (info["tokens"], info["shards"], info["captured"]) == (120, 3, 3)
    assert info["about"] == {"teacher": "b-model", "recipe": "recipe.toml"}
    on_disk = sum(path.stat().st_size for path in second.folder.iterdir())
    assert info["disk_bytes"] == on_disk
    assert info["bytes_per_token"] == pytest.approx(on_disk / 120)
    assert listed[first.folder.name]["captured"] == 2
    assert (listed["0123"]["form"], listed[own.folder.name]["form"]) == ("unknown", "chunks")
    table = limbeck("cache", "list").out
    assert "topk 4 at temperature 2" in table
    assert "2 of 3" in table


def test_verify_finds_damaged_shards_and_shows_how_to_rebuild_them(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    whole, damaged_cache = make_cache("a"), make_cache("b")
    assert limbeck("cache", "verify").code == 0
    path = damaged_cache.folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (damaged_cache.folder / "00002.safetensors").unlink()
    done = limbeck("cache", "verify", "--format", "json")
    assert done.code == 1
    damaged = {cache["id"]: cache["damaged"] for cache in json.loads(done.out)}
    assert damaged == {whole.folder.name: [], damaged_cache.folder.name: ["00001", "00002"]}
    assert "limbeck distill recipe.toml" in done.err
    assert limbeck("cache", "verify", whole.folder.name[:6]).code == 0
    assert limbeck("cache", "verify", damaged_cache.folder.name).code == 1
    unknown = limbeck("cache", "verify", "nothing")
    assert (unknown.code, "limbeck cache list" in unknown.err) == (2, True)


def test_prune_by_age_size_and_id(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    made = [make_cache(name, days_ago=days) for name, days in (("a", 1), ("b", 5), ("c", 10), ("d", 20))]
    ids = [cache.folder.name for cache in made]
    assert limbeck("cache", "prune", "--yes").code == 2  # nothing selected
    asked = limbeck("cache", "prune", "--all")
    assert (asked.code, "--yes" in asked.err) == (2, True)  # no terminal to ask in
    assert limbeck("cache", "prune", "--all", "--dry-run").code == 0
    assert cache_ids() == set(ids)
    assert limbeck("cache", "prune", "--older-than", 15, "--yes").code == 0
    assert cache_ids() == set(ids[:3])
    size = sum(path.stat().st_size for path in made[0].folder.iterdir())
    done = limbeck("cache", "prune", "--to-size", 2.5 * size / 1e9, "--yes", "--format", "json")
    assert [(cache["id"], cache["removed"]) for cache in json.loads(done.out)] == [(ids[2], True)]
    assert cache_ids() == set(ids[:2])
    assert limbeck("cache", "prune", ids[0][:8], "--yes").code == 0
    assert cache_ids() == {ids[1]}
    assert limbeck("cache", "prune", "--all", "--yes").code == 0
    assert cache_ids() == set()


def test_prune_leaves_a_cache_that_a_run_reads(limbeck, limbeck_home: Path) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache("a")
    run = TeacherCache({"teacher": "a"}, (10, 12), cache.form)
    assert run.fill(lambda blocks: pytest.fail("the cache is complete")) == 0
    done = limbeck("cache", "prune", "--all", "--yes", "--format", "json")
    assert done.code == 0
    assert [cache["removed"] for cache in json.loads(done.out)] == [False]
    assert len(run.load_batch(np.array([9]))["ids"]) == 1
    del run
    assert limbeck("cache", "prune", "--all", "--yes").code == 0
    assert cache_ids() == set()
    assert make_cache("a").missing_blocks() == 0  # it can be made again


def test_prune_caches_of_unregistered_teachers(limbeck, store: Store, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    version = store.register(NewVersion(name="tiny", kind="teacher"), tiny_llama)
    known, gone = make_cache(version.digest), make_cache("gone")
    assert limbeck("cache", "prune", "--unregistered", "--yes").code == 0
    assert cache_ids() == {known.folder.name}
    assert not gone.folder.exists()
