"""What the students learn from: the filled teacher caches, or the teacher itself where it runs online."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.cache.teacher_cache import Capture, TeacherCache, TeacherPass, arrays_to_store, fill
from limbeck.distill.context import Setting
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import heldout, loading
from limbeck.distill.models.precision import uses_bf16
from limbeck.distill.recipe import cache_form
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.teacher import logprobs, text_chunks
from limbeck.distill.teacher.retokenize import retokenized_pass
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from limbeck.distill.teacher.text_chunks import Reader


def teachers_for(setting: Setting, plans: list[Plan]) -> dict[str, TeacherCache | PreTrainedModel]:
    """By label, what each plan that needs the teacher learns from; filled caches cost no further pass of it."""
    assert setting.recipe.teacher is not None or not any(plan.objective.uses_teacher for plan in plans)
    chunked = [plan.label for plan in plans if plan.objective.divergence == "chunks"]
    forms = {
        plan.label: form_of(setting, plan)
        for plan in plans
        if plan.objective.uses_teacher and plan.label not in chunked
    }
    load = functools.cache(setting.teacher_model)
    caches = caches_for(setting, forms.values())
    if caches:
        _fill(setting, list(caches.values()), load)
    online = load() if None in forms.values() else None
    if forms:
        likeliest(setting, load)
    made: dict[str, Any] = {label: caches[form] if form else online for label, form in forms.items()}
    if chunked:
        cache = chunks_cache(setting)
        _fill_chunks(setting, cache, load)
        made |= dict.fromkeys(chunked, cache)
    return made


def form_of(setting: Setting, plan: Plan) -> Form | None:
    """The stored form that a plan learns from; None where its teacher runs online."""
    recipe = setting.recipe
    assert recipe.teacher is not None
    if recipe.on_policy:
        return None
    return cache_form.choose_form(recipe.cache, plan.objective, setting.vocab_size, recipe.teacher.is_endpoint)


def caches_for(setting: Setting, forms: Iterable[Form | None]) -> dict[Form, TeacherCache]:
    """The cache of each form over the training blocks, as far as it is filled."""
    wanted = [form for form in dict.fromkeys(forms) if form is not None]
    if not wanted:
        return {}
    settings, about = _cache_identity(setting)
    return {form: TeacherCache(settings, setting.train.ids.shape, form, about) for form in wanted}


def chunks_cache(setting: Setting) -> TeacherCache:
    """The cache of what a teacher with other tokens said of the training text, as far as it is filled."""
    settings, about = _cache_identity(setting)
    return TeacherCache(settings | {"kind": "chunks"}, setting.train.ids.shape, None, about)


def _cache_identity(setting: Setting) -> tuple[dict[str, str], dict[str, str]]:
    """What identifies the content of a cache beside its form, and what is told of it."""
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
        settings["told"] = "in the student's tokens"
    return settings, {"teacher": recipe.teacher.model, "recipe": str(setting.source.path)}


@functools.lru_cache(maxsize=4)  # it is asked for with every cache and student, over a whole vocabulary
def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies the tokens that ids stand for."""
    return json_digest(tokenizer.get_vocab())


def likeliest(setting: Setting, load: Callable[[], PreTrainedModel] | None = None) -> np.ndarray | None:
    """The teacher's likeliest next tokens on the held-out sample that students are scored on, stored once.

    None where they are not there and cannot be asked for: without `load`, of an endpoint, of other tokens.
    """
    if setting.teacher is None or setting.teacher.endpoint or setting.recipe.crosses_tokenizers:
        return None
    sample = heldout.sample_blocks(setting.heldout)
    key = json_digest(_cache_identity(setting)[0] | {"blocks": sample.digest})
    path = home() / "heldout" / f"{key[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        there: np.ndarray = np.load(path, allow_pickle=False)
        if there.shape == sample.ids.shape:
            return there
    if load is None:
        return None
    said = heldout.likeliest_tokens(load().to(loading.device()), sample, setting.vocab_size)  # type: ignore[arg-type]
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, said)
    return said


def _fill(setting: Setting, caches: list[TeacherCache], load: Callable[[], PreTrainedModel]) -> None:
    @functools.cache
    def teacher() -> TeacherPass:  # caches that are whole need no teacher
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
        captured = fill(caches, lambda *asked: teacher()(*asked), lambda count: bar.advance(task, count))
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
    """The teacher as one that reads text by its own tokenizer."""
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
    """Whether the teacher runs in bfloat16 here."""
    assert setting.teacher is not None
    return not setting.teacher.endpoint and uses_bf16(setting.recipe.training.bf16, setting.teacher_config())


def local_pass(model: PreTrainedModel, blocks: Blocks, vocab_size: int, bf16: bool) -> TeacherPass:
    """A function that runs a local teacher over blocks, once for all caches that lack them.

    Args:
        vocab_size: entries beyond it are padding and are left out.
        bf16: run under autocast.
    """
    import torch

    torch.nn.Module.to(model, loading.device()).eval()

    @torch.inference_mode()
    def run(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
        def logits() -> Iterator[torch.Tensor]:
            for batch in loading.batches(blocks, vocab_size, indices):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                    of_batch = loading.logits_of(model, batch)[..., :vocab_size]
                yield from of_batch

        return arrays_to_store(blocks, indices, logits(), caches)

    return run


def capture(model: PreTrainedModel, blocks: Blocks, cache: TeacherCache, bf16: bool) -> Capture:
    """`one_pass` for one cache."""
    assert cache.form is not None
    run = local_pass(model, blocks, cache.form.vocab_size, bf16)
    return lambda indices: run(indices, [cache])[0]
