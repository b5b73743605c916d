"""The same artifact, unchanged, in other programs: bare onnxruntime and optimum."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import yaml

from limbeck.export import pyfunc
from limbeck.export.artifact.interop import MLFLOW_LOADER
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.overlay import install_overlay, overlay_environment

PROMPTS = ["def add(a, b):\n    return", "x", "for i in range(10):"]
NEW = 12


# What another program does: the tokens of each prompt alone, then of all in a left-padded batch, for each folder.
OPTIMUM = f"""
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

for folder in sys.argv[1:]:
    model = ORTModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model.generation_config.eos_token_id = None  # to compare all tokens
    for prompts in [*([p] for p in {PROMPTS}), {PROMPTS}]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        new = model.generate(**batch, max_new_tokens={NEW}, do_sample=False)
        print(json.dumps(new[:, batch["input_ids"].shape[1] :].tolist()))
"""


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[list[int]]:
    """What Limbeck's runtime generates, prompt by prompt."""
    return generate_alone(artifact)


def generate_alone(artifact: Path) -> list[list[int]]:
    runtime = Runtime.load(artifact, threads=1)
    done = [runtime.generate([p], max_new_tokens=NEW, ignore_eos=True)[0].token_ids for p in PROMPTS]
    assert len({tuple(ids) for ids in done}) == len(PROMPTS)
    return done


def test_mlmodel_names_the_loader(artifact: Path) -> None:
    loader = yaml.safe_load((artifact / "MLmodel").read_text())["flavors"]["python_function"]["loader_module"]
    assert loader == MLFLOW_LOADER == pyfunc.__name__


def test_a_bare_onnxruntime_session_runs_it(artifact: Path, expected: list[list[int]]) -> None:
    from tokenizers import Tokenizer

    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    caches = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in caches}
        ids, length, new = tokenizer.encode(prompt).ids, 0, []
        for _ in range(NEW):
            length += len(ids)
            feed = {"input_ids": [ids], "attention_mask": [[1] * length], "position_ids": [range(length)[-len(ids) :]]}
            logits, *present = session.run(None, {k: np.array(v, np.int64) for k, v in feed.items()} | past)
            past, ids = dict(zip(past, present, strict=True)), [int(logits[0, -1].argmax())]
            new += ids
        assert new == wanted


def test_the_manifest_describes_inputs_and_outputs(artifact: Path) -> None:
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    manifest = read_manifest(artifact)
    types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for key, items in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert list(manifest[key]) == [item.name for item in items]
        for item in items:
            type_, _, shape = manifest[key][item.name].partition("[")
            assert types[type_] == item.type
            assert shape == f"{', '.join(map(str, item.shape))}]"
    assert manifest["inputs"]["input_ids"] == "int64[batch_size, sequence_length]"


def test_optimum_runs_them_alone_and_in_left_padded_batches(artifacts: dict[str, Path]) -> None:
    overlay = install_overlay(print)
    command = [sys.executable, "-c", OPTIMUM, *artifacts.values()]
    run = subprocess.run(command, env=overlay_environment(overlay), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for artifact in artifacts.values():
        alone = generate_alone(artifact)
        assert found[: len(PROMPTS) + 1] == [*([ids] for ids in alone), alone]
        found = found[len(PROMPTS) + 1 :]
