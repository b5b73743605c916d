"""On-policy training equals a plain loop that samples and trains without the trainer."""

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
from limbeck.distill.training.on_policy import StudentWriter, extract_prompts
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.core.errors import BadInput

VOCABULARY, LENGTH, BATCH = 300, 24, 4
END = 0


def blocks_of(rows: int, seed: int = 0) -> Blocks:
    """Random tokens, one document per block."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (rows, LENGTH), dtype=np.int32)
    segments = np.ones((rows, LENGTH), dtype=np.uint16)
    targets = position_ids(segments) > 0
    return Blocks(ids, segments, targets, int(targets.sum()), int(targets.sum()), layout_digest(ids, segments, targets))


def load(folder: Path) -> PreTrainedModel:
    """A model without dropout, so that two runs can be compared."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def written_ids(
    student: PreTrainedModel, settings: OnPolicy, batch: dict[str, Any], step: int, number: int
) -> torch.Tensor:
    """The ids that the student writes in place of a batch."""
    return StudentWriter(student, settings, seed=3)(batch, step, number)["input_ids"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_trains_as_a_plain_loop_does(
    request: pytest.FixtureRequest, tmp_path: Path, limbeck_home: Path, tiny_neox: Path, name: str
) -> None:
    folder: Path = request.getfixturevalue(name)
    blocks, settings = blocks_of(3 * BATCH), OnPolicy(lmbda=1.0, max_new_tokens=6, prompt_tokens=7, temperature=0.8)
    training = Training(
        max_steps=3, per_device_train_batch_size=BATCH, logging_steps=1, bf16=False, lr_scheduler_type="constant",
        learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1e9, warmup_steps=0.0,
    )  # fmt: skip
    teacher, student = load(tiny_neox), load(folder)
    losses: list[float] = []
    objective = Objective(
        divergence="reverse_kl", labels=0.5
    )  # the label loss does not apply to the student's own text
    job = Job(
        student, blocks, blocks, objective, training, teacher, tmp_path / "run", 3, VOCABULARY, on_policy=settings
    )
    train(job, on_log=lambda logs, step: losses.append(logs["loss"]) if "loss" in logs else None)

    plain, order = load(folder), block_order(len(blocks.ids))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for step in range(3):
        rows = torch.from_numpy(blocks.ids[order[step]].astype(np.int64))[:, :7]
        rows = sample_tokens(plain.eval(), rows, 6, 0.8, draw_seed(3, step, 0))
        inputs, written = rows.clamp_min(0), rows[:, 7:]  # -1 after a row's end
        log_q = plain.train()(input_ids=inputs).logits[:, 6:-1].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(input_ids=inputs).logits[:, 6:-1].log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)[written >= 0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=2e-4)
    for trained, expected_parameter in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected_parameter, atol=2e-5, rtol=1e-3)


def block_order(rows: int) -> list[list[int]]:
    """The numbers of the blocks of each step, as in a run on labels."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=3)
    numbers = list(sampler)
    return [numbers[first : first + BATCH] for first in range(0, rows, BATCH)]


def draw_seed(seed: int, step: int, number: int) -> int:
    """The sampling seed that depends on the run's seed, the step and the number of the batch."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[4:12], "big") % 2**63


@torch.no_grad()
def sample_tokens(model: PreTrainedModel, rows: torch.Tensor, new: int, temperature: float, seed: int) -> torch.Tensor:
    """Rows with `new` sampled tokens, without a key-value cache; -1 after a row's end token."""
    ended = torch.zeros(len(rows), dtype=torch.bool)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(new):
            probs = F.softmax(model(input_ids=rows.clamp_min(0)).logits[:, -1] / temperature, dim=-1)
            token = torch.multinomial(probs, 1)[:, 0]
            rows = torch.cat([rows, torch.where(ended, -1, token)[:, None]], dim=1)
            ended |= token == END
    return rows


