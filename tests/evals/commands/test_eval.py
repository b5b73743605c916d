"""`limbeck eval` and `limbeck tasks make`: options, output and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result

NAMES = ["text_bits_per_byte", "text_next_line"]


@pytest.fixture
def run_eval(limbeck: Callable[..., Result], text_tasks: Path) -> Callable[..., Result]:
    """A function that runs `limbeck eval ... --tasks ... --include-path ... --no-cost`."""

    def run(*args: object) -> Result:
        return limbeck("eval", *args, "--tasks", ",".join(NAMES), "--include-path", text_tasks, "--no-cost")

    return run


def test_a_name_alone_means_all_its_versions(
    store: Store, tiny_llama: Path, onnx_llama: Path, run_eval: Callable[..., Result]
) -> None:
    teacher = store.register(NewVersion(name="m", kind="teacher"), tiny_llama)
    store.register(NewVersion(name="m", kind="onnx", engine="onnxruntime", parent=teacher.ref), onnx_llama)
    done = run_eval("m", "--against", "m/1", "--format", "json")
    assert done.code == 0
    cards = json.loads(done.out)
    assert [card["model"] for card in cards] == ["m/1", "m/2"]
    assert cards[1]["relative"]["teacher"] == "m/1"
    assert cards[1]["tasks"]["text_next_line"]["metric"] == "acc"
    table = run_eval("m", "--against", "m/1")
    assert "m/2" in table.out
    assert "bits per" in table.out
    assert max(map(len, table.out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["LLAMA", "--usd-per-hour", "-1"], "a price of -1 dollars an hour"),
        (["EMPTY"], "is not a model"),
        (["LLAMA", "--against", "EMPTY"], "is not a model"),
        (["LLAMA", "--limit", "0"], "limit"),
    ],
)
def test_bad_models_and_options_are_refused(
    args: list[str],
    message: str,
    tiny_llama: Path,
    limbeck_home: Path,
    tmp_path: Path,
    run_eval: Callable[..., Result],
) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"LLAMA": str(tiny_llama), "EMPTY": str(tmp_path / "empty")}
    done = run_eval(*(folders.get(arg, arg) for arg in args))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_tasks_are_made_and_their_names_printed(
    limbeck: Callable[..., Result], limbeck_home: Path, corpus: Path, tmp_path: Path
) -> None:
    done = limbeck("tasks", "make", corpus, "--name", "mine", "--output", tmp_path / "t", "--kind", "next_line")
    assert (done.code, done.out) == (0, "mine_next_line\n")
    assert list((tmp_path / "t").rglob("*.yaml"))
    done = limbeck("tasks", "make", corpus, "--name", "mine", "--output", tmp_path / "t", "--kind", "next_lime")
    assert done.code == 2
    assert "did you mean next_line" in done.err
