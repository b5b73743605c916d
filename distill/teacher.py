"""What the students learn from: the filled teacher cache, or the teacher itself where it runs online."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from distill import models
from distill.blocks import Blocks
from distill.cache import Capture, TeacherCache
from distill.recipe import Plan
from distill.setting import Setting
from registry.terminal import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def teacher_for(setting: Setting, plans: list[Plan]) -> PreTrainedModel | TeacherCache | None:
    """The filled teacher cache, or the teacher itself where the recipe runs it online; None if no plan needs it."""
    recipe = setting.recipe
    if setting.teacher is None or not any(plan.objective.uses_teacher for plan in plans):
        return None
    assert recipe.teacher is not None
    path, trust_remote_code = setting.teacher.path, recipe.teacher.trust_remote_code
    if recipe.cache.form == "online":
        return models.load_model(path, trust_remote_code)
    bf16 = models.has_bf16() if recipe.training.bf16 is None else recipe.training.bf16
    top_k = min(recipe.cache.top_k, setting.vocab_size)
    settings: dict[str, str | int] = {
        "teacher": setting.teacher.digest,
        "blocks": setting.train.digest,
        "top_k": top_k,
        "precision": "bf16" if bf16 else "fp32",
    }
    cache = TeacherCache(settings, len(setting.train.ids), setting.vocab_size)

    @functools.cache
    def runs() -> Capture:  # a cache that is whole needs no teacher
        model = models.load_model(path, trust_remote_code)
        return capture_topk(model, setting.train, setting.vocab_size, top_k, bf16)

    with progress() as bar:
        task = bar.add_task("teacher cache", total=len(setting.train.ids), rate="")
        captured = cache.fill(lambda blocks: runs()(blocks), lambda count: bar.advance(task, count))
    say(
        f"  teacher cache: {setting.train.ids.size:,} tokens, "
        f"{captured * recipe.data.max_length:,} of them captured now, "
        f"{cache.disk_bytes() / setting.train.ids.size:.0f} bytes a token, {cache.folder.name}"
    )
    return cache


def capture_topk(model: PreTrainedModel, blocks: Blocks, vocab_size: int, top_k: int, bf16: bool) -> Capture:
    """A function of block numbers (n,) that runs the teacher: ids (n, T, k) and log-probabilities (n, T, k).

    Args:
        vocab_size: entries beyond it are padding and are left out.
        bf16: run under autocast.
    """
    import torch

    torch.nn.Module.to(model, models.device()).eval()

    @torch.inference_mode()
    def capture(indices: np.ndarray) -> dict[str, np.ndarray]:
        ids, logprobs = [], []
        for batch in models.batches(blocks, vocab_size, indices):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                logits = models.logits_of(model, batch)[..., :vocab_size]
            values, chosen = logits.topk(top_k, dim=-1)
            logprobs.append((values - logits.logsumexp(-1, keepdim=True)).cpu().numpy())
            ids.append(chosen.cpu().numpy())
        return {"ids": np.concatenate(ids), "logprobs": np.concatenate(logprobs)}

    return capture
