"""What the students of a recipe share: text, tokenizer, blocks, teacher; all checked before anything is trained."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.distill.context import EMPTY_CORPUS, Setting, code_version, count_parameters, errors_at
from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import empty_blocks, make_blocks, train_tokenizer
from limbeck.distill.data.packing import separates_documents
from limbeck.distill.models import licence, loading
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Recipe, Teacher
from limbeck.distill.teacher import endpoint, generate
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_setting(recipe: Recipe, source: Source, store: Store) -> Setting:
    """Text on disk, teacher found, tokenizer, blocks; nothing is registered. Raises BadInput with the recipe's line.

    Where the teacher is to write the text there is none yet, and no block: see `written`.
    """
    beside = source.path.resolve().parent
    text = EMPTY_CORPUS
    if recipe.generate is None:
        with errors_at(source, "data", "path"):
            text = corpus.prepare_corpus(recipe.data, beside, recipe.name)
    starts = {}
    for name, student in recipe.students.items():
        if student.model:
            with errors_at(source, "students", name, "model"):
                starts[name] = _torch_model(student.model, beside, store)
    teacher = theirs = None
    if recipe.teacher is not None:
        with errors_at(source, "teacher", "model"):
            teacher = _teacher(recipe.teacher, beside, store)
            if not teacher.endpoint:
                trust = recipe.teacher.trust_remote_code
                theirs = loading.load_tokenizer(teacher.path, trust)
                loading.check_fits(teacher.path, theirs, recipe.data.max_length, trust)
    tokenizer = _tokenizer(recipe, source, text, teacher, theirs, starts)
    nothing = empty_blocks(recipe.data.max_length)
    inherited = {each.label: licence.inherited_terms(store, each) for each in (teacher, *starts.values()) if each}
    setting = Setting(
        recipe, source, text, nothing, nothing, tokenizer, teacher, None, starts, inherited_terms=inherited
    )
    return setting if recipe.generate else _with_blocks(setting)


def with_generated_text(setting: Setting) -> Setting:
    """With the text that the teacher is to write, where the recipe asks for it; students are checked before."""
    if setting.recipe.generate is None:
        return setting
    with errors_at(setting.source, "generate"):
        text, facts = generate.generate_text(setting)
    return _with_blocks(setting._replace(corpus=text, generated=facts))


def _with_blocks(setting: Setting) -> Setting:
    """With the blocks of its text."""
    text, data, tokenizer = setting.corpus, setting.recipe.data, setting.tokenizer
    print_status(
        f"  text: {text.train_documents} documents to train on ({text.train_bytes / 1e6:.1f} MB), "
        f"{text.heldout_documents} held out ({text.heldout_bytes / 1e6:.1f} MB)"
    )
    mixing = _models_mixing_documents(setting)
    if mixing:
        print_status(
            f"  {', '.join(mixing)}: would see the documents beside one in a block, so each has a block of its own"
        )
    alone = bool(mixing)
    with errors_at(setting.source, "data"):
        train = make_blocks(
            corpus.read_corpus(text.train), tokenizer, data.max_length, data.max_tokens, one_document_per_block=alone
        )
    with errors_at(setting.source, "data", "heldout"):
        heldout = make_blocks(
            corpus.read_corpus(text.heldout), tokenizer, data.max_length, one_document_per_block=alone
        )
    if left_out := train.too_long + heldout.too_long:
        print_status(f"  text: {left_out} documents are longer than {data.max_length} tokens and are left out")
    return setting._replace(train=train, heldout=heldout)


def _models_mixing_documents(setting: Setting) -> list[str]:
    """The models that do not keep the documents of a block apart; each kind is probed once."""
    from transformers import AutoConfig

    recipe, configs = setting.recipe, {}
    for name, student in recipe.students.items():
        if name in setting.base_models:
            configs[name] = loading.load_config(setting.base_models[name].path)
        elif student.config:
            with suppress(ValueError, TypeError, KeyError):  # told when the student is made
                configs[name] = AutoConfig.for_model(**student.config)
    if setting.teacher and recipe.teacher and not recipe.teacher.is_endpoint:
        configs["teacher"] = setting.teacher_config()
    kinds = {type(config): config for config in configs.values()}
    trusted = bool(recipe.teacher and recipe.teacher.trust_remote_code)
    apart = {kind: separates_documents(config, trusted) for kind, config in kinds.items()}
    return [name for name, config in configs.items() if not apart[type(config)]]


def _tokenizer(
    recipe: Recipe,
    source: Source,
    text: corpus.Corpus,
    teacher: ResolvedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    starts: dict[str, ResolvedModel],
) -> PreTrainedTokenizerBase:
    """The students' tokenizer: the teacher's; where it need not be, a pretrained student's, or one of the text.

    Args:
        teacher_tokenizer: a local teacher's tokenizer.
    """
    own = loading.load_tokenizer(next(iter(starts.values())).path) if starts else None
    learns_words = any(objective.uses_teacher for objective in recipe.objectives.values())
    if own is not None and (recipe.crosses_tokenizers or (recipe.generate and not learns_words)):
        return own
    if recipe.crosses_tokenizers and recipe.tokenizer is not None:
        return train_tokenizer(corpus.read_corpus(text.train), recipe.tokenizer.vocab_size, recipe.data.max_length)
    if teacher_tokenizer is not None:
        return teacher_tokenizer
    if teacher is not None and teacher.has_tokenizer:
        assert recipe.teacher is not None
        return loading.load_tokenizer(teacher.path, recipe.teacher.trust_remote_code)
    if teacher is not None:
        with errors_at(source, "teacher", "model"):
            raise BadInput(
                f"{teacher.label} is an endpoint and has no files",
                fix="give teacher.tokenizer, the model that it serves; or learn from its text alone, by [generate], "
                "with pretrained students and no divergence",
            )
    if recipe.tokenizer is not None:
        return train_tokenizer(corpus.read_corpus(text.train), recipe.tokenizer.vocab_size, recipe.data.max_length)
    if own is not None:
        return own
    raise BadInput(
        f"{source.path} has no [teacher], no [tokenizer] and no pretrained student",
        fix="add [tokenizer] with a vocab_size to train one on the text",
    )


def _teacher(teacher: Teacher, recipe_folder: Path, store: Store) -> ResolvedModel:
    """The teacher that a recipe names. Raises Unreachable for an endpoint that does not answer."""
    if teacher.is_endpoint:
        return endpoint.find(teacher, recipe_folder, store)
    return _torch_model(teacher.model, recipe_folder, store)


def _torch_model(text: str, recipe_folder: Path, store: Store) -> ResolvedModel:
    """The model that a recipe names: a folder beside it is meant before any other."""
    model = resolve_model(str(recipe_folder / text) if (recipe_folder / text).is_dir() else text, store)
    if model.engine == "endpoint":
        raise BadInput(f"{text} is an endpoint", fix="name it by its URL: http://HOST:PORT/v1#NAME")
    if model.engine != "torch":
        raise BadInput(f"{text} is an ONNX artifact", fix="name the torch model it came from")
    return model


def with_registered_teacher(setting: Setting, store: Store) -> Setting:
    """With the teacher as a version of the recipe's own name, so that students and teacher stand in one list."""
    recipe, teacher = setting.recipe, setting.teacher
    if teacher is None:
        return setting
    version = teacher.version
    if version is None or version.name != recipe.name:
        version = licence.version_of_model(store, teacher)
        version = store.register(
            NewVersion(
                name=recipe.name,
                kind="teacher",
                licence=setting.teacher_licence,
                parent=version.ref if version else None,
                recipe="teacher",
                engine=teacher.engine,
                precision="untold" if teacher.endpoint else "fp32",
                params=None if teacher.endpoint else count_parameters(teacher.path),
                code_version=code_version(),
            ),
            teacher.path,
        )
        print_status(f"  teacher: {version.ref}, digest {version.digest[:12]}")
    return setting._replace(teacher_version=version)
