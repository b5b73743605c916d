"""Makes a student's initial model: from a config, a pretrained model or the pruned teacher; and its LoRA adapter."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from limbeck.distill.context import Setting, errors_at
from limbeck.distill.models import loading, vocabularies
from limbeck.distill.models.pruning import prune
from limbeck.distill.models.pruning_shapes import pruned_shape, student_config
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Lora
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers and torch raise for a config whose numbers do not fit together.
CONFIG_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AssertionError,
    IndexError,
    ZeroDivisionError,
    StrictDataclassError,
)


def check(setting: Setting, plan: Plan) -> None:
    """Raise BadInput, with the place in the recipe, if a student cannot be made; called before the teacher runs."""
    name, max_length = plan.student, setting.recipe.data.max_length
    spec = setting.recipe.students[name]
    if name in setting.base_models:
        with errors_at(setting.source, "students", name, "model"):
            vocabularies.check_same_tokens(setting.base_models[name].path, setting.tokenizer)
            loading.check_fits(setting.base_models[name].path, setting.tokenizer, max_length)
    elif spec.prune:
        with errors_at(setting.source, "students", name, "prune"):
            meta_model(setting, name)
    else:
        for key in spec.config:
            with errors_at(setting.source, "students", name, "config", key):
                check_config_key(spec.config["model_type"], key)
        with errors_at(setting.source, "students", name, "config"):
            fresh_model(spec.config, setting.tokenizer, max_length, plan.seed)
    if spec.lora:
        with errors_at(setting.source, "students", name, "lora"):
            if spec.config:
                raise BadInput("an adapter needs a trained model, and this student begins from a config")
            add_lora(meta_model(setting, name), spec.lora, plan.seed)


def initialise_student(setting: Setting, plan: Plan) -> PreTrainedModel:
    """Make the untrained student in float32, with its adapter if the recipe has one."""
    spec = setting.recipe.students[plan.student]
    if plan.student in setting.base_models:
        model = load_model(setting.base_models[plan.student].path)
    elif spec.prune:
        model = prune(setting.teacher_model(), spec.prune, setting.train)
    else:
        model = fresh_model(spec.config, setting.tokenizer, setting.recipe.data.max_length, plan.seed)
    _fix_generation_config(model, setting.tokenizer.eos_token_id)
    return add_lora(model, spec.lora, plan.seed) if spec.lora else model


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Merge a trained student's adapter, if it has one, into its weights, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(path, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def count_student_parameters(setting: Setting, name: str) -> int:
    """The number of parameters of the student `name`, without loading weights; tied weights count once."""
    return int(meta_model(setting, name).num_parameters())


def compare_with_teacher(setting: Setting, name: str) -> vocabularies.Vocabularies | None:
    """Compare the vocabularies of the teacher and the student `name`; None if the teacher's tokenizer is unknown."""
    if setting.teacher is None or not setting.teacher.has_tokenizer:
        return None
    teacher_tokenizer = setting.teacher_tokenizer()
    teacher_rows = loading.vocabulary_size(teacher_tokenizer)
    if not setting.teacher.endpoint:
        teacher_rows = setting.teacher_config().get_text_config().vocab_size
    tokenizer = setting.tokenizer
    if name in setting.base_models:
        tokenizer = load_tokenizer(setting.base_models[name].path)
    student_rows = _config(setting, name).get_text_config().vocab_size
    return vocabularies.compare(teacher_tokenizer, teacher_rows, tokenizer, student_rows)


def meta_model(setting: Setting, name: str) -> PreTrainedModel:
    """The student `name` on torch's meta device, without weights. Raises BadInput if it cannot be made."""
    import torch
    from transformers import AutoModelForCausalLM

    with _config_errors(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(setting, name))


def _config(setting: Setting, name: str) -> PretrainedConfig:
    spec = setting.recipe.students[name]
    if name in setting.base_models:
        return load_config(setting.base_models[name].path)
    if spec.prune:
        config = setting.teacher_config()
        return student_config(config, pruned_shape(config, spec.prune))
    return fresh_config(spec.config, setting.tokenizer, setting.recipe.data.max_length)


def _fix_generation_config(model: PreTrainedModel, end_id: int) -> None:
    """Make the generation config valid, so that it can be saved, and let it stop at `end_id`, which ends texts."""
    config = model.generation_config
    assert config is not None
    try:
        config.validate(strict=True)
    except ValueError:  # some hub models have a temperature without do_sample, which cannot be saved
        config.do_sample = True
    eos = config.eos_token_id
    if eos is None:
        config.eos_token_id = end_id
    elif end_id not in (end_ids := eos if isinstance(eos, list) else [eos]):
        config.eos_token_id = [*end_ids, end_id]


def add_lora(model: PreTrainedModel, spec: Lora, seed: int) -> PreTrainedModel:
    """Freeze `model` and add low-rank adapters to it, in place (LoRA, arXiv 2106.09685).

    The class of the model and the paths of its modules do not change.
    Raises BadInput if the model has no such target modules.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    settings = spec.model_dump()
    settings["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    if not isinstance(spec.target_modules, str):
        settings["target_modules"] = list(spec.target_modules)
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", **settings), model)
    except ValueError as error:
        linear = {path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "weight")}
        raise BadInput(
            f"target_modules = {spec.target_modules!r}: {str(error).split('. ')[0]}",
            fix=f'use "all-linear", or some of: {", ".join(sorted(linear))}',
        ) from error
    return model


def check_config_key(model_type: str, key: str) -> None:
    """Raise BadInput for a config key that the architecture does not have, or for an unknown architecture."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        raise BadInput(
            f"{model_type!r} is not an architecture that transformers knows",
            fix=f"did you mean {near[0]}?" if near else "use llama, qwen2, gpt2, gpt_neox or another causal model",
        )
    default = AutoConfig.for_model(model_type)
    known = default.to_dict().keys() | default.attribute_map.keys()
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise BadInput(f"{model_type} has no setting {key!r}", fix=f"did you mean {near[0]}?" if near else None)


def fresh_model(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> PreTrainedModel:
    """A student with random weights. Raises BadInput if the config is not of a causal model that takes a block."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with _config_errors():
        model = AutoModelForCausalLM.from_config(fresh_config(config, tokenizer, max_length))
        with torch.inference_mode():
            model.eval()(input_ids=torch.full((1, max_length), loading.vocabulary_size(tokenizer) - 1))
    return model


def fresh_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> PretrainedConfig:
    """A student's config, with the vocabulary size, positions and special tokens that `config` does not have."""
    from transformers import AutoConfig

    config = dict(config)
    model_type = config.pop("model_type")
    end = tokenizer.eos_token_id
    settings = {
        "vocab_size": loading.vocabulary_size(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    }
    # GPT-2 calls max_position_embeddings n_positions: with both, our default would override the recipe's value.
    aliases = AutoConfig.for_model(model_type).attribute_map
    settings = {key: value for key, value in settings.items() if aliases.get(key) not in config}
    return AutoConfig.for_model(model_type, **(settings | config))


@contextmanager
def _config_errors() -> Iterator[None]:
    try:
        yield
    except CONFIG_ERRORS as error:
        raise BadInput(f"no model can be made from this: {error}") from error
