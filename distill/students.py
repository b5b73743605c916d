"""Where a student begins: a config, a pretrained model, or the teacher that it is carved from."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from distill import models
from distill.recipe import Plan
from distill.setting import Setting, at
from registry.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check(setting: Setting, plan: Plan) -> None:
    """Raises BadInput, with the recipe's place, for a student that cannot be made; before the teacher runs."""
    name, max_length = plan.student, setting.recipe.data.max_length
    if name in setting.starts:
        with at(setting.source, "students", name, "model"):
            models.check_tokenizer(setting.starts[name].path, setting.tokenizer)
            models.check_fits(setting.starts[name].path, setting.tokenizer, max_length)
        return
    config = setting.recipe.students[name].config
    for key in config:
        with at(setting.source, "students", name, "config", key):
            check_setting(config["model_type"], key)
    with at(setting.source, "students", name, "config"):
        fresh(config, setting.tokenizer, max_length, plan.seed)


def make(setting: Setting, plan: Plan) -> PreTrainedModel:
    """The student as it is before its training, in float32."""
    if plan.student in setting.starts:
        return models.load_model(setting.starts[plan.student].path)
    config = setting.recipe.students[plan.student].config
    return fresh(config, setting.tokenizer, setting.recipe.data.max_length, plan.seed)


def check_setting(model_type: str, key: str) -> None:
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


def fresh(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> PreTrainedModel:
    """A student from its config; vocabulary, positions and special tokens are filled in where not given.

    Raises BadInput where the config makes no causal model that takes a block of `max_length` tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(config)
    model_type = given.pop("model_type")
    end = tokenizer.eos_token_id
    settings = {
        "vocab_size": models.vocabulary(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    }
    # GPT-2's name for max_position_embeddings is n_positions; both at once, and ours would win.
    other_name = AutoConfig.for_model(model_type).attribute_map
    settings = {key: value for key, value in settings.items() if other_name.get(key) not in given}
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | given)))
        with torch.inference_mode():
            model.eval()(input_ids=torch.full((1, max_length), models.vocabulary(tokenizer) - 1))
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"this does not make a model: {error}") from error
    return model
