"""The text to quantize with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.export.quantize.sample_texts import (
    CHOICE_CONVERSATIONS,
    CHOICE_TEXTS,
    SAMPLE_CONVERSATIONS,
    SAMPLE_TEXTS,
)
from limbeck.export.quantize.settings import held_out_texts, quantization_settings
from limbeck.registry.core.errors import BadInput
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
        ({"texts": heldout}, with_other_data, list(CHOICE_TEXTS)),
        ({"texts": heldout}, None, list(CHOICE_TEXTS)),
        ({}, with_other_data, list(CHOICE_TEXTS)),
    ]
    for options, version, texts in cases:
        assert list(quantization_settings(version, **options).texts) == texts, (options, version)  # type: ignore[arg-type]


def corpus_of(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"path": "a", "text": text}) + "\n" for text in texts))
    return path


def test_nothing_is_judged_on_the_text_it_was_chosen_on(tmp_path: Path, limbeck_home: Path) -> None:
    assert not set(CHOICE_TEXTS) & set(SAMPLE_TEXTS)
    assert not set(CHOICE_CONVERSATIONS) & set(SAMPLE_CONVERSATIONS)
    texts = [f"text {number}" for number in range(20)] * 2
    file = corpus_of(tmp_path / "texts.jsonl", texts)
    chosen = quantization_settings(None, texts=file).texts
    judged = held_out_texts(file, chosen)
    assert list(chosen) == texts[1:20:2]
    assert judged == [text for text in texts if text not in chosen]
    assert held_out_texts(None, chosen) == list(SAMPLE_TEXTS)


def test_few_texts_are_judged_with_the_passages_and_texts_that_calibrate_are_not(
    tmp_path: Path, limbeck_home: Path
) -> None:
    few, given = corpus_of(tmp_path / "few.jsonl", ["a", "b"]), corpus_of(tmp_path / "given.jsonl", ["b", "c"])
    settings = quantization_settings(None, texts=few, calibration=given)
    assert held_out_texts(few, settings.texts) == ["a", *SAMPLE_TEXTS]
    with pytest.raises(BadInput, match=r"each of its texts is in --calibration too"):
        held_out_texts(few, ["a", "b"])
