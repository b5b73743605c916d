"""Complete one prompt and time it: an ONNX artifact in the torch-free runtime, a checkpoint in transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.export.artifact.torch_threads import torch_threads
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling
from limbeck.export.runtime.speculative.speculation import SpeculationCounts
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import physical_cores


@dataclass(frozen=True)
class TimedCompletion:
    """A completion of one prompt with its times in seconds, measured after a short warm-up run.

    Attributes:
        finish_reason: "stop" or "length".
        digest: of the model's files.
    """

    text: str
    finish_reason: str
    digest: str
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    acceptance_length: float | None = None  # tokens of one run that checks proposed ones; None: none did
    speculative_speedup: float | None = None  # over one token at a time, by the time of such steps in between

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens per second, after the first; None if there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


@dataclass(frozen=True)
class Proposals:
    """Who proposes tokens, as `limbeck.export.runtime.speculative.speculation.Speculation` has it.

    Attributes:
        draft: folder of the draft model; None: there is none.
        draft_digest: that it must have; None accepts any.
    """

    prompt_lookup_num_tokens: int = 0
    draft: Path | None = None
    draft_digest: str | None = None


def complete_onnx(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    *,
    digest: str | None = None,
    parse_special: bool = False,
    proposals: Proposals | None = None,
    **options: Any,
) -> TimedCompletion:
    """Complete `prompt` with an ONNX artifact, after checking its files (and its digest, if `digest` is given).

    Args:
        parse_special: special tokens in the prompt are tokens, not text.
        proposals: of speculative decoding; None: one token at a time.
        **options: `threads` and `device` of `Runtime.load`.

    Raises:
        BadInput: the folder is not an artifact, the prompt fills the context, or the graph cannot take proposals.
        DamagedArtifact: files do not match the manifest or the digest.
    """
    start = time.perf_counter()
    runtime = Runtime.load(folder, expected_digest=digest, **options)
    draft = None
    if proposals and proposals.draft:
        draft = Runtime.load(proposals.draft, expected_digest=proposals.draft_digest, **options)
    loaded = time.perf_counter()
    ids = runtime.prompt_ids(prompt, parse_special=parse_special)
    runtime.generate([ids[:1]], max_new_tokens=2, ignore_eos=True)
    runtime.speculate(proposals.prompt_lookup_num_tokens if proposals else 0, draft)
    result = runtime.generate([ids], **vars(sampling))[0]
    counts = runtime.speculation.counts if runtime.speculation else SpeculationCounts()
    return TimedCompletion(
        text=result.text,
        finish_reason=result.finish_reason,
        digest=runtime.digest,
        prompt_tokens=result.prompt_tokens,
        new_tokens=len(result.token_ids),
        load_s=loaded - start,
        prefill_s=result.prefill_s,
        decode_s=result.decode_s,
        acceptance_length=counts.acceptance_length,
        speculative_speedup=counts.speedup,
    )


def complete_torch(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    *,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    digest: str | None = None,
    parse_special: bool = False,
) -> TimedCompletion:
    """Complete `prompt` with a transformers checkpoint.

    Args:
        digest: of the files, if the caller has checked them; None computes it.
        parse_special: as in `complete_onnx`.

    Raises BadInput if the checkpoint cannot be loaded or the prompt fills the context.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("torch found no CUDA device", fix="use --device cpu")
    with torch_threads(threads or physical_cores()):  # the runtime's default, so that speeds are comparable
        return _complete_torch(folder, prompt, sampling, device, digest, parse_special)


def _complete_torch(
    folder: Path, prompt: str, sampling: Sampling, device: str, digest: str | None, parse_special: bool
) -> TimedCompletion:
    import torch

    start = time.perf_counter()
    model: Any = load_model(folder)  # first: it names a model's own code and what else makes it no model
    tokenizer: Any = load_tokenizer(folder)
    model.to(device)
    loaded = time.perf_counter()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2**31)
    ids = _prompt_ids(tokenizer, prompt, context, parse_special).to(device)
    _set_sampling(model, sampling)
    timer = _TokenTimer()
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        model.generate(ids[:, :1], attention_mask=mask[:, :1], max_new_tokens=2, min_new_tokens=2)
        generation_start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=min(sampling.max_new_tokens, context - ids.shape[1]),
            stop_strings=list(sampling.stop) or None,
            tokenizer=tokenizer,
            streamer=timer,
        )[0]
    new = output[ids.shape[1] :].tolist()
    text = tokenizer.decode(output, skip_special_tokens=True)
    text = text[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]
    stops = [position for position in map(text.find, sampling.stop) if position >= 0]
    eos = model.generation_config.eos_token_id
    stopped = stops or new[-1] in (eos if isinstance(eos, list) else [eos])
    return TimedCompletion(
        text=text[: min(stops)] if stops else text,
        finish_reason="stop" if stopped else "length",
        digest=digest or folder_digest(folder),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        load_s=loaded - start,
        prefill_s=timer.times[1] - generation_start,
        decode_s=timer.times[-1] - timer.times[1],
    )


def _prompt_ids(tokenizer: Any, prompt: str, context: int, parse_special: bool) -> Any:
    """Return (1, T) int64 token ids; an empty prompt becomes BOS, or EOS if there is no BOS. Raises BadInput."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=not parse_special).input_ids.long()
    if not ids.numel():
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.tensor([[first]])
    if ids.shape[1] >= context:
        message = f"the prompt has {ids.shape[1]} tokens and needs room for 1 more; the context is {context}"
        raise BadInput(message, fix="shorten the prompt")
    return ids


def _set_sampling(model: Any, sampling: Sampling) -> None:
    """Replace the checkpoint's generation settings with those of the request, except the EOS token."""
    import torch
    from transformers import GenerationConfig

    settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        settings["min_p"] = sampling.min_p
    settings["repetition_penalty"] = sampling.repetition_penalty
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0, **settings)


class _TokenTimer:
    """A transformers streamer that records the time of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
