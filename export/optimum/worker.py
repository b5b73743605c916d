"""Export a checkpoint with optimum: a program of its own, which limbeck.export.optimum.engine runs over the overlay.

`python worker.py CHECKPOINT PROBE OUTPUT` writes OUTPUT/model.onnx. CHECKPOINT is a folder that transformers 4 reads.
PROBE is a .npz file with `ids` (T,) int64 and with `logprobs` (T, V) float32, which transformers 5 gave for them; the
export is refused if transformers 4 gives others. The last line on stderr is the reason if the exit code is not 0.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

TASK = "text-generation-with-past"
MAX_LOGPROB_DIFF = 1e-4  # nats


def main(checkpoint: str, probe: str, output: str) -> None:
    """Load, compare and export."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    difference = ""
    # torch's fused attention, the default, ignores what it does not support, such as Gemma 2's soft cap.
    for attention in (None, "eager"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention, **options).eval()
        difference = describe_difference(model, Path(probe))
        if not difference:
            export(model, Path(output))
            return
    raise ValueError(difference)


def describe_difference(model: Any, probe: Path) -> str:
    """Return both values where log-probabilities of `model` and of the probe differ most; "" if they agree."""
    import numpy as np
    import torch
    import transformers

    expected = np.load(probe)
    ids = torch.from_numpy(expected["ids"])[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    found = torch.log_softmax(logits.double(), dim=-1).numpy()
    # NaN on one side alone is a difference. On both sides it is the model's own, which whoever scores it reports.
    differences = np.nan_to_num(np.abs(found - expected["logprobs"]), nan=np.inf)
    differences[np.isnan(found) & np.isnan(expected["logprobs"])] = 0
    position, token = np.unravel_index(differences.argmax(), differences.shape)
    if differences[position, token] <= MAX_LOGPROB_DIFF:
        return ""
    return (
        f"transformers {transformers.__version__} reads it otherwise: at position {position} of a probe, token {token} "
        f"has log-probability {found[position, token]:.6f}, with transformers {expected['version']} "
        f"{expected['logprobs'][position, token]:.6f}"
    )


def export(model: Any, output: Path) -> None:
    """Write optimum's graph, without its validation: limbeck.export.artifact.parity checks more, on real text."""
    from optimum.exporters.onnx.convert import onnx_export_from_model

    mend_position_ids()
    mend_experts()
    model.config.use_cache = True
    onnx_export_from_model(model=model, output=output, task=TASK, do_validation=False, device="cpu")


def mend_position_ids() -> None:
    """Give the graphs of Gemma, GPT-OSS and Nemotron an input `position_ids`, as others have.

    optimum lets them count positions. Their rows could not join a batch that is padded on the left, since their keys
    are rotated by other positions.
    """
    from optimum.exporters.onnx.config import TextDecoderOnnxConfig
    from optimum.exporters.onnx.model_configs import GemmaOnnxConfig

    def inputs(config: Any) -> Any:
        return TextDecoderOnnxConfig.inputs.fget(config) | {"position_ids": {0: "batch_size", 1: "sequence_length"}}

    GemmaOnnxConfig.inputs = property(inputs)


def mend_experts() -> None:
    """Put all experts of DeepSeek-V3 into the graph, not only those that the tracer's example tokens chose."""
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    def moe(module: Any, hidden_states: Any, topk_indices: Any, topk_weights: Any) -> Any:
        chosen = torch.nn.functional.one_hot(topk_indices, num_classes=len(module.experts)).to(topk_weights.dtype)
        weights = (chosen * topk_weights.unsqueeze(-1)).sum(dim=1)  # (tokens, experts)
        return sum(expert(hidden_states) * weights[:, place, None] for place, expert in enumerate(module.experts))

    experts: Any = DeepseekV3MoE  # transformers 5, which types are checked with, has no such method
    experts.moe = moe


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        main(*sys.argv[1:])
    except Exception as error:  # transformers and the tracer raise exceptions of any type
        sys.exit("\n" + (str(error).strip().splitlines() or [type(error).__name__])[0])
