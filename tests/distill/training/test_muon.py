"""MuonAdamW: which parameters each optimizer gets, its state in a checkpoint, its schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.distill.training.muon import MuonAdamW


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_neox"])
def test_hidden_matrices_go_to_muon(request: pytest.FixtureRequest, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
    muon, adamw = MuonAdamW(model, 0.1, 0.0).parts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon_names = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    adamw_names = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert muon_names | adamw_names == set(names.values())
    assert not muon_names & adamw_names
    embeddings = ("embed_tokens", "wte", "wpe", "embed_in", "embed_out", "lm_head")
    assert not any(table in name for name in muon_names for table in embeddings)
    assert all("norm" in n or "ln_" in n or "bias" in n or any(t in n for t in embeddings) for n in adamw_names)


def train(model: torch.nn.Module, optimizer: MuonAdamW, schedule: object, steps: range) -> None:
    for step in steps:
        ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()  # type: ignore[attr-defined]
        optimizer.zero_grad()


def make_optimizer(model: torch.nn.Module) -> tuple[MuonAdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = MuonAdamW(model, 0.02, 0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_the_state_survives_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    optimizer, schedule = make_optimizer(model)
    train(model, optimizer, schedule, range(3))
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    resumed = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, schedule, range(3, 6))

    optimizer, schedule = make_optimizer(resumed)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    train(resumed, optimizer, schedule, range(3, 6))
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not torch.equal(one, before[name])


def test_both_optimizers_follow_the_schedule(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    optimizer, schedule = make_optimizer(model)
    train(model, optimizer, schedule, range(1))
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.01, 0.01]
