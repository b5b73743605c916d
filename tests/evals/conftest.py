"""Fixtures of evaluation's tests: models, held-out text, tasks, and registered versions."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Version
from tests.conftest import make_model
from tests.evals.leaderboard_helpers import make_card

MODULES = ["bisect", "contextlib", "fnmatch", "heapq", "keyword", "queue", "shlex", "textwrap", "json/encoder"]


@pytest.fixture(scope="session")
def tiny_llama_bos(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Like tiny_llama, with a tokenizer that adds a BOS token before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    with_bos = tmp_path_factory.mktemp("tokenizer-bos")
    tokenizer.save_pretrained(with_bos)
    return make_model(tmp_path_factory.mktemp("llama-bos"), with_bos, "llama", seed=1)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that returns the fp32 ONNX artifact of a checkpoint, exported once per session."""
    made: dict[Path, Path] = {}

    def export(folder: Path) -> Path:
        from limbeck.export.artifact.export import export_onnx

        if folder not in made:
            made[folder] = tmp_path_factory.mktemp("onnx") / folder.name
            export_onnx(folder, made[folder], "fp32")
        return made[folder]

    return export


@pytest.fixture(scope="session")
def onnx_llama(tiny_llama: Path, onnx: Callable[[Path], Path]) -> Path:
    """tiny_llama exported to ONNX fp32."""
    return onnx(tiny_llama)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text: some of the standard library's source files, as JSON lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    path = tmp_path_factory.mktemp("sources") / "heldout.jsonl"
    rows = ({"path": f"{name}.py", "text": (root / f"{name}.py").read_text()} for name in MODULES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text: 12 small files, as JSON lines."""
    lines = []
    for place in range(12):
        body = "\n".join(f"    name_{place}_{line} = first + {line} * {place}" for line in range(14))
        text = f"def function_{place}(first):\n{body}\n    return name_{place}_3\n"
        lines.append(json.dumps({"path": f"file{place}.py", "text": text}))
    path = tmp_path_factory.mktemp("corpus") / "heldout.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def text_tasks(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with the tasks `text_bits_per_byte` and `text_next_line`, for --include-path."""
    from limbeck.evals.tasks.make_tasks import make_tasks

    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(corpus, folder, "text", ["bits_per_byte", "next_line"], documents=24)
    return folder


@pytest.fixture
def add_version(store: Store, tmp_path: Path) -> Callable[..., Version]:
    """A function that registers another version of m, with a scorecard for each (retention, usd, changes)."""
    documents = tmp_path / "documents.parquet"
    parquet.write_table(pa.table({"task": ["single"]}), documents)

    def run(*cards: tuple[float | None, float, dict[str, Any]], **fields: Any) -> Version:
        folder = tmp_path / f"artifact-{len(store.versions('m'))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        version = store.register(NewVersion(name="m", **{"kind": "onnx", "engine": "onnxruntime", **fields}), folder)
        for retention, usd, changes in cards:
            store.findings.add_scorecard(version, make_card(version.digest, retention, usd, **changes), documents)
        return version

    return run
