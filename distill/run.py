"""A whole recipe: text, teacher, cache, then each student trained, logged and registered."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill import card, corpus, models
from distill import recipe as recipes
from distill.blocks import Blocks, make_blocks, train_tokenizer
from distill.cache import TeacherCache
from distill.recipe import Plan, Recipe
from registry.digest import json_digest
from registry.errors import BadInput
from registry.home import home, written_whole
from registry.records import Version
from registry.resolve import Model, resolve
from registry.store import Store
from registry.terminal import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Student(NamedTuple):
    """One student of a recipe: its registered version, and whether this run trained it."""

    plan: Plan
    version: Version
    trained: bool


class Setting(NamedTuple):
    """What every student of a recipe shares."""

    recipe: Recipe
    corpus: corpus.Corpus
    train: Blocks
    heldout: Blocks
    tokenizer: PreTrainedTokenizerBase
    teacher: Model | None
    teacher_version: Version | None


def distill(path: Path, overrides: list[str], store: Store, to: Path | None = None) -> list[Student]:
    """Carry out the recipe at `path`; students already made from the same ingredients are skipped.

    Args:
        to: also copy the student's files there (a recipe with one student).
    """
    recipe = recipes.load(path, overrides)
    plans = recipes.plans(recipe)
    if to is not None and len(plans) != 1:
        raise BadInput(f"--to takes one student and {path} makes {len(plans)}", fix="leave --to out")
    setting = prepare(recipe, path.resolve().parent, store)
    keys = {plan.label: student_key(setting, plan) for plan in plans}
    made = {label: store.find(recipe.name, recipe_digest=key) for label, key in keys.items()}
    missing = [plan for plan in plans if made[plan.label] is None]
    for plan in plans:
        if made[plan.label] is not None:
            say(f"  {plan.label}: already made, {made[plan.label].ref}")  # type: ignore[union-attr]
    teacher = _teacher_for(setting, missing) if missing else None
    for plan in missing:
        made[plan.label] = _make(setting, plan, keys[plan.label], teacher, store)
    students = [Student(plan, _there(made[plan.label]), plan in missing) for plan in plans]
    if to is not None:
        with written_whole(to) as temporary:
            shutil.copytree(store.folder(students[0].version), temporary)
    return students


def _there(version: Version | None) -> Version:
    assert version is not None
    return version


def prepare(recipe: Recipe, beside: Path, store: Store) -> Setting:
    """Text on disk, teacher resolved and registered, tokenizer, blocks."""
    text = corpus.prepare(recipe.data, beside, recipe.name)
    say(
        f"  text: {text.train_documents} documents to train on ({text.train_bytes / 1e6:.1f} MB), "
        f"{text.heldout_documents} held out ({text.heldout_bytes / 1e6:.1f} MB)"
    )
    train, heldout = corpus.read(text.train), corpus.read(text.heldout)
    teacher, teacher_version = _register_teacher(recipe, beside, store)
    if teacher is not None and recipe.teacher is not None:
        tokenizer = models.load_tokenizer(teacher.path, recipe.teacher.trust_remote_code)
    else:
        tokenizer = _own_tokenizer(recipe, beside, train)
    return Setting(
        recipe,
        text,
        make_blocks(train, tokenizer, recipe.data.max_length, recipe.data.max_tokens),
        make_blocks(heldout, tokenizer, recipe.data.max_length),
        tokenizer,
        teacher,
        teacher_version,
    )


def _register_teacher(recipe: Recipe, beside: Path, store: Store) -> tuple[Model | None, Version | None]:
    if recipe.teacher is None:
        return None, None
    name = recipe.teacher.model
    teacher = resolve(str(beside / name) if (beside / name).is_dir() else name, store)
    if teacher.engine != "torch":
        raise BadInput(f"teacher.model {name!r} is an ONNX artifact", fix="name the torch model it came from")
    if teacher.version is not None and teacher.version.name == recipe.name:
        return teacher, teacher.version
    version = store.register(
        recipe.name,
        teacher.path,
        kind="teacher",
        licence=recipe.teacher.licence or recipe.licence,
        recipe="teacher",
        params=_parameters(teacher.path),
        code_version=code_version(),
    )
    say(f"  teacher: {version.ref}, digest {version.digest[:12]}")
    return teacher, version


def _own_tokenizer(recipe: Recipe, beside: Path, train: list[corpus.Document]) -> PreTrainedTokenizerBase:
    if recipe.tokenizer is not None:
        return train_tokenizer(train, recipe.tokenizer.vocab_size, recipe.data.max_length)
    pretrained = [student.model for student in recipe.students.values() if student.model]
    if not pretrained:
        raise BadInput(
            "the recipe has no [teacher], no [tokenizer] and no pretrained student",
            fix="add [tokenizer] with a vocab_size to train one on the text",
        )
    return models.load_tokenizer(_student_folder(pretrained[0], beside))


def _student_folder(model: str, beside: Path) -> Path:
    return resolve(str(beside / model) if (beside / model).is_dir() else model).path


def student_key(setting: Setting, plan: Plan) -> str:
    """The digest of all that makes a student what it is: the part of the recipe that concerns it, data, teacher."""
    recipe = setting.recipe
    objective = recipe.objectives[plan.objective]
    uses_teacher = objective.divergence is not None
    training = recipe.training_of(plan.student).model_dump(exclude={"logging_steps", "save_minutes"})
    return json_digest(
        {
            "student": recipe.students[plan.student].model_dump(exclude={"training"}),
            "objective": objective.model_dump(),
            "training": training,
            "seed": recipe.seed,
            "blocks": setting.train.digest,
            "tokenizer": recipe.tokenizer.model_dump() if recipe.tokenizer else None,
            "teacher": setting.teacher.digest if setting.teacher and uses_teacher else None,
            "top_k": recipe.cache.top_k if uses_teacher else None,
        }
    )


def _teacher_for(setting: Setting, plans: list[Plan]) -> PreTrainedModel | TeacherCache | None:
    """The filled teacher cache, or the teacher itself where the recipe runs it online; None if no plan needs it."""
    recipe = setting.recipe
    if setting.teacher is None or not any(recipe.objectives[plan.objective].divergence for plan in plans):
        return None
    assert recipe.teacher is not None
    if recipe.cache.top_k == 0:
        return models.load_model(setting.teacher.path, recipe.teacher.trust_remote_code)
    settings = {
        "teacher": setting.teacher.digest,
        "blocks": setting.train.digest,
        "top_k": min(recipe.cache.top_k, _vocab_size(setting)),
    }
    cache = TeacherCache(settings, setting.train.ids, _vocab_size(setting))
    loaded: list[Any] = []

    def capture(blocks: Any) -> Any:
        if not loaded:  # a cache that is whole needs no teacher
            model = models.load_model(setting.teacher.path, recipe.teacher.trust_remote_code)  # type: ignore[union-attr]
            loaded.append(models.capture_topk(model.eval(), cache.top_k))
        return loaded[0](blocks)

    with progress() as bar:
        task = bar.add_task("teacher cache", total=len(setting.train.ids), rate="")
        captured = cache.fill(capture, lambda count: bar.advance(task, count))
    tokens = captured * setting.train.ids.shape[1]
    per_token = cache.disk_bytes() / setting.train.ids.size
    say(f"  teacher cache: {tokens:,} tokens captured, {per_token:.0f} bytes a token, {cache.folder.name}")
    return cache


def _vocab_size(setting: Setting) -> int:
    import json

    assert setting.teacher is not None
    config = json.loads((setting.teacher.path / "config.json").read_text())
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))


def _make(
    setting: Setting, plan: Plan, key: str, teacher: PreTrainedModel | TeacherCache | None, store: Store
) -> Version:
    """Train one student, log its run, register it."""
    recipe = setting.recipe
    objective = recipe.objectives[plan.objective]
    work = home() / "runs" / key[:16]
    tags = {"limbeck.label": plan.label, "limbeck.recipe_digest": key, "limbeck.data_digest": setting.corpus.digest}
    params = {
        "student": plan.student,
        **{f"config.{k}": v for k, v in recipe.students[plan.student].config.items()},
        **{f"objective.{k}": v for k, v in objective.model_dump().items()},
        **{f"training.{k}": v for k, v in recipe.training_of(plan.student).model_dump().items()},
    }
    with store.run(f"{recipe.name} {plan.label}", params=params, tags=tags) as run:
        if setting.teacher_version is not None:
            run.params({"teacher": setting.teacher_version.ref, "teacher_digest": setting.teacher_version.digest})
        facts = _train_and_save(setting, plan, teacher, work, run)
        run.metrics({k: v for k, v in facts.items() if isinstance(v, int | float)})
        version = store.register(
            recipe.name,
            work / "final",
            kind="student" if setting.teacher else "teacher",
            licence=recipe.licence,
            parent=setting.teacher_version.ref if setting.teacher_version else None,
            teacher=setting.teacher_version.ref if setting.teacher_version else None,
            recipe=plan.label,
            recipe_digest=key,
            data_digest=setting.corpus.digest,
            code_version=code_version(),
            params=int(facts["params"]),
            precision=_precision(recipe.students[plan.student].dtype),
            run_id=run.id,
        )
    shutil.rmtree(work, ignore_errors=True)
    say(
        f"  {plan.label}: {version.ref}, {facts['heldout_bits_per_byte']:.3f} held-out bits per byte, "
        f"{facts['tokens']:,} tokens in {facts['seconds']:.0f} s"
    )
    return version


def _train_and_save(
    setting: Setting, plan: Plan, teacher: PreTrainedModel | TeacherCache | None, work: Path, run: Any
) -> dict[str, Any]:
    """Train below `work`, save the student in `work/final`; returns its figures."""
    import torch

    from distill.train import train

    recipe = setting.recipe
    spec = recipe.students[plan.student]
    objective = recipe.objectives[plan.objective]
    folder = _student_folder(spec.model, Path.cwd()) if spec.model else None
    model = models.build_student(plan.student, spec, setting.tokenizer, recipe.data.max_length, recipe.seed, folder)
    if objective.divergence and setting.teacher is not None:
        if folder is not None:
            _check_one_tokenizer(setting, folder, plan.student)
        models.check_vocabulary(model, _vocab_size(setting), plan.student)
    with _bar(plan.label) as on_progress:
        trained = train(
            model,
            setting.train.ids,
            objective,
            recipe.training_of(plan.student),
            teacher,
            work,
            recipe.seed,
            on_progress,
            run.metrics,
        )
    facts = {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "heldout_bits_per_byte": models.bits_per_byte(model, setting.heldout),
    }
    model.to(getattr(torch, spec.dtype))
    with written_whole(work / "final") as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        setting.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card.student_card(setting, plan, facts), encoding="utf-8")
    return facts


def _check_one_tokenizer(setting: Setting, folder: Path, student: str) -> None:
    own = models.load_tokenizer(folder).get_vocab()
    if own != setting.tokenizer.get_vocab():
        raise BadInput(
            f"students.{student}.model has a tokenizer of {len(own)} tokens that is not the teacher's "
            f"({len(setting.tokenizer)} tokens)",
            fix="a divergence compares logits token by token: choose a student with the teacher's tokenizer, "
            "or an objective of labels alone",
        )


@contextmanager
def _bar(label: str) -> Iterator[Any]:
    with progress() as bar:
        task = bar.add_task(label, total=None, rate="")

        def on_progress(now: Any) -> None:
            loss = f"loss {now.loss:.3f}, " if now.loss is not None else ""
            rate = f"{loss}{now.tokens_per_s:,.0f} tok/s"
            bar.update(task, completed=now.step, total=now.steps, rate=rate)

        yield on_progress


def _precision(dtype: str) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                shape = file.get_slice(key).get_shape()
                size = 1
                for length in shape:
                    size *= length
                total += size
    return total


def code_version() -> str:
    """Limbeck's version, and the commit it runs from where that can be told."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5
        )
        suffix = f"+g{commit.stdout.strip()}" if commit.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        suffix = ""
    return f"limbeck {installed('limbeck')}{suffix}"
