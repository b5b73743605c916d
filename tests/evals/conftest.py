"""Tasks made from a small text, and an ONNX artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def onnx_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """tiny_llama exported to ONNX fp32."""
    from export.onnx import export

    folder = tmp_path_factory.mktemp("onnx") / "llama"
    export(tiny_llama, folder, "fp32")
    return folder


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
    from evals.make_tasks import make

    folder = tmp_path_factory.mktemp("tasks")
    make(corpus, folder, "text", ["bits_per_byte", "next_line"], documents=24)
    return folder
