"""The student writes, the teacher grades: held to a plain loop that samples and learns by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.data.blocks import Blocks, layout_digest, position_ids
from limbeck.distill.recipe import load as load_module
from limbeck.distill.recipe.schema import Objective, OnPolicy, Training
from limbeck.distill.training.on_policy import StudentWriter, prompts
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.core.errors import BadInput

VOCABULARY, LENGTH, BATCH = 300, 24, 4
END = 0


def blocks_of(rows: int, seed: int = 0) -> Blocks:
    """Random tokens, a document to a block."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (rows, LENGTH), dtype=np.int32)
    segments = np.ones((rows, LENGTH), dtype=np.uint16)
    targets = position_ids(segments) > 0
    return Blocks(ids, segments, targets, int(targets.sum()), int(targets.sum()), layout_digest(ids, segments, targets))


def load(folder: Path) -> PreTrainedModel:
    """A model that drops nothing out, so that another can do the same."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def seed_of(student: PreTrainedModel, wanted: OnPolicy, batch: dict[str, Any], step: int, number: int) -> torch.Tensor:
    """What a writer makes of a batch: its ids."""
    return StudentWriter(student, wanted, seed=3)(batch, step, number)["input_ids"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_learns_as_a_plain_loop_does(
    request: pytest.FixtureRequest, tmp_path: Path, limbeck_home: Path, tiny_neox: Path, name: str
) -> None:
    folder: Path = request.getfixturevalue(name)
    blocks, wanted = blocks_of(3 * BATCH), OnPolicy(lmbda=1.0, max_new_tokens=6, prompt_tokens=7, temperature=0.8)
    training = Training(
        max_steps=3, per_device_train_batch_size=BATCH, logging_steps=1, bf16=False, lr_scheduler_type="constant",
        learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1e9, warmup_ratio=0.0,
    )  # fmt: skip
    teacher, student = load(tiny_neox), load(folder)
    losses: list[float] = []
    objective = Objective(divergence="reverse_kl", labels=0.5)  # its labels are those of text, and here is none
    job = Job(student, blocks, blocks, objective, training, teacher, tmp_path / "run", 3, VOCABULARY, on_policy=wanted)
    train(job, on_log=lambda logs, step: losses.append(logs["loss"]) if "loss" in logs else None)

    plain, seen = load(folder), order(training, len(blocks.ids))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for step in range(3):
        rows = torch.from_numpy(blocks.ids[seen[step]].astype(np.int64))[:, :7]
        rows = sampled(plain.eval(), rows, 6, 0.8, drawn(3, step, 0))
        inputs, said = rows.clamp_min(0), rows[:, 7:]  # -1 where a row had ended
        log_q = plain.train()(input_ids=inputs).logits[:, 6:-1].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(input_ids=inputs).logits[:, 6:-1].log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)[said >= 0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=2e-4)
    for got, want in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


def order(training: Training, rows: int) -> list[list[int]]:
    """The blocks of each step: as a run over labels alone sees them."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=3)
    numbers = list(sampler)
    return [numbers[first : first + BATCH] for first in range(0, rows, BATCH)]


def drawn(seed: int, step: int, number: int) -> int:
    """The seed of what is written, as the module's docstring has it: of the run's seed, the step and the number."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[4:12], "big") % 2**63


@torch.no_grad()
def sampled(model: PreTrainedModel, rows: torch.Tensor, new: int, temperature: float, seed: int) -> torch.Tensor:
    """Rows with `new` tokens drawn after them, without any cache; -1 after a row's end token."""
    ended = torch.zeros(len(rows), dtype=torch.bool)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(new):
            probs = F.softmax(model(input_ids=rows.clamp_min(0)).logits[:, -1] / temperature, dim=-1)
            token = torch.multinomial(probs, 1)[:, 0]
            rows = torch.cat([rows, torch.where(ended, -1, token)[:, None]], dim=1)
            ended |= token == END
    return rows


