"""Scores equal those of lm-eval's HFLM, for the checkpoint and for its fp32 artifact."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from limbeck.evals.engines.engine import load_engine
from limbeck.evals.engines.lm_eval_model import LimbeckLM
from limbeck.export.artifact.export import export_onnx
from limbeck.registry.catalog.model_ref import resolve_model
from tests.real.conftest import DATA

DOCUMENTS = 12  # of each set


def read_lines(name: str) -> list[dict[str, Any]]:
    """The first lines of a file; [] if there is none."""
    file = DATA / name
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines[:DOCUMENTS]]


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def choices(paragraphs: list[str]) -> list[tuple[str, ...]]:
    """(context, answer): a paragraph's two possible ends, PIQA's two answers, BLiMP's pairs after an empty context."""
    pairs: list[tuple[str, ...]] = []
    for text, other in pairwise(paragraphs[: DOCUMENTS + 1]):
        pairs += [(text[:100], text[100:180]), (text[:100], other[100:180])]
    for row in read_lines("piqa_valid.jsonl"):
        context = f"Question: {row['goal']}\nAnswer:"
        pairs += [(context, f" {row['sol1']}"), (context, f" {row['sol2']}")]
    for row in read_lines("blimp/principle_A_case_1.jsonl"):
        pairs += [("", row["sentence_good"]), ("", row["sentence_bad"])]
    return pairs


@pytest.fixture(scope="module")
def reference(smollm2: Path, choices: list[tuple[str, ...]], paragraphs: list[str]) -> dict[str, Any]:
    """What HFLM gives."""
    lm = HFLM(pretrained=str(smollm2), device="cpu", dtype="float32", batch_size=4)
    texts = instances("loglikelihood_rolling", [(text,) for text in paragraphs[:4]])
    return {
        "choices": lm.loglikelihood(instances("loglikelihood", choices), disable_tqdm=True),
        "texts": lm.loglikelihood_rolling(texts, disable_tqdm=True),
    }


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_scores_equal_those_of_hflm(
    engine: str,
    smollm2: Path,
    choices: list[tuple[str, ...]],
    paragraphs: list[str],
    reference: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = smollm2
    if engine == "onnxruntime":
        folder = tmp_path / "fp32"
        export_onnx(smollm2, folder)
    model = resolve_model(str(folder))
    assert model.engine == engine
    lm = LimbeckLM(load_engine(model))
    found = lm.loglikelihood(instances("loglikelihood", choices))
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in reference["choices"]], atol=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in reference["choices"]]
    texts = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in paragraphs[:4]]))
    np.testing.assert_allclose(texts, reference["texts"], rtol=1e-5)
