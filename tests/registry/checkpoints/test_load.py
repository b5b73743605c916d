"""Checkpoints as transformers 4 and 5 write them: loaded alike, or refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.registry.checkpoints.checked import checked_facts
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput
from tests.registry.checkpoints.published import LLAMA, PHI, PUBLISHED, logits, make_model, write_checkpoint


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_load_alike_as_either_version_writes_them(name: str, tmp_path: Path) -> None:
    import torch

    four = load_model(write_checkpoint(tmp_path / "4", PUBLISHED[name]))
    assert four.dtype == torch.float32
    four.save_pretrained(tmp_path / "5")
    assert np.array_equal(logits(load_model(tmp_path / "5")), logits(four))
    for folder in (tmp_path / "4", tmp_path / "5"):
        facts = checked_facts(folder)
        assert facts.rotary == ("no rotary table" if name in ("GPT-2", "BLOOM", "OPT") else "equal to config.json")
        assert facts.weights == "all from its files, all finite"


def test_shards_in_bfloat16_load_like_one_file(tmp_path: Path) -> None:
    import torch

    model = make_model(PHI).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    whole, sharded = load_model(tmp_path / "one"), load_model(tmp_path / "sharded")
    assert sharded.dtype == torch.float32
    assert np.array_equal(logits(whole), logits(sharded))


def test_a_misread_config_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", LLAMA | dict(partial_rotary_factor=0.5))
    with pytest.raises(BadInput, match=r"models/m: its config.json: .* 4 rotary dimensions, the loaded model 8"):
        load_model(folder, label="models/m")


def test_code_that_comes_with_a_model_is_checked_too(tmp_path: Path) -> None:
    classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    raw = LLAMA | dict(model_type="mine", auto_map=classes, residual_multiplier=0.22)
    folder = write_checkpoint(tmp_path / "m", LLAMA)
    (folder / "config.json").write_text(json.dumps(raw))
    code = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""
    (folder / "mine.py").write_text(code)
    with pytest.raises(BadInput, match="no code of Mine reads residual_multiplier"):
        load_model(folder, trust_remote_code=True)
    (folder / "config.json").write_text(json.dumps({**raw, "residual_multiplier": 1.0}))
    load_model(folder, trust_remote_code=True)
    assert checked_facts(folder).rotary == "equal to config.json"


def test_what_was_not_loaded_was_not_checked(tmp_path: Path) -> None:
    assert checked_facts(tmp_path).rotary.startswith("not checked")
