"""What the students of a recipe share: text, tokenizer, blocks, teacher; all checked before anything is trained."""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import Blocks, make_blocks, no_blocks, train_tokenizer
from limbeck.distill.data.packing import keeps_apart
from limbeck.distill.models import loading
from limbeck.distill.recipe.schema import Recipe, Source, Teacher
from limbeck.distill.students import licences as terms
from limbeck.distill.students import model_card
from limbeck.distill.teacher import endpoint, generate
from limbeck.distill.teacher.generate import Generated
from limbeck.registry.catalog.model_ref import Model, resolve
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.core.terminal import say
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.records import Version

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_TEXT = corpus.Corpus(Path(), Path(), "", 0, 0, 0, 0)  # not written yet


class Setting(NamedTuple):
    """What every student of a recipe shares."""

    recipe: Recipe
    source: Source
    corpus: corpus.Corpus
    train: Blocks
    heldout: Blocks
    tokenizer: PreTrainedTokenizerBase
    teacher: Model | None
    teacher_version: Version | None
    starts: dict[str, Model]  # of the students that begin pretrained
    generated: Generated | None = None  # of a text that the teacher wrote
    # Label of the teacher, or of what a student begins as -> licences of its parts (distill.students.licences)
    inherited: dict[str, tuple[licences.Term, ...]] = {}

    @property
    def licence_allows(self) -> bool | None:
        """Whether the teacher's own licence lets a student learn from its outputs; None: not known, or no teacher."""
        asked = self.recipe.teacher
        if asked is None or asked.licence_allows_distillation is not None:
            return asked.licence_allows_distillation if asked else None
        return licences.allows(self.teacher_licence)

    @property
    def teacher_licence(self) -> str | None:
        """As the recipe says, else as the provider's terms, the registry or its card do; None: not stated."""
        asked, teacher = self.recipe.teacher, self.teacher
        if asked is None or asked.licence or teacher is None:
            return asked.licence if asked else None
        return licences.of_endpoint(asked.model) or model_card.of(teacher)

    @property
    def vocab_size(self) -> int:
        return loading.vocabulary(self.tokenizer)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a recipe's teacher. Raises BadInput where there is none."""
        return loading.load_tokenizer(*self._teacher_files())

    def teacher_config(self) -> PretrainedConfig:
        """Of a recipe's local teacher."""
        return loading.load_config(*self._teacher_files())

    def teacher_model(self) -> PreTrainedModel:
        """A recipe's local teacher, in float32."""
        return loading.load_model(*self._teacher_files())

    def _teacher_files(self) -> tuple[Path, bool]:
        assert self.teacher is not None
        assert self.recipe.teacher is not None
        return self.teacher.path, self.recipe.teacher.trust_remote_code


def prepare(recipe: Recipe, source: Source, store: Store) -> Setting:
    """Text on disk, teacher found, tokenizer, blocks; nothing is registered. Raises BadInput with the recipe's line.

    Where the teacher is to write the text there is none yet, and no block: see `written`.
    """
    beside = source.path.resolve().parent
    text = NO_TEXT
    if recipe.generate is None:
        with at(source, "data", "path"):
            text = corpus.prepare(recipe.data, beside, recipe.name)
    starts = {}
    for name, student in recipe.students.items():
        if student.model:
            with at(source, "students", name, "model"):
                starts[name] = _torch_model(student.model, beside, store)
    teacher = theirs = None
    if recipe.teacher is not None:
        with at(source, "teacher", "model"):
            teacher = _teacher(recipe.teacher, beside, store)
            if not teacher.endpoint:
                trust = recipe.teacher.trust_remote_code
                theirs = loading.load_tokenizer(teacher.path, trust)
                loading.check_fits(teacher.path, theirs, recipe.data.max_length, trust)
    tokenizer = _tokenizer(recipe, source, text, teacher, theirs, starts)
    nothing = no_blocks(recipe.data.max_length)
    inherited = {each.label: terms.inherited(store, each) for each in (teacher, *starts.values()) if each}
    setting = Setting(recipe, source, text, nothing, nothing, tokenizer, teacher, None, starts, inherited=inherited)
    return setting if recipe.generate else _laid_out(setting)


def written(setting: Setting) -> Setting:
    """With the text that the teacher is to write, where the recipe asks for it; students are checked before."""
    if setting.recipe.generate is None:
        return setting
    with at(setting.source, "generate"):
        text, facts = generate.written(setting)
    return _laid_out(setting._replace(corpus=text, generated=facts))


def _laid_out(setting: Setting) -> Setting:
    """With the blocks of its text."""
    text, data, tokenizer = setting.corpus, setting.recipe.data, setting.tokenizer
    say(
        f"  text: {text.train_documents} documents to train on ({text.train_bytes / 1e6:.1f} MB), "
        f"{text.heldout_documents} held out ({text.heldout_bytes / 1e6:.1f} MB)"
    )
    mixing = _mixing(setting)
    if mixing:
        say(f"  {', '.join(mixing)}: would see the documents beside one in a block, so each has a block of its own")
    alone = bool(mixing)
    with at(setting.source, "data"):
        train = make_blocks(corpus.read(text.train), tokenizer, data.max_length, data.max_tokens, alone=alone)
    with at(setting.source, "data", "heldout"):
        heldout = make_blocks(corpus.read(text.heldout), tokenizer, data.max_length, alone=alone)
    if left_out := train.left_out + heldout.left_out:
        say(f"  text: {left_out} documents are longer than {data.max_length} tokens and are left out")
    return setting._replace(train=train, heldout=heldout)


