"""A loaded ONNX artifact: its graph, tokenizer and configuration. Text to token ids, token ids to logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from limbeck.export.runtime.hidden_states import graph_with_hidden_states
from limbeck.export.runtime.text.special_tokens import SpecialTokens
from limbeck.export.runtime.text.token_bytes import TokenBytes
from limbeck.registry.core.digest import MANIFEST
from limbeck.registry.core.digest import verify_files as verify_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.machine import physical_cores

GRAPH = "model.onnx"
NUMPY_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
# The context length's key in config.json, by model family.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
MAX_PREFILL_TOKENS = 1024  # prompt tokens in one run: more are not faster
PREFILL_LOGITS = 2**23  # logits computed in one run during prefill (32 MB); longer prompts are split into chunks
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class Session:
    """A loaded artifact. Not thread-safe.

    `Runtime` adds generation; `Batch` runs the graph over several rows with a static or dynamic cache. The methods here
    use no such cache: `logits` and `prompt_logits` score whole texts.

    Attributes:
        onnx_session: onnxruntime's session of the graph.
        tokenizer: the artifact's `tokenizers.Tokenizer`.
        token_bytes: the bytes of its tokens.
        special_tokens: encodes texts with escaped special tokens.
        config, generation_config: config.json; generation_config.json, {} if there is none.
        digest: digest of the artifact's files; "" if they were not verified.
        max_length: the context length: prompt and new tokens together.
        vocab_size: width of the logits.
        device: "cpu" or "cuda": runs the graph and holds the cache.
        is_fused: the graph's attention writes its cache in place (`StaticCache`); if False, each run returns a cache
            longer than its input (`DynamicCache`).
        past_inputs: the cache's inputs, by name.
        present_names: the cache's outputs, in the order of `past_inputs`.
        is_recurrent: parts of the cache are recurrent states, which hold all tokens so far and do not grow.
        input_names: the other inputs.
        can_choose_logits: the graph gives logits of the last positions, as many as it gets `position_ids`.
        logits_type: numpy's type of the logits.
        eos_token_ids: the tokens that end a text.
        bos_token_id, pad_token_id: None if the configuration names none.

    Raises:
        BadInput: the graph is not a causal language model with a key-value cache.
    """

    def __init__(
        self,
        onnx_session: ort.InferenceSession,
        tokenizer: Tokenizer,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        digest: str,
        device: str = "cpu",
    ) -> None:
        self.onnx_session = onnx_session
        self.device = device
        metadata = onnx_session.get_modelmeta().custom_metadata_map
        self.is_fused = metadata.get("limbeck.graph") == "fused"
        self.can_choose_logits = metadata.get("limbeck.logits") == "position_ids"
        self.tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self.special_tokens = SpecialTokens(tokenizer)
        self.config = config
        self.generation_config = generation_config
        self.digest = digest
        text_config = config.get("text_config") or config
        lengths = [int(text_config[key]) for key in CONTEXT_KEYS if text_config.get(key)]
        self.max_length: int = next(iter(lengths), 2**31)
        self.bos_token_id: int | None = self._token_id("bos_token_id")
        self.pad_token_id: int | None = self._token_id("pad_token_id")
        self.eos_token_ids: set[int] = self._end_token_ids()
        inputs = {item.name: item for item in onnx_session.get_inputs()}
        outputs = [item.name for item in onnx_session.get_outputs()]
        logits = onnx_session.get_outputs()[0]
        self.vocab_size = int(logits.shape[-1])
        self.logits_type = NUMPY_TYPES.get(logits.type, np.float32)
        self.past_inputs = {name: item for name, item in inputs.items() if name.startswith("past_key_values.")}
        self.present_names = [name.replace("past_key_values.", "present.", 1) for name in self.past_inputs]
        self.is_recurrent = not all(map(grows, self.past_inputs.values()))
        self.input_names = inputs.keys() - self.past_inputs.keys()
        unknown = sorted(self.input_names - {"input_ids", "attention_mask", "position_ids"})
        missing = [name for name in ("logits", *self.present_names) if name not in outputs]
        if unknown or missing or not self.past_inputs:
            raise BadInput(
                f"{GRAPH} is not a causal language model with a key-value cache: "
                f"inputs {sorted(inputs)}, outputs {outputs}",
                fix="export the model with `limbeck export`",
            )

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        threads: int | None = None,
        verify: bool = True,
        expected_digest: str | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        hidden_states: bool = False,
    ) -> Self:
        """Load the artifact in `folder`.

        Args:
            threads: threads of one operator; None: one for each physical core that this process may use.
            verify: check the files against the digests in limbeck.json before using them.
            expected_digest: the digest that the artifact must have; None accepts any. Ignored without `verify`.
            device: runs the graph and holds the cache; "cuda" needs onnxruntime-gpu (extra `gpu`).
            hidden_states: the graph returns them too, for embeddings.

        Raises:
            BadInput: the folder is not an artifact, the device is not available, or the graph has no hidden states.
            DamagedArtifact: a file is missing, cannot be read or does not have its digest.
        """
        folder = Path(folder)
        _check_device(device)
        missing = [name for name in (GRAPH, "config.json", "tokenizer.json") if not (folder / name).is_file()]
        if missing and not (verify and (folder / MANIFEST).is_file()):  # verify_digest reports missing files better
            raise BadInput(
                f"{folder} is not an ONNX artifact: it has no {missing[0]}",
                fix="make one with `limbeck export MODEL`",
            )
        digest = verify_digest(folder, expected_digest) if verify else ""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # each step has its own shape, and onnxruntime would keep a plan for each
        graph = graph_with_hidden_states(folder / GRAPH, options) if hidden_states else str(folder / GRAPH)
        try:
            session = ort.InferenceSession(graph, options, providers=PROVIDERS[device])
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # both libraries raise plain exceptions
            raise DamagedArtifact(folder, [str(error).strip().splitlines()[0]]) from error
        if device == "cuda" and session.get_providers()[0] != PROVIDERS["cuda"][0]:
            raise BadInput("onnxruntime found no working CUDA device", fix="see `nvidia-smi`, or use --device cpu")
        generation_config = folder / "generation_config.json"
        return cls(
            session,
            tokenizer,
            _read_json(folder / "config.json"),
            _read_json(generation_config) if generation_config.exists() else {},
            digest,
            device,
        )

    def encode(self, text: str, *, parse_special: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            parse_special: special tokens that the text spells out are tokens, as in transformers, except escaped ones
                (`special_tokens`); if False, they are text.
            add_special_tokens: add those that the tokenizer adds, such as BOS; one that the text brings is not doubled.

        Raises BadInput for invalid Unicode.
        """
        try:
            if not parse_special:
                text = self.special_tokens.escape(text)
            return self.special_tokens.encode(text, add_special_tokens)
        except TypeError:  # a lone surrogate has no UTF-8
            raise BadInput("the text is not valid Unicode") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, by default without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, prompt: str | Sequence[int], *, reserve: int = 1, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt. An empty prompt becomes the BOS token, or an EOS token if there is no BOS token.

        Args:
            prompt: a text, or token ids.
            reserve: tokens that the context must have room for after the prompt.
            parse_special: special tokens in a text are tokens, not text.

        Raises:
            BadInput: an id outside the vocabulary, invalid Unicode, or a prompt that is too long.
        """
        ids = (
            self.encode(prompt, parse_special=parse_special)
            if isinstance(prompt, str)
            else [int(token) for token in prompt]
        )
        if not ids:
            first = self.bos_token_id
            if first is None:
                first = min(self.eos_token_ids, default=None)
            if first is None:
                raise BadInput("the prompt is empty, and the model has no BOS or EOS token to start with")
            ids = [first]
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise BadInput(f"the prompt has a token id outside 0 to {self.vocab_size - 1}")
        if len(ids) + reserve > self.max_length:
            raise BadInput(
                f"the prompt has {len(ids)} tokens and needs room for {reserve} more; the context is {self.max_length}",
                fix="shorten the prompt",
            )
        return ids

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Logits of whole texts in one run, without a cache.

        Args:
            input_ids: (B, T) int64, padded on either side.
            attention_mask: (B, T) int64, 0 for padding.

        Returns:
            (B, T, V) float32; values at padded positions are meaningless.
        """
        cache = self.empty_cache(len(input_ids))
        logits, _ = self.forward(
            input_ids, attention_mask, positions_from_mask(attention_mask), cache, return_cache=False
        )
        return logits.astype(np.float32, copy=False)

    def prompt_logits(self, prompt: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the (T, V) logits of one text in chunks of (t, V), so that a long text needs no more memory."""
        tokens = np.array([prompt], np.int64)
        for logits, _ in self._prefill_chunks(tokens, np.ones_like(tokens)):
            yield logits[0]

    @property
    def max_prefill_tokens(self) -> int:
        """The most prompt tokens in one run. If the graph gives logits of all of them, these must fit in memory."""
        if self.can_choose_logits:
            return MAX_PREFILL_TOKENS
        return min(MAX_PREFILL_TOKENS, max(1, PREFILL_LOGITS // self.vocab_size))

    def _prefill_chunks(self, tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, list[ort.OrtValue]]]:
        """Run the graph over (B, T) tokens in chunks of t: yield the (B, t, V) logits and the cache after each."""
        batch, width = tokens.shape
        cache, positions = self.empty_cache(batch), positions_from_mask(mask)
        size = max(1, PREFILL_LOGITS // (batch * self.vocab_size))
        for start in range(0, width, size):
            end = min(start + size, width)
            logits, cache = self.forward(tokens[:, start:end], mask[:, :end], positions[:, start:end], cache)
            yield logits, cache

    def forward(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        position_ids: np.ndarray,
        cache: list[ort.OrtValue],
        return_cache: bool = True,
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """Run the graph once.

        Args:
            tokens, position_ids: (B, T) int64.
            mask: (B, P + T) int64, 0 for padding, where P is the cache's length.
            cache: a (B, heads, P, head size) value or a state for each past input, from `empty_cache` or a run before.
            return_cache: compute the new cache too.

        Returns:
            (B, T, V) logits of `logits_type`, and the cache of length P + T: onnxruntime's output values, never
            copied through numpy. [] in place of the cache without `return_cache`.
        """
        binding = self.onnx_session.io_binding()
        arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids}
        for name in self.input_names:
            binding.bind_cpu_input(name, np.ascontiguousarray(arrays[name], np.int64))
        for name, value in zip(self.past_inputs, cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in ["logits", *self.present_names] if return_cache else ["logits"]:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self.onnx_session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), present

    def empty_cache(self, batch_size: int) -> list[ort.OrtValue]:
        """A cache of length 0: a value for each past input, in the graph's layout. A recurrent state is 0."""
        return [
            ort.OrtValue.ortvalue_from_numpy(
                np.zeros(empty_past_shape(item, batch_size), self.numpy_type(item)), self.device, 0
            )
            for item in self.past_inputs.values()
        ]

    @staticmethod
    def numpy_type(item: ort.NodeArg) -> Any:
        """numpy's type of an input of the graph."""
        return NUMPY_TYPES[item.type]

    def _token_id(self, name: str) -> int | None:
        value = self.generation_config.get(name, self.config.get(name))
        return value[0] if isinstance(value, list) else value

    def _end_token_ids(self) -> set[int]:
        value = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if value is None:
            return set()
        return set(value) if isinstance(value, list) else {value}


def _check_device(device: str) -> None:
    if PROVIDERS[device][0] not in ort.get_available_providers():
        raise BadInput(
            f"the installed onnxruntime {ort.__version__} has no {PROVIDERS[device][0]}",
            fix="install Limbeck's extra `gpu` in place of onnxruntime (README), or use --device cpu",
        )


def grows(item: ort.NodeArg) -> bool:
    """Whether a past input has a size for the tokens so far: keys and values have, a recurrent state has none."""
    return any(not isinstance(size, int) and "batch" not in str(size) for size in item.shape)


def empty_past_shape(item: ort.NodeArg, batch_size: int) -> list[int]:
    """The shape of a past input of length 0; the graph's symbolic sizes are the batch and the past's length."""
    sizes = [batch_size if "batch" in str(size) else size for size in item.shape]
    return [size if isinstance(size, int) else 0 for size in sizes]


def positions_from_mask(attention_mask: np.ndarray) -> np.ndarray:
    """(B, T) attention mask -> (B, T) int64 positions that start at each row's first real token, as transformers."""
    return np.maximum(np.cumsum(attention_mask, axis=1, dtype=np.int64) - 1, 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedArtifact(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise DamagedArtifact(path.parent, [f"{path.name} is not a JSON object"])
    return value