def test_the_text_depends_only_on_seed_step_and_number(tiny_llama: Path) -> None:
    student, batch = load(tiny_llama), dict(blocks_of(BATCH).batch(np.arange(BATCH)))
    always = OnPolicy(lmbda=1.0, max_new_tokens=6)
    written = [written_ids(student, always, batch, step, number) for step, number in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])
    before = torch.random.get_rng_state()
    assert torch.equal(written_ids(student, always, batch, 0, 0), written[0])
    assert torch.equal(torch.random.get_rng_state(), before)  # the random state of dropout is unchanged
    assert student.training is False


def test_the_student_writes_a_share_lmbda_of_the_batches(tiny_llama: Path) -> None:
    student, batch = load(tiny_llama), dict(blocks_of(1).batch(np.arange(1)))
    writer = StudentWriter(student, OnPolicy(lmbda=0.3, max_new_tokens=1), seed=0)
    share = np.mean([writer(batch, step, number) is not batch for step in range(50) for number in range(4)])
    assert 0.2 < share < 0.4  # 0.3 within three standard errors


def test_labels_are_the_written_tokens_up_to_the_end_token(tiny_llama: Path) -> None:
    student = load(tiny_llama)
    end = student.config.eos_token_id
    batch = dict(blocks_of(64).batch(np.arange(64)))
    written = StudentWriter(student, OnPolicy(lmbda=1.0, max_new_tokens=12, temperature=20.0), seed=0)(batch, 0, 0)
    assert written["written"]
    lengths = []
    for ids, labels, row in zip(written["input_ids"], written["labels"], batch["input_ids"], strict=True):
        assert torch.equal(ids[:12], row[:12])  # the first half
        assert (labels[:12] == -100).all()
        own = labels[12:][labels[12:] != -100]
        assert torch.equal(own, ids[12 : 12 + len(own)])
        assert (labels[12 + len(own) :] == -100).all()
        assert end not in own[:-1]
        assert len(own) == 12 or own[-1] == end
        lengths.append(len(own))
    assert min(lengths) < 12 == max(lengths)  # some row ended early


def test_prompts_come_from_the_document_with_the_most_targets() -> None:
    ids = torch.arange(24)[None].repeat(4, 1)
    segments = np.ones((4, 24), dtype=np.uint16)
    segments[1, 10:] = 2  # two documents; the second has more targets
    segments[2, 20:] = 0  # padding
    targets = position_ids(segments) > 0
    targets[2, :5] = targets[2, 20:] = False  # a question of four tokens after the start token
    targets[3, :20] = False  # a question that leaves no room for an answer
    batch = {
        "input_ids": ids,
        "labels": torch.where(torch.from_numpy(targets), ids, -100),
        "position_ids": torch.from_numpy(position_ids(segments)),
    }
    found = [prompt.tolist() for prompt in extract_prompts(batch, tokens=12, max_tokens=15)]
    assert found == [list(range(12)), list(range(10, 17)), list(range(5)), list(range(5, 20))]
    del batch["position_ids"]  # absent if each block is one document
    assert [len(prompt) for prompt in extract_prompts(batch, tokens=3, max_tokens=15)] == [3, 3, 5, 15]


@pytest.mark.parametrize(
    ("objectives", "extra", "reason"),
    [
        ('[objectives.kl]\ndivergence = "forward_kl"', '[cache]\nform = "topk"', "text that is in no cache"),
        ("[objectives.labels]\nlabels = 1.0", "", "no objective uses a teacher"),
    ],
)
def test_recipes_whose_text_no_teacher_can_grade_are_refused(
    write_recipe: Callable[..., Path], tiny_llama: Path, objectives: str, extra: str, reason: str
) -> None:
    recipe = write_recipe(tiny_llama, objectives=objectives, extra=f"[on_policy]\nlmbda = 0.5\n{extra}")
    with pytest.raises(BadInput, match=reason) as refused:
        load_module.load_recipe(recipe)
    assert "[on_policy]" in refused.value.message
