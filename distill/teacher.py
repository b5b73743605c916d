"""What the students learn from: the filled teacher cache, or the teacher itself where it runs online."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from distill import models
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
        return models.capture_topk(model, setting.train, setting.vocab_size, top_k, bf16)

    with progress() as bar:
        task = bar.add_task("teacher cache", total=len(setting.train.ids), rate="")
        captured = cache.fill(lambda blocks: runs()(blocks), lambda count: bar.advance(task, count))
    say(
        f"  teacher cache: {setting.train.ids.size:,} tokens, "
        f"{captured * recipe.data.max_length:,} of them captured now, "
        f"{cache.disk_bytes() / setting.train.ids.size:.0f} bytes a token, {cache.folder.name}"
    )
    return cache
