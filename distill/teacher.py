"""What the students learn from: the filled teacher caches, or the teacher itself where it runs online."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import echo, models, stored
from distill.blocks import Blocks
from distill.cache import Capture, TeacherCache, fill
from distill.precision import uses_bf16
from distill.recipe import Plan
from distill.setting import Setting
from distill.stored import Form
from registry.digest import json_digest
from registry.terminal import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What each of several caches stores of the blocks at some numbers: one pass of the teacher for all of them.
Pass = Callable[[np.ndarray, list[TeacherCache]], list[dict[str, np.ndarray]]]


def teachers_for(setting: Setting, plans: list[Plan]) -> dict[str, TeacherCache | PreTrainedModel]:
    """By label, what each plan that needs the teacher learns from; filled caches cost no further pass of it."""
    assert setting.recipe.teacher is not None or not any(plan.objective.uses_teacher for plan in plans)
    forms = {plan.label: form_of(setting, plan) for plan in plans if plan.objective.uses_teacher}
    caches = caches_for(setting, forms.values())
    if caches:
        _fill(setting, list(caches.values()))
    online = _load(setting) if None in forms.values() else None
    made: dict[str, Any] = {label: caches[form] if form else online for label, form in forms.items()}
    return made


def form_of(setting: Setting, plan: Plan) -> Form | None:
    """The stored form that a plan learns from; None where its teacher runs online."""
    recipe = setting.recipe
    assert recipe.teacher is not None
    if recipe.on_policy:
        return None
    return stored.choose(recipe.cache, plan.objective, setting.vocab_size, recipe.teacher.is_endpoint)


def caches_for(setting: Setting, forms: Iterable[Form | None]) -> dict[Form, TeacherCache]:
    """The cache of each form over the training blocks, as far as it is filled."""
    recipe, teacher = setting.recipe, setting.teacher
    wanted = [form for form in dict.fromkeys(forms) if form is not None]
    if not wanted:
        return {}
    assert recipe.teacher is not None
    assert teacher is not None
    settings = {
        "teacher": teacher.digest,
        "tokenizer": tokenizer_digest(setting.tokenizer),
        "blocks": setting.train.digest,
        "precision": "bf16" if _bf16(setting) else "fp32",
    }
    about = {"teacher": recipe.teacher.model, "recipe": str(setting.source.path)}
    return {form: TeacherCache(settings, setting.train.ids.shape, form, about) for form in wanted}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies the tokens that ids stand for."""
    return json_digest(tokenizer.get_vocab())


def _fill(setting: Setting, caches: list[TeacherCache]) -> None:
    @functools.cache
    def teacher() -> Pass:  # caches that are whole need no teacher
        assert setting.teacher is not None
        if setting.teacher.endpoint:
            return echo.pass_over(setting)
        return one_pass(_load(setting), setting.train, setting.vocab_size, _bf16(setting))

    with progress() as bar:
        task = bar.add_task("teacher cache", total=len(setting.train.ids), rate="")
        captured = fill(caches, lambda *asked: teacher()(*asked), lambda count: bar.advance(task, count))
    tokens = setting.train.ids.size
    for cache in caches:
        assert cache.form is not None
        at = f" at temperature {cache.form.temperature:g}" if cache.form.temperature != 1.0 else ""
        say(
            f"  teacher cache: {cache.form.kind}{at}, {tokens:,} tokens, "
            f"{captured * setting.recipe.data.max_length:,} of them captured now, "
            f"{cache.disk_bytes() / tokens:.0f} bytes a token, {cache.folder.name}"
        )


def _load(setting: Setting) -> PreTrainedModel:
    assert setting.recipe.teacher is not None
    assert setting.teacher is not None
    return models.load_model(setting.teacher.path, setting.recipe.teacher.trust_remote_code)


def _bf16(setting: Setting) -> bool:
    """Whether the teacher runs in bfloat16 here."""
    from transformers import AutoConfig

    assert setting.recipe.teacher is not None
    assert setting.teacher is not None
    if setting.teacher.endpoint:
        return False
    trusted = setting.recipe.teacher.trust_remote_code
    config = AutoConfig.from_pretrained(setting.teacher.path, trust_remote_code=trusted)
    return uses_bf16(setting.recipe.training.bf16, config)


def one_pass(model: PreTrainedModel, blocks: Blocks, vocab_size: int, bf16: bool) -> Pass:
    """A function that runs a local teacher over blocks, once for all caches that lack them.

    Args:
        vocab_size: entries beyond it are padding and are left out.
        bf16: run under autocast.
    """
    import torch

    torch.nn.Module.to(model, models.device()).eval()

    @torch.inference_mode()
    def run(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
        said: list[list[dict[str, np.ndarray]]] = [[] for _ in caches]
        rest = iter(indices)
        for batch in models.batches(blocks, vocab_size, indices):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                logits = models.logits_of(model, batch)[..., :vocab_size]
            for block, of_block in zip(logits, rest, strict=False):
                wanted = np.append(blocks.targets[of_block, 1:], False)  # a position tells of the next token
                for cache, arrays in zip(caches, said, strict=True):
                    assert cache.form is not None
                    arrays.append(stored.block_arrays(cache.form, block, wanted, (cache.seed, int(of_block))))
        return [stored.shard_arrays(arrays) for arrays in said]

    return run


def capture(model: PreTrainedModel, blocks: Blocks, cache: TeacherCache, bf16: bool) -> Capture:
    """`one_pass` for one cache."""
    assert cache.form is not None
    run = one_pass(model, blocks, cache.form.vocab_size, bf16)
    return lambda indices: run(indices, [cache])[0]
