"""Run optimum in a subprocess over the overlay, and take the graph that it makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.export.optimum.checkpoint import write_checkpoint
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.overlay import install_overlay, last_line, overlay_environment, overlay_versions

WORKER = Path(__file__).with_name("worker.py")
PROBE_TOKENS = 64


def write_optimum_graph(torch_model: Any, folder: Path, label: str, report: Callable[[str], None]) -> None:
    """Write the graph that optimum makes of `torch_model` to `folder`: `model.onnx`, and `model.onnx_data` if large.

    Installs the overlay if it is missing.

    Args:
        torch_model: a causal language model of transformers, in float32, in evaluation mode, with eager attention.
        label: what messages call the model.
        report: called with a line of progress.

    Raises BadInput if the overlay cannot be installed, if transformers 4 reads the model otherwise, or if optimum
    cannot export it.
    """
    overlay = install_overlay(report)
    with TemporaryDirectory(dir=folder, prefix="optimum-") as temporary:
        checkpoint, probe, output = (Path(temporary) / name for name in ("checkpoint", "probe.npz", "output"))
        write_checkpoint(torch_model, checkpoint)
        _write_probe(torch_model, probe)
        command = [sys.executable, *map(str, (WORKER, checkpoint, probe, output))]
        # Ctrl-C ends the subprocess: `run` kills it when anything is raised here.
        done = subprocess.run(
            command, env=overlay_environment(overlay), capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise _failure(torch_model.config.model_type, label, done)
        for path in output.glob(f"{GRAPH}*"):
            path.rename(folder / path.name)


def _write_probe(torch_model: Any, file: Path) -> None:
    """Write the log-probabilities of `torch_model` for random tokens."""
    import numpy as np
    import torch
    import transformers

    config = torch_model.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = torch_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    np.savez(file, ids=ids[0].numpy(), logprobs=logprobs.numpy(), version=transformers.__version__)


def _failure(model_type: str, label: str, done: subprocess.CompletedProcess[str]) -> BadInput:
    if done.returncode < 0:
        reason = f"its process was ended by signal {-done.returncode}"
        fix = "if the machine ran out of memory, export on one that has more"
    else:
        reason = last_line(done.stderr)
        fix = f"optimum-onnx {overlay_versions()['optimum-onnx']} may export another model of the family"
    return BadInput(f"{label}: optimum cannot export this {model_type} model: {reason}", fix=fix)
