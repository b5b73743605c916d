"""What students learn from: teacher caches, which it fills, or a teacher that runs online."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.cache.teacher_cache import Capture, TeacherCache, TeacherPass, fill
from limbeck.distill.context import Setting
from limbeck.distill.models import heldout, loading
from limbeck.distill.models.precision import uses_bf16
from limbeck.distill.recipe import cache_form
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.teacher import logprobs, text_chunks
from limbeck.distill.teacher.local import local_pass
from limbeck.distill.teacher.retokenize import retokenized_pass
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from limbeck.distill.teacher.text_chunks import Reader


def teachers_for(setting: Setting, plans: list[Plan]) -> dict[str, TeacherCache | PreTrainedModel]:
    """What each plan that uses the teacher learns from, by label: a filled cache, or the loaded teacher.

    The teacher runs only for blocks that no cache has.
    """
    assert setting.recipe.teacher is not None or not any(plan.objective.uses_teacher for plan in plans)
    chunk_labels = [plan.label for plan in plans if plan.objective.divergence == "chunks"]
    forms = {
        plan.label: form_of(setting, plan)
        for plan in plans
        if plan.objective.uses_teacher and plan.label not in chunk_labels
    }
    load = functools.cache(setting.teacher_model)
    caches = caches_for(setting, forms.values())
    if caches:
        _fill(setting, list(caches.values()), load)
    online = load() if None in forms.values() else None
    if forms:
        heldout_likeliest_tokens(setting, load)
    teachers: dict[str, Any] = {label: caches[form] if form else online for label, form in forms.items()}
    if chunk_labels:
        cache = chunks_cache(setting)
        _fill_chunks(setting, cache, load)
        teachers |= dict.fromkeys(chunk_labels, cache)
    return teachers


def form_of(setting: Setting, plan: Plan) -> Form | None:
    """The stored form that a plan learns from; None if its teacher runs online."""
    recipe = setting.recipe
    assert recipe.teacher is not None
    if recipe.on_policy:
        return None
    return cache_form.choose_form(recipe.cache, plan.objective, setting.vocab_size, recipe.teacher.is_endpoint)


def caches_for(setting: Setting, forms: Iterable[Form | None]) -> dict[Form, TeacherCache]:
    """The cache of each form over the training blocks, filled or not."""
    stored_forms = [form for form in dict.fromkeys(forms) if form is not None]
    if not stored_forms:
        return {}
    settings, about = _cache_identity(setting)
    return {form: TeacherCache(settings, setting.train.ids.shape, form, about) for form in stored_forms}


def chunks_cache(setting: Setting) -> TeacherCache:
    """The cache of text chunks over the training blocks, filled or not: of a teacher with another tokenizer."""
    settings, about = _cache_identity(setting)
    return TeacherCache(settings | {"kind": "chunks"}, setting.train.ids.shape, None, about)


def _cache_identity(setting: Setting) -> tuple[dict[str, str], dict[str, str]]:
    """The settings that identify the content of a cache, without its form; and what `limbeck cache list` shows."""
    recipe, teacher = setting.recipe, setting.teacher
    assert recipe.teacher is not None
    assert teacher is not None
    settings = {
        "teacher": teacher.digest,
        "tokenizer": tokenizer_digest(setting.tokenizer),
        "blocks": setting.train.digest,
        "precision": "bf16" if _bf16(setting) else "fp32",
    }
    if recipe.teacher.retokenize:
        settings["retokenized"] = "to the student's tokens"
    return settings, {"teacher": recipe.teacher.model, "recipe": str(setting.source.path)}


@functools.lru_cache(maxsize=4)  # called for every cache and student, and hashes a whole vocabulary
def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of a tokenizer's tokens and ids."""
    return json_digest(tokenizer.get_vocab())


def heldout_likeliest_tokens(setting: Setting, load: Callable[[], PreTrainedModel] | None = None) -> np.ndarray | None:
    """The teacher's most likely next tokens (n, T) on the held-out sample that students are scored on.

    Computed once and stored. None for an endpoint or a teacher with another tokenizer, or if they are not stored and
    there is no `load` to load the teacher.
    """
    if setting.teacher is None or setting.teacher.endpoint or setting.recipe.crosses_tokenizers:
        return None
    sample = heldout.sample_blocks(setting.heldout)
    key = json_digest(_cache_identity(setting)[0] | {"blocks": sample.digest})
    path = home() / "heldout" / f"{key[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged
        stored: np.ndarray = np.load(path, allow_pickle=False)
        if stored.shape == sample.ids.shape:
            return stored
    if load is None:
        return None
    tokens = heldout.likeliest_tokens(load().to(loading.device()), sample, setting.vocab_size)  # type: ignore[arg-type]
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, tokens)
    return tokens


def _fill(setting: Setting, caches: list[TeacherCache], load: Callable[[], PreTrainedModel]) -> None:
    @functools.cache
    def teacher() -> TeacherPass:  # complete caches do not load the teacher
        assert setting.teacher is not None
        if setting.teacher.endpoint:
            return logprobs.endpoint_pass(setting)
        if setting.recipe.teacher and setting.recipe.teacher.retokenize:
            return retokenized_pass(
                load(), setting.teacher_tokenizer(), setting.train, setting.tokenizer, _bf16(setting)
            )
        return local_pass(load(), setting.train, setting.vocab_size, _bf16(setting))

    with progress_bar() as bar:
        task = bar.add_task("teacher cache", total=len(setting.train.ids), rate="")
        captured = fill(caches, lambda blocks, parts: teacher()(blocks, parts), lambda count: bar.advance(task, count))
    for cache in caches:
        assert cache.form is not None
        at = f" at temperature {cache.form.temperature:g}" if cache.form.temperature != 1.0 else ""
        _report_cache(cache, f"{cache.form.kind}{at}", captured)


def _fill_chunks(setting: Setting, cache: TeacherCache, load: Callable[[], PreTrainedModel]) -> None:
    @functools.cache
    def teacher() -> Capture:
        return text_chunks.capture(setting.train, setting.tokenizer, _reader(setting, load))

    with progress_bar() as bar:
        task = bar.add_task("teacher cache", total=cache.num_blocks, rate="")
        captured = cache.fill(lambda blocks: teacher()(blocks), lambda count: bar.advance(task, count))
    _report_cache(cache, "chunks", captured)


def _reader(setting: Setting, load: Callable[[], PreTrainedModel]) -> Reader:
    """The function that reads text with the teacher and its own tokenizer."""
    assert setting.teacher is not None
    if setting.teacher.endpoint:
        return text_chunks.endpoint_reader(logprobs.prompt_logprobs_client(setting).token_logprobs)
    return text_chunks.local_reader(load(), setting.teacher_tokenizer(), _bf16(setting))


def _report_cache(cache: TeacherCache, kind: str, captured: int) -> None:
    tokens = cache.num_blocks * cache.length
    print_status(
        f"  teacher cache: {kind}, {tokens:,} tokens, {captured * cache.length:,} of them captured now, "
        f"{cache.disk_bytes() / tokens:.0f} bytes a token, {cache.folder.name}"
    )


def _bf16(setting: Setting) -> bool:
    """Whether the teacher runs in bfloat16 on this machine."""
    assert setting.teacher is not None
    return not setting.teacher.endpoint and uses_bf16(setting.recipe.training.bf16, setting.teacher_config())
