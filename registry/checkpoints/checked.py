"""What the checks of a loaded checkpoint found, which reports can show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.rotary_check import NO_TABLE, check_rotary
from limbeck.registry.checkpoints.unread_keys import refuse_unread_keys
from limbeck.registry.checkpoints.weights import check_finite, check_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_LOADED = "not checked: not loaded"


@dataclass(frozen=True)
class CheckpointCheck:
    """What was compared with the files of a checkpoint when it was loaded, without transformers' own reading.

    Attributes:
        rotary: "equal to config.json", "no rotary table", or "not checked: " and the reason.
        weights: "all from its files, all finite", or "not checked: " and the reason.
        tokenizer: "equal to tokenizer.json", what was done to make it so, or "not checked: " and the reason.
        unread: keys of config.json that no code of the family reads and that change no numbers.
    """

    rotary: str = NOT_LOADED
    weights: str = NOT_LOADED
    tokenizer: str = NOT_LOADED
    unread: tuple[str, ...] = ()


_checks: dict[Path, CheckpointCheck] = {}


def checked_facts(folder: Path) -> CheckpointCheck:
    """What the checks found when this process last loaded the folder's model and tokenizer."""
    return _checks.get(folder.resolve(), CheckpointCheck())


def note_facts(folder: Path, **facts: Any) -> None:
    """Keep what a check of the folder found. `facts` are attributes of CheckpointCheck."""
    _checks[folder.resolve()] = replace(checked_facts(folder), **facts)


def check_model(model: PreTrainedModel, info: dict[str, Any], raw: dict[str, Any], name: str) -> dict[str, Any]:
    """Check a loaded model against its files.

    Args:
        info: the loading information of transformers' `from_pretrained`.
        raw: the content of config.json.
        name: what messages call the model.

    Returns the attributes of CheckpointCheck. Raises BadInput for what makes it another model than its files say.
    """
    check_loading(model, info, name)
    check_finite(model, name)
    text = raw.get("text_config")
    raw = text if isinstance(text, dict) else raw  # a model of several kinds of input has a part for text
    rotary = check_rotary(model, raw, f"{name}: its config.json")
    unread = refuse_unread_keys(raw, model, rotary != NO_TABLE, f"{name}: its config.json")
    return {"rotary": rotary, "weights": "all from its files, all finite", "unread": tuple(unread)}
