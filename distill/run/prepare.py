"""Prepares what the students of a recipe share: text, tokenizer, blocks and teacher, checked before any training."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.distill.context import EMPTY_CORPUS, Setting, code_version, count_parameters, errors_at
from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import empty_blocks, make_blocks, train_tokenizer
from limbeck.distill.data.packing import separates_documents
from limbeck.distill.models import loading
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Recipe, Teacher
from limbeck.distill.teacher import endpoint, generate
from limbeck.registry.catalog import model_licence
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.checkpoints.load import load_config, load_tokenizer
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_setting(recipe: Recipe, source: Source, store: Store) -> Setting:
    """Write the text, resolve the models, and make the tokenizer and the blocks; registers nothing.

    If the teacher writes the text, the setting has no text and no blocks yet: see `with_generated_text`.
    Raises BadInput, or Unreachable for an endpoint, with the line of the recipe.
    """
    recipe_folder = source.path.resolve().parent
    text = EMPTY_CORPUS
    if recipe.generate is None:
        with errors_at(source, "data", "path"):
            text = corpus.prepare_corpus(recipe.data, recipe_folder, recipe.name)
    base_models = {}
    for name, student in recipe.students.items():
        if student.model:
            with errors_at(source, "students", name, "model"):
                base_models[name] = _torch_model(student.model, recipe_folder, store)
    teacher = teacher_tokenizer = None
    if recipe.teacher is not None:
        with errors_at(source, "teacher", "model"):
            teacher = _teacher(recipe.teacher, recipe_folder, store)
            if not teacher.endpoint:
                trust = recipe.teacher.trust_remote_code
                teacher_tokenizer = load_tokenizer(teacher.path, trust)
                loading.check_fits(teacher.path, teacher_tokenizer, recipe.data.max_length, trust)
    tokenizer = _tokenizer(recipe, source, text, teacher, teacher_tokenizer, base_models)
    no_blocks = empty_blocks(recipe.data.max_length)
    models = [model for model in (teacher, *base_models.values()) if model]
    inherited_terms = {model.label: model_licence.inherited_terms(store, model) for model in models}
    setting = Setting(
        recipe,
        source,
        text,
        no_blocks,
        no_blocks,
        tokenizer,
        teacher,
        None,
        base_models,
        inherited_terms=inherited_terms,
    )
    return setting if recipe.generate else _with_blocks(setting)


def with_generated_text(setting: Setting) -> Setting:
    """The setting with the text that the teacher writes, if the recipe has [generate]; else unchanged."""
    if setting.recipe.generate is None:
        return setting
    with errors_at(setting.source, "generate"):
        text, facts = generate.generate_text(setting)
    return _with_blocks(setting._replace(corpus=text, generated=facts))


def _with_blocks(setting: Setting) -> Setting:
    """The setting with the blocks of its text."""
    text, data, tokenizer = setting.corpus, setting.recipe.data, setting.tokenizer
    print_status(
        f"  text: {text.train_documents} training documents ({text.train_bytes / 1e6:.1f} MB), "
        f"{text.heldout_documents} held out ({text.heldout_bytes / 1e6:.1f} MB)"
    )
    mixing = _models_mixing_documents(setting)
    if mixing:
        print_status(
            f"  {', '.join(mixing)}: cannot keep the documents of a block apart, so each document has its own block"
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
    """The names of the models that do not keep the documents of a block apart; each config class is probed once."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    recipe, configs = setting.recipe, {}
    for name, student in recipe.students.items():
        if name in setting.base_models:
            configs[name] = load_config(setting.base_models[name].path)
        elif student.config:
            with suppress(ValueError, TypeError, KeyError, StrictDataclassError):  # the check of the student reports it
                configs[name] = AutoConfig.for_model(**student.config)
    if setting.teacher and recipe.teacher and not recipe.teacher.is_endpoint:
        configs["teacher"] = setting.teacher_config()
    by_class = {type(config): config for config in configs.values()}
    trusted = bool(recipe.teacher and recipe.teacher.trust_remote_code)
    separates = {config_class: separates_documents(config, trusted) for config_class, config in by_class.items()}
    return [name for name, config in configs.items() if not separates[type(config)]]


def _tokenizer(
    recipe: Recipe,
    source: Source,
    text: corpus.Corpus,
    teacher: ResolvedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    base_models: dict[str, ResolvedModel],
) -> PreTrainedTokenizerBase:
    """The students' tokenizer: the teacher's or, if they may have another, a base model's or one of the text.

    Args:
        teacher_tokenizer: of a local teacher.
        base_models: of pretrained students, by name.
    """
    own = load_tokenizer(next(iter(base_models.values())).path) if base_models else None
    uses_distribution = any(objective.uses_teacher for objective in recipe.objectives.values())
    if own is not None and (recipe.crosses_tokenizers or (recipe.generate and not uses_distribution)):
        return own
    if recipe.crosses_tokenizers and recipe.tokenizer is not None:
        return train_tokenizer(corpus.read_corpus(text.train), recipe.tokenizer.vocab_size, recipe.data.max_length)
    if teacher_tokenizer is not None:
        return teacher_tokenizer
    if teacher is not None and teacher.has_tokenizer:
        assert recipe.teacher is not None
        return load_tokenizer(teacher.path, recipe.teacher.trust_remote_code)
    if teacher is not None:
        with errors_at(source, "teacher", "model"):
            raise BadInput(
                f"{teacher.label} is an endpoint and has no files",
                fix="set teacher.tokenizer to the model that it serves; or learn from its text alone ([generate]), "
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
    """Resolve the recipe's teacher. Raises Unreachable for an endpoint that does not answer."""
    if teacher.is_endpoint:
        return endpoint.resolve_endpoint(teacher, recipe_folder, store)
    return _torch_model(teacher.model, recipe_folder, store)


def _torch_model(text: str, recipe_folder: Path, store: Store) -> ResolvedModel:
    """Resolve a torch model that a recipe names; a folder or file beside the recipe goes first."""
    model = resolve_model(str(recipe_folder / text) if (recipe_folder / text).exists() else text, store)
    if model.engine == "endpoint":
        raise BadInput(f"{text} is an endpoint", fix="name it by its URL: http://HOST:PORT/v1#NAME")
    if model.engine != "torch":
        raise BadInput(f"{text} is an ONNX artifact", fix="name the torch model that it was exported from")
    return model


def with_registered_teacher(setting: Setting, store: Store) -> Setting:
    """The setting with the teacher's version, registered under the recipe's name, as the students are."""
    recipe, teacher = setting.recipe, setting.teacher
    if teacher is None:
        return setting
    version = teacher.version
    if version is None or version.name != recipe.name:
        version = model_licence.version_of_model(store, teacher)
        version = store.register(
            NewVersion(
                name=recipe.name,
                kind="teacher",
                licence=setting.teacher_licence,
                parent=version.ref if version else None,
                recipe="teacher",
                engine=teacher.engine,
                precision="unknown" if teacher.endpoint else "fp32",
                params=None if teacher.endpoint else count_parameters(teacher.path),
                code_version=code_version(),
            ),
            teacher.path,
        )
        print_status(f"  teacher: {version.ref}, digest {version.digest[:12]}")
    return setting._replace(teacher_version=version)