def test_what_is_written_depends_on_seed_step_and_number_alone(tiny_llama: Path) -> None:
    student, batch = load(tiny_llama), dict(blocks_of(BATCH).batch(np.arange(BATCH)))
    always = OnPolicy(lmbda=1.0, max_new_tokens=6)
    written = [seed_of(student, always, batch, step, number) for step, number in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])
    before = torch.random.get_rng_state()
    assert torch.equal(seed_of(student, always, batch, 0, 0), written[0])
    assert torch.equal(torch.random.get_rng_state(), before)  # dropout draws what it would have drawn
    assert student.training is False


def test_the_share_of_batches_is_lmbda(tiny_llama: Path) -> None:
    student, batch = load(tiny_llama), dict(blocks_of(1).batch(np.arange(1)))
    writer = StudentWriter(student, OnPolicy(lmbda=0.3, max_new_tokens=1), seed=0)
    share = np.mean([writer(batch, step, number) is not batch for step in range(50) for number in range(4)])
    assert 0.2 < share < 0.4  # 0.3 give or take three standard errors


def test_only_what_was_written_is_learnt_up_to_the_end_token(tiny_llama: Path) -> None:
    student = load(tiny_llama)
    end = student.config.eos_token_id
    batch = dict(blocks_of(64).batch(np.arange(64)))
    made = StudentWriter(student, OnPolicy(lmbda=1.0, max_new_tokens=12, temperature=20.0), seed=0)(batch, 0, 0)
    assert made["written"]
    lengths = []
    for ids, labels, row in zip(made["input_ids"], made["labels"], batch["input_ids"], strict=True):
        assert torch.equal(ids[:12], row[:12])  # the first half
        assert (labels[:12] == -100).all()
        said = labels[12:][labels[12:] != -100]
        assert torch.equal(said, ids[12 : 12 + len(said)])
        assert (labels[12 + len(said) :] == -100).all()
        assert end not in said[:-1]
        assert len(said) == 12 or said[-1] == end
        lengths.append(len(said))
    assert min(lengths) < 12 == max(lengths)  # some row ended early


def test_prompts_are_those_of_the_text() -> None:
    ids = torch.arange(24)[None].repeat(4, 1)
    segments = np.ones((4, 24), dtype=np.uint16)
    segments[1, 10:] = 2  # two documents, the second has more
    segments[2, 20:] = 0  # padding
    targets = position_ids(segments) > 0
    targets[2, :5] = targets[2, 20:] = False  # a question of four tokens after the start token
    targets[3, :20] = False  # a question that leaves no room
    batch = {
        "input_ids": ids,
        "labels": torch.where(torch.from_numpy(targets), ids, -100),
        "position_ids": torch.from_numpy(position_ids(segments)),
    }
    found = [prompt.tolist() for prompt in prompts(batch, tokens=12, at_most=15)]
    assert found == [list(range(12)), list(range(10, 17)), list(range(5)), list(range(5, 20))]
    del batch["position_ids"]  # as where each block is one document
    assert [len(prompt) for prompt in prompts(batch, tokens=3, at_most=15)] == [3, 3, 5, 15]


@pytest.mark.parametrize(
    ("objectives", "extra", "reason"),
    [
        ('[objectives.kl]\ndivergence = "forward_kl"', '[cache]\nform = "topk"', "text that is in no cache"),
        ("[objectives.labels]\nlabels = 1.0", "", "no objective uses a teacher"),
    ],
)
def test_what_cannot_be_graded_is_refused(
    write_recipe: Callable[..., Path], tiny_llama: Path, objectives: str, extra: str, reason: str
) -> None:
    recipe = write_recipe(tiny_llama, objectives=objectives, extra=f"[on_policy]\nlmbda = 0.5\n{extra}")
    with pytest.raises(BadInput, match=reason) as refused:
        load_module.load_recipe(recipe)
    assert "[on_policy]" in refused.value.message