def _mixing(setting: Setting) -> list[str]:
    """The models that do not keep the documents of a block apart; each kind is probed once."""
    from transformers import AutoConfig

    recipe, configs = setting.recipe, {}
    for name, student in recipe.students.items():
        if name in setting.starts:
            configs[name] = loading.load_config(setting.starts[name].path)
        elif student.config:
            with suppress(ValueError, TypeError, KeyError):  # told when the student is made
                configs[name] = AutoConfig.for_model(**student.config)
    if setting.teacher and recipe.teacher and not recipe.teacher.is_endpoint:
        configs["teacher"] = setting.teacher_config()
    kinds = {type(config): config for config in configs.values()}
    trusted = bool(recipe.teacher and recipe.teacher.trust_remote_code)
    apart = {kind: keeps_apart(config, trusted) for kind, config in kinds.items()}
    return [name for name, config in configs.items() if not apart[type(config)]]


@contextmanager
def at(source: Source, *key: str) -> Iterator[None]:
    """An error within is told with the place in the recipe that it comes from."""
    try:
        yield
    except LimbeckError as error:
        error.message = f"{source.place(*key)}: {error.message}"
        raise


def _tokenizer(
    recipe: Recipe,
    source: Source,
    text: corpus.Corpus,
    teacher: Model | None,
    theirs: PreTrainedTokenizerBase | None,
    starts: dict[str, Model],
) -> PreTrainedTokenizerBase:
    """The students' tokenizer: the teacher's; where it need not be, a pretrained student's, or one of the text.

    Args:
        theirs: a local teacher's tokenizer.
    """
    own = loading.load_tokenizer(next(iter(starts.values())).path) if starts else None
    learns_words = any(objective.uses_teacher for objective in recipe.objectives.values())
    if own is not None and (recipe.crosses_tokenizers or (recipe.generate and not learns_words)):
        return own
    if recipe.crosses_tokenizers and recipe.tokenizer is not None:
        return train_tokenizer(corpus.read(text.train), recipe.tokenizer.vocab_size, recipe.data.max_length)
    if theirs is not None:
        return theirs
    if teacher is not None and teacher.has_tokenizer:
        assert recipe.teacher is not None
        return loading.load_tokenizer(teacher.path, recipe.teacher.trust_remote_code)
    if teacher is not None:
        with at(source, "teacher", "model"):
            raise BadInput(
                f"{teacher.label} is an endpoint and has no files",
                fix="give teacher.tokenizer, the model that it serves; or learn from its text alone, by [generate], "
                "with pretrained students and no divergence",
            )
    if recipe.tokenizer is not None:
        return train_tokenizer(corpus.read(text.train), recipe.tokenizer.vocab_size, recipe.data.max_length)
    if own is not None:
        return own
    raise BadInput(
        f"{source.path} has no [teacher], no [tokenizer] and no pretrained student",
        fix="add [tokenizer] with a vocab_size to train one on the text",
    )


def _teacher(teacher: Teacher, beside: Path, store: Store) -> Model:
    """The teacher that a recipe names. Raises Unreachable for an endpoint that does not answer."""
    if teacher.is_endpoint:
        return endpoint.find(teacher, beside, store)
    return _torch_model(teacher.model, beside, store)


def _torch_model(text: str, beside: Path, store: Store) -> Model:
    """The model that a recipe names: a folder beside it is meant before any other."""
    model = resolve(str(beside / text) if (beside / text).is_dir() else text, store)
    if model.engine == "endpoint":
        raise BadInput(f"{text} is an endpoint", fix="name it by its URL: http://HOST:PORT/v1#NAME")
    if model.engine != "torch":
        raise BadInput(f"{text} is an ONNX artifact", fix="name the torch model it came from")
    return model


def with_teacher(setting: Setting, store: Store) -> Setting:
    """With the teacher as a version of the recipe's own name, so that students and teacher stand in one list."""
    recipe, teacher = setting.recipe, setting.teacher
    if teacher is None:
        return setting
    version = teacher.version
    if version is None or version.name != recipe.name:
        version = terms.origin(store, teacher)
        version = store.register(
            recipe.name,
            teacher.path,
            kind="teacher",
            licence=setting.teacher_licence,
            parent=version.ref if version else None,
            recipe="teacher",
            engine=teacher.engine,
            precision="untold" if teacher.endpoint else "fp32",
            params=None if teacher.endpoint else parameters(teacher.path),
            code_version=code_version(),
        )
        say(f"  teacher: {version.ref}, digest {version.digest[:12]}")
    return setting._replace(teacher_version=version)


def parameters(folder: Path) -> int:
    """The parameters in a folder of safetensors, from their headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (no dict)
    return total


@functools.cache
def code_version() -> str:
    """Limbeck's version, and the commit it runs from where it runs from a clone."""
    root = Path(__file__).parents[3]
    version = f"limbeck {installed('limbeck')}"
    if not (root / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}+g{commit.stdout.strip()}" if commit.returncode == 0 else version
