"""Engines: causal language models that return log-probabilities of given tokens, and generated text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from limbeck.evals.engines import batches
from limbeck.evals.engines.batches import CPU_TOKENS, ContinuationScore, NanLogits, TokenCounter
from limbeck.evals.engines.onnx_batches import OnnxForward
from limbeck.evals.engines.torch_batches import TorchForward
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import NonFiniteLogits
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.checkpoints import load as checkpoints
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import quiet_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The settings of transformers that Limbeck's ONNX runtime has too.
RUNTIME_SAMPLING_SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty")


class Engine(Protocol):
    """A loaded model.

    Attributes:
        tokenizer: the transformers tokenizer of the model's folder, as lm-eval's HFLM loads it.
        max_length: the context in tokens, as HFLM finds it.
        identity: the libraries that the numbers depend on, with their versions.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    identity: str

    def scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """(index, score) of each (context, continuation) of token ids, in the order in which they are finished.

        A pair that is longer than the context loses its beginning.

        Args:
            batch_tokens: the most tokens of one forward pass; on a CPU at most `CPU_TOKENS`.

        Raises:
            NanLogits: a log-probability is NaN.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> Iterable[list[int] | str]:
        """The new tokens of each prompt, or their text, up to one of the `until` strings or the end of text.

        Args:
            prompts: token ids; all prompts form one batch.
            **sampling: `do_sample`, `temperature` and other transformers settings of lm-eval's tasks.

        Raises:
            NanLogits: the logits after a prompt are NaN.
        """


class TorchEngine:
    """A transformers checkpoint in float32, on a GPU if there is one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        import torch

        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.identity = library_versions("torch")
        self._forward = TorchForward(self.model, max_length)
        self.work = self._forward.work

    def scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """See `Engine.scores`."""
        on_cpu = self.model.device.type == "cpu"
        return batches.score_pairs(self._forward, pairs, min(batch_tokens, CPU_TOKENS) if on_cpu else batch_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> list[list[int]]:
        """See `Engine.generate`. The checkpoint's own generation settings are the defaults, as in HFLM."""
        import torch
        from lm_eval.models.utils_hf import stop_sequences_criteria
        from transformers import LogitsProcessorList

        def check_numbers(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            is_nan = logits.isnan().any(dim=-1)
            if is_nan.any():  # the generated text would look normal
                raise NanLogits(int(is_nan.nonzero()[0, 0]))
            return logits

        pad = self.tokenizer.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        if not sampling.get("do_sample"):
            sampling = {key: value for key, value in sampling.items() if key != "temperature"}
        device = self.model.device
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, list(until), width, len(prompts)),
                logits_processor=LogitsProcessorList([check_numbers]),
                pad_token_id=pad,
                use_cache=True,
                **sampling,
            )
        return output[:, width:].tolist()


class OnnxEngine:
    """An ONNX artifact: Limbeck's own runtime generates text; the same graph with shared prefixes gives scores."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.identity = library_versions("onnxruntime")
        self.work = TokenCounter()
        # Only one of the two exists at a time, since each holds the weights.
        self._forward: OnnxForward | None = None
        self._runtime: Runtime | None = None

    def scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """See `Engine.scores`."""
        if self._forward is None:
            self._runtime = None
            self._forward = OnnxForward(self.folder, self.max_length)
            self._forward.work = self.work
        return batches.score_pairs(self._forward, pairs, min(batch_tokens, CPU_TOKENS))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> list[list[int]]:
        """See `Engine.generate`. Raises BadInput for a setting that the runtime lacks."""
        values = {name: value for name, value in sampling.items() if name in RUNTIME_SAMPLING_SETTINGS}
        settings = {name: value for name, value in values.items() if value is not None}
        if sampling.get("do_sample"):
            settings["temperature"] = sampling.get("temperature") or 1.0
        unknown = sorted(sampling.keys() - {"do_sample", "temperature", *RUNTIME_SAMPLING_SETTINGS})
        if unknown:
            raise BadInput(
                f"the task's generation_kwargs have {', '.join(unknown)}, which an ONNX model does not support",
                fix="leave it out of the task, or score the PyTorch model",
            )
        stop = [text for text in until if text]
        if self._runtime is None:
            self._forward = None
            self._runtime = Runtime.load(self.folder, verify=False)  # it was verified when the model was resolved
            try:
                self._runtime.generate(prompts[:1], max_new_tokens=1)
            except NonFiniteLogits:
                raise NanLogits(0) from None
        completions = self._runtime.generate(prompts, max_new_tokens=max_new_tokens, stop=stop, **settings)
        return [completion.token_ids for completion in completions]


def library_versions(engine: str) -> str:
    """The libraries that an engine's numbers depend on, with their versions; imports none of them."""
    libraries = {"torch": ("torch", "transformers"), "onnxruntime": ("onnxruntime",)}[engine]
    return ", ".join(f"{library} {version(library)}" for library in libraries)


class LoadedTokenizer(NamedTuple):
    """A model's configuration, tokenizer and context, which are known before its weights are loaded."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def load_tokenizer(folder: Path, label: str, trust_remote_code: bool = False) -> LoadedTokenizer:
    """A model folder's tokenizer and context, as lm-eval's HFLM finds them.

    Raises BadInput if transformers cannot load the configuration or the tokenizer.
    """
    quiet_libraries()
    from lm_eval.models.utils import configure_pad_token, resolve_max_length

    config = checkpoints.load_config(folder, trust_remote_code, label=label)
    tokenizer = checkpoints.load_tokenizer(folder, trust_remote_code, label=label)
    try:
        tokenizer = configure_pad_token(tokenizer, model_config=config)
    except ValueError as error:
        raise BadInput(f"{label}: its tokenizer cannot be used: {error}") from error
    return LoadedTokenizer(config, tokenizer, resolve_max_length(config, tokenizer))


def load_engine(model: ResolvedModel, trust_remote_code: bool = False) -> Engine:
    """Load the engine of a model: onnxruntime for an ONNX artifact, else PyTorch.

    Raises BadInput if transformers cannot load the model or its tokenizer.
    """
    config, tokenizer, max_length = load_tokenizer(model.path, model.label, trust_remote_code)
    if model.engine == "onnxruntime":
        return OnnxEngine(model.path, tokenizer, max_length)
    torch_model = checkpoints.load_model(model.path, trust_remote_code, label=model.label, config=config)
    return TorchEngine(torch_model, tokenizer, max_length)
