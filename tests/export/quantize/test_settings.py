"""The text to quantize with."""

from __future__ import annotations

import json
from pathlib import Path

from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.settings import quantization_settings
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion


def test_calibration_text_comes_before_training_text_before_heldout_text(
    store: Store, tiny_llama: Path, tmp_path: Path, limbeck_home: Path
) -> None:
    def corpus(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"path": "a", "text": text}) + "\n")
        return path

    corpus(limbeck_home / "data/coder/train.jsonl", "trained on")
    (limbeck_home / "data/coder/corpus.json").write_text(json.dumps({"digest": "d1"}))
    in_registry = store.register(NewVersion(name="coder", kind="student", data_digest="d1"), tiny_llama)
    with_other_data = in_registry.model_copy(update={"data_digest": "d2"})
    given, heldout = corpus(tmp_path / "given.jsonl", "given"), corpus(tmp_path / "heldout.jsonl", "held out")
    cases: list[tuple[dict[str, Path], object, list[str]]] = [
        ({"calibration": given, "texts": heldout}, in_registry, ["given"]),
        ({"texts": heldout}, in_registry, ["trained on"]),
        ({"texts": heldout}, with_other_data, ["held out"]),
        ({"texts": heldout}, None, ["held out"]),
        ({}, with_other_data, list(SAMPLE_TEXTS)),
    ]
    for options, version, texts in cases:
        assert list(quantization_settings(version, **options).texts) == texts, (options, version)  # type: ignore[arg-type]
