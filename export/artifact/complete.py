"""One completion with its speed: an ONNX artifact in the torch-free runtime, a checkpoint in transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import physical_cores


@dataclass(frozen=True)
class TimedCompletion:
    """A completion of one prompt, and how fast it was made after a short run to warm up."""

    text: str
    finish_reason: str  # "stop" or "length"
    digest: str
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read a second."""
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens generated a second after the first; None where there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


def complete_onnx(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    *,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    digest: str | None = None,
) -> TimedCompletion:
    """Complete `prompt` with an ONNX artifact, its files checked (against `digest` too, where given).

    Raises BadInput: no artifact, or a prompt that fills the context. DamagedArtifact: other files.
    """
    start = time.perf_counter()
    runtime = Runtime.load(folder, threads=threads, device=device, expected_digest=digest)
    loaded = time.perf_counter()
    ids = runtime.prompt_ids(prompt)
    runtime.generate([ids[:1]], max_new_tokens=2, ignore_eos=True)
    result = runtime.generate([ids], **vars(sampling))[0]
    return TimedCompletion(
        text=result.text,
        finish_reason=result.finish_reason,
        digest=runtime.digest,
        prompt_tokens=result.prompt_tokens,
        new_tokens=len(result.token_ids),
        load_s=loaded - start,
        prefill_s=result.prefill_s,
        decode_s=result.decode_s,
    )


def complete_torch(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    *,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    digest: str | None = None,
) -> TimedCompletion:
    """Complete `prompt` with a transformers checkpoint; `digest` is that of its files where they were checked.

    Raises BadInput: a checkpoint that cannot be loaded, or a prompt that fills the context.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("torch found no CUDA device", fix="use --device cpu")
    torch.set_num_threads(threads or physical_cores())  # as the runtime, so that their speeds compare
    start = time.perf_counter()
    tokenizer, model = _load(folder)
    model.to(device)
    loaded = time.perf_counter()
    eos = model.generation_config.eos_token_id
    ids = tokenizer(prompt, return_tensors="pt").input_ids.long()
    if not ids.numel():
        ids = torch.tensor([[tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]])
    length = getattr(model.config.get_text_config(), "max_position_embeddings", 2**31)
    if ids.shape[1] >= length:
        message = f"the prompt has {ids.shape[1]} tokens and wants room for 1 more; the context is {length}"
        raise BadInput(message, fix="shorten the prompt")
    _set_sampling(model, sampling)
    clock, ids = _TokenTimer(), ids.to(device)
    with torch.inference_mode():
        one = torch.ones_like(ids)
        model.generate(ids[:, :1], attention_mask=one[:, :1], max_new_tokens=2, min_new_tokens=2)
        began = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=one,
            max_new_tokens=min(sampling.max_new_tokens, length - ids.shape[1]),
            stop_strings=list(sampling.stop) or None,
            tokenizer=tokenizer,
            streamer=clock,
        )[0]
    text, new = tokenizer.decode(output, skip_special_tokens=True), output[ids.shape[1] :].tolist()
    text = text[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]
    cuts = [place for place in map(text.find, sampling.stop) if place >= 0]
    ends = eos if isinstance(eos, list) else [eos]
    return TimedCompletion(
        text=text[: min(cuts)] if cuts else text,
        finish_reason="stop" if cuts or new[-1] in ends else "length",
        digest=digest or folder_digest(folder),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        load_s=loaded - start,
        prefill_s=clock.times[1] - began,
        decode_s=clock.times[-1] - clock.times[1],
    )


def _load(folder: Path) -> tuple[Any, Any]:
    """The tokenizer, and the model in float32. Raises BadInput."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # else transformers asks on stdin
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **own)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **own)
    except Exception as error:  # transformers raises whatever it trips over
        raise BadInput(f"{folder} cannot be loaded as a causal language model: {error}") from error
    return tokenizer, model.eval()


def _set_sampling(model: Any, sampling: Sampling) -> None:
    """Let the request alone decide, not the penalties and defaults that the checkpoint's own settings hold."""
    import torch
    from transformers import GenerationConfig

    wanted: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        wanted |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        wanted["min_p"] = sampling.min_p
    wanted["repetition_penalty"] = sampling.repetition_penalty
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0, **wanted)


class _TokenTimer:
    """A transformers streamer that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
