"""Checks that a model's weights are those of its files: none missing, left over, contradicting or not a number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Tensors that older versions saved and that are computed now, and heads beside the language model's.
LEFT_OVER = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|embed_positions)$"  # computed
    r"|(^|\.)(attn|attention)\.(attention\.)?bias$"  # causal masks of GPT-2, GPT-J, GPT-Neo and GPT-NeoX
    r"|^(v_head|value_head|score|classifier|mtp)\."  # of reward models, classifiers and multi-token prediction
)
LONGEST_LIST = 5


def check_loading(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Refuse a model whose weights are not all from its files, or whose files hold weights that it has no place for.

    Args:
        info: the loading information of transformers' `from_pretrained`.
        name: what messages call the model.

    Raises BadInput with the names of the tensors.
    """
    if info["mismatched_keys"]:
        shapes = [f"{key} is {[*found]}, not {[*made]}" for key, found, made in sorted(info["mismatched_keys"])]
        raise BadInput(
            f"{name}: weights have other shapes than config.json says: {_listed(shapes)}",
            fix="give the config.json that belongs to the weights",
        )
    if info["missing_keys"]:
        raise BadInput(
            f"{name} lacks weights that its config.json asks for: {_listed(sorted(info['missing_keys']))}",
            fix="give all files of the checkpoint, and the config.json that belongs to them",
        )
    unexpected = sorted(key for key in info["unexpected_keys"] if not LEFT_OVER.search(key))
    if unexpected:
        raise BadInput(
            f"{name} has weights that {type(model).__name__} with its config.json does not use: {_listed(unexpected)}",
            fix="give the config.json that belongs to the weights",
        )
    _check_tied(model, name)


def _check_tied(model: PreTrainedModel, name: str) -> None:
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = sorted(set(tied) - set(model.all_tied_weights_keys))
    if untied:
        raise BadInput(
            f"{name}: tie_word_embeddings is true in its config.json, but its files hold different values for "
            f"{untied[0]} and {tied[untied[0]]}",
            fix="set tie_word_embeddings to false if both were trained, or delete the tensor that was not",
        )


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that has NaN or infinite weights. Raises BadInput with each tensor's name and count."""
    found = [text for tensor_name, tensor in _tensors(model) if (text := _describe_not_finite(tensor_name, tensor))]
    if found:
        raise BadInput(
            f"{name}: {_listed(found)}",
            fix="the checkpoint is damaged, or its training diverged: give an earlier one",
        )


def _tensors(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    """What files hold: the parameters and the saved buffers."""
    saved = model.state_dict()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _describe_not_finite(name: str, tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.sum().isfinite():
        return None
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())  # a sum of finite numbers may overflow
    counts = ((nan, "NaN"), (infinite, "infinite"))
    found = [f"{count} {kind} value{'s' if count > 1 else ''}" for count, kind in counts if count]
    return f"{name} has {' and '.join(found)}" if found else None


def _listed(items: list[str]) -> str:
    more = len(items) - LONGEST_LIST
    return ", ".join(items[:LONGEST_LIST]) + (f" and {more} more" if more > 0 else "")
