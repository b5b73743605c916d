"""Where a student begins: a config, a pretrained model, or the teacher that it is carved from; and its adapter."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from limbeck.distill.context import Setting, errors_at
from limbeck.distill.models import loading, vocabularies
from limbeck.distill.models.pruning import prune, pruned_shape, student_config
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Lora
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers and torch raise at a config whose numbers do not fit together.
CONFIG_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, IndexError, ZeroDivisionError)


def check(setting: Setting, plan: Plan) -> None:
    """Raises BadInput, with the recipe's place, for a student that cannot be made; before the teacher runs."""
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
                raise BadInput("an adapter changes a model that is trained, and this one begins from a config")
            add_lora(meta_model(setting, name), spec.lora, plan.seed)


def initialise_student(setting: Setting, plan: Plan) -> PreTrainedModel:
    """The student as it is before its training, in float32; with its adapter where the recipe asks for one."""
    spec = setting.recipe.students[plan.student]
    if plan.student in setting.base_models:
        model = loading.load_model(setting.base_models[plan.student].path)
    elif spec.prune:
        model = prune(setting.teacher_model(), spec.prune, setting.train)
    else:
        model = fresh_model(spec.config, setting.tokenizer, setting.recipe.data.max_length, plan.seed)
    _mend_generation(model, setting.tokenizer.eos_token_id)
    return add_lora(model, spec.lora, plan.seed) if spec.lora else model


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A trained student as a plain model: its adapter, where it has one, is merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(path, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def count_student_parameters(setting: Setting, name: str) -> int:
    """How many parameters the student `name` has, without its weights being loaded; tied ones count once."""
    return int(meta_model(setting, name).num_parameters())


def compare_with_teacher(setting: Setting, name: str) -> vocabularies.Vocabularies | None:
    """The teacher's vocabulary and that of the student `name`; None where no tokenizer of the teacher is known."""
    if setting.teacher is None or not setting.teacher.has_tokenizer:
        return None
    theirs = setting.teacher_tokenizer()
    rows = loading.vocabulary_size(theirs)
    if not setting.teacher.endpoint:
        rows = setting.teacher_config().get_text_config().vocab_size
    own = loading.load_tokenizer(setting.base_models[name].path) if name in setting.base_models else setting.tokenizer
    return vocabularies.compare(theirs, rows, own, _config(setting, name).get_text_config().vocab_size)


def meta_model(setting: Setting, name: str) -> PreTrainedModel:
    """The student `name` without weights, on torch's meta device. Raises BadInput where it cannot be made."""
    import torch
    from transformers import AutoModelForCausalLM

    with _config_errors(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(setting, name))


def _config(setting: Setting, name: str) -> PretrainedConfig:
    spec = setting.recipe.students[name]
    if name in setting.base_models:
        return loading.load_config(setting.base_models[name].path)
    if spec.prune:
        config = setting.teacher_config()
        return student_config(config, pruned_shape(config, spec.prune))
    return fresh_config(spec.config, setting.tokenizer, setting.recipe.data.max_length)


def _mend_generation(model: PreTrainedModel, end: int) -> None:
    """Settings for generation that can be saved, and that stop at the token which ends a training text."""
    config = model.generation_config
    assert config is not None
    try:
        config.validate(strict=True)
    except ValueError:  # a temperature without do_sample, as some hub models have it, is not saved again
        config.do_sample = True
    known = config.eos_token_id
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if end not in ends:
        config.eos_token_id = [*ends, end] if ends else end


def add_lora(model: PreTrainedModel, spec: Lora, seed: int) -> PreTrainedModel:
    """Low-rank adapters beside the weights of `model`, which are frozen (LoRA, arXiv 2106.09685).

    They are put into the model itself, whose class and parts stay what they were.
    Raises BadInput where the model has no such modules.
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
            fix=f'give "all-linear", or some of: {", ".join(sorted(linear))}',
        ) from error
    return model


def check_config_key(model_type: str, key: str) -> None:
    """Raises BadInput for a config key that the architecture does not have, or an unknown architecture."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        raise BadInput(
            f"{model_type!r} is no architecture that transformers knows",
            fix=f"did you mean {near[0]}?" if near else "use llama, qwen2, gpt2, gpt_neox or another causal one",
        )
    default = AutoConfig.for_model(model_type)
    known = default.to_dict().keys() | default.attribute_map.keys()
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise BadInput(f"{model_type} has no setting {key!r}", fix=f"did you mean {near[0]}?" if near else None)


def fresh_model(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> PreTrainedModel:
    """A student from its config. Raises BadInput where that makes no causal model that takes a whole block."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with _config_errors():
        model = AutoModelForCausalLM.from_config(fresh_config(config, tokenizer, max_length))
        with torch.inference_mode():
            model.eval()(input_ids=torch.full((1, max_length), loading.vocabulary_size(tokenizer) - 1))
    return model


def fresh_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> PretrainedConfig:
    """A student's config; vocabulary, positions and special tokens are filled in where not given."""
    from transformers import AutoConfig

    given = dict(config)
    model_type = given.pop("model_type")
    end = tokenizer.eos_token_id
    settings = {
        "vocab_size": loading.vocabulary_size(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    }
    # GPT-2's name for max_position_embeddings is n_positions; both at once, and ours would win.
    other_name = AutoConfig.for_model(model_type).attribute_map
    settings = {key: value for key, value in settings.items() if other_name.get(key) not in given}
    return AutoConfig.for_model(model_type, **(settings | given))


@contextmanager
def _config_errors() -> Iterator[None]:
    try:
        yield
    except CONFIG_ERRORS as error:
        raise BadInput(f"this does not make a model: {error}") from error
