"""A loaded graph with its tokenizer: numpy, onnxruntime and tokenizers, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

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
# The names that model families give to the number of positions they were made for.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
PREFILL_LOGITS = 2**23  # computed at once while a prompt is read (32 MB); longer prompts go in pieces
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class Session:
    """A loaded artifact. Not for several threads at once: a server takes turns.

    Attributes:
        tokenizer: the artifact's `tokenizers.Tokenizer`.
        config: config.json. generation_config: generation_config.json, or {}.
        digest: of the artifact's files.
        max_length: the context: prompt and new tokens together.
        vocab_size: width of the logits.
        device: where the cache lies: "cpu" or "cuda".
        fused: the graph's attention writes its cache in place; else each run gives a longer cache than it took.
        past, present: the cache's inputs by name, and its outputs in their order. takes: the other inputs.
        logits_type: numpy's type of the logits.
        eos_token_ids: tokens that end a text. bos_token_id, pad_token_id: None where the model names none.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        tokenizer: Tokenizer,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        digest: str,
        device: str = "cpu",
    ) -> None:
        self.onnx_session = session
        self.device = device
        self.is_fused = session.get_modelmeta().custom_metadata_map.get("limbeck.graph") == "fused"
        self.tokenizer = tokenizer
        self.config = config
        self.generation_config = generation_config
        self.digest = digest
        text_config = config.get("text_config") or config
        lengths = [int(text_config[key]) for key in CONTEXT_KEYS if text_config.get(key)]
        self.max_length: int = next(iter(lengths), 2**31)
        self.bos_token_id: int | None = self._token_id("bos_token_id")
        self.pad_token_id: int | None = self._token_id("pad_token_id")
        eos = generation_config.get("eos_token_id", config.get("eos_token_id"))
        self.eos_token_ids: set[int] = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        inputs = {item.name: item for item in session.get_inputs()}
        outputs = [item.name for item in session.get_outputs()]
        logits = session.get_outputs()[0]
        self.vocab_size = int(logits.shape[-1])
        self.logits_type = NUMPY_TYPES.get(logits.type, np.float32)
        self.past_inputs = {name: item for name, item in inputs.items() if name.startswith("past_key_values.")}
        self.present_names = [name.replace("past_key_values.", "present.", 1) for name in self.past_inputs]
        self.input_names = inputs.keys() - self.past_inputs.keys()
        unknown = sorted(self.input_names - {"input_ids", "attention_mask", "position_ids"})
        missing = [name for name in ("logits", *self.present_names) if name not in outputs]
        if unknown or missing or not self.past_inputs:
            raise BadInput(
                f"{GRAPH} is no causal language model with a key-value cache: "
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
    ) -> Self:
        """Load the artifact in `folder`.

        Args:
            threads: for one operator; the default is one for each physical core this process may use.
            verify: check the files against limbeck.json (and `expected_digest`, a digest, where given) before they
                are used.
            device: what runs the graph and holds the cache; "cuda" wants onnxruntime-gpu (extra `gpu`).

        Raises:
            BadInput: a folder that is no artifact, or CUDA where there is none. DamagedArtifact: its files are not
                those of its digest.
        """
        folder = Path(folder)
        _check_device(device)
        missing = [name for name in (GRAPH, "config.json", "tokenizer.json") if not (folder / name).is_file()]
        if missing and not (verify and (folder / MANIFEST).is_file()):  # a manifest tells more
            raise BadInput(
                f"{folder} is no ONNX artifact: it has no {missing[0]}",
                fix="make one with `limbeck export MODEL`",
            )
        digest = verify_digest(folder, expected_digest) if verify else ""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # each step has a shape of its own; a plan for each would pile up
        try:
            session = ort.InferenceSession(str(folder / GRAPH), options, providers=PROVIDERS[device])
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # both libraries raise bare exceptions
            raise DamagedArtifact(folder, [str(error).strip().splitlines()[0]]) from error
        if device == "cuda" and session.get_providers()[0] != PROVIDERS["cuda"][0]:
            raise BadInput("onnxruntime found no CUDA device that works", fix="see `nvidia-smi`, or use --device cpu")
        generation_config = folder / "generation_config.json"
        return cls(
            session,
            tokenizer,
            _read_json(folder / "config.json"),
            _read_json(generation_config) if generation_config.exists() else {},
            digest,
            device,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with whatever special tokens the tokenizer adds. Raises BadInput."""
        try:
            return self.tokenizer.encode(text).ids
        except TypeError:  # a str with half of a surrogate pair has no UTF-8
            raise BadInput("the text is not valid Unicode") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt_ids(self, prompt: str | Sequence[int], *, reserve: int = 1) -> list[int]:
        """Token ids of a prompt; an empty one is the token that begins a text.

        Raises BadInput where an id is none of the model's, or the context has no room for `reserve` more tokens.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            begin = self.bos_token_id
            if begin is None:
                begin = min(self.eos_token_ids, default=None)
            if begin is None:
                raise BadInput("the prompt is empty and the model has no token that begins a text")
            ids = [begin]
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise BadInput(f"the prompt has a token id outside 0 to {self.vocab_size - 1}")
        if len(ids) + reserve > self.max_length:
            raise BadInput(
                f"the prompt has {len(ids)} tokens and wants room for {reserve} more; the context is {self.max_length}",
                fix="shorten the prompt",
            )
        return ids

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Logits of whole texts, without a cache.

        Args:
            input_ids: (B, T) int64, padded on either side. attention_mask: (B, T) int64, 0 where padded.

        Returns:
            (B, T, V) float32; what stands at padded positions has no meaning.
        """
        cache = self.empty_cache(len(input_ids))
        logits, _ = self.forward(
            input_ids, attention_mask, positions_from_mask(attention_mask), cache, return_cache=False
        )
        return logits.astype(np.float32, copy=False)

    def prompt_logits(self, prompt: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits of one text of T token ids, in pieces that add up to (T, V): a long one takes no more memory."""
        tokens = np.array([prompt], np.int64)
        for logits, _ in self._prefill_chunks(tokens, np.ones_like(tokens)):
            yield logits[0]

    @property
    def max_prefill_tokens(self) -> int:
        """How many tokens of prompts are read at once, for their logits to fit in memory."""
        return max(1, PREFILL_LOGITS // self.vocab_size)

    def _prefill_chunks(self, tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, list[ort.OrtValue]]]:
        """Read (B, T) tokens in pieces of t tokens: the (B, t, V) logits of each, and the cache after it."""
        batch, width = tokens.shape
        cache, place = self.empty_cache(batch), positions_from_mask(mask)
        piece = max(1, PREFILL_LOGITS // (batch * self.vocab_size))
        for start in range(0, width, piece):
            end = min(start + piece, width)
            logits, cache = self.forward(tokens[:, start:end], mask[:, :end], place[:, start:end], cache)
            yield logits, cache

    def forward(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        position_ids: np.ndarray,
        cache: list[ort.OrtValue],
        return_cache: bool = True,
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """One run of the graph: (B, T, V) logits, and the cache grown by T unless `return_cache` is False.

        The cache goes from output to input as it is: it never passes through numpy.
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
        """A cache of length 0 for each layer, in the layout the graph declares."""
        make = ort.OrtValue.ortvalue_from_shape_and_type
        return [
            make(empty_past_shape(item, batch_size), self.numpy_type(item), self.device, 0)
            for item in self.past_inputs.values()
        ]

    @staticmethod
    def numpy_type(item: ort.NodeArg) -> Any:
        """numpy's type of a graph's input."""
        return NUMPY_TYPES[item.type]

    def _token_id(self, name: str) -> int | None:
        value = self.generation_config.get(name, self.config.get(name))
        return value[0] if isinstance(value, list) else value


def _check_device(device: str) -> None:
    if PROVIDERS[device][0] not in ort.get_available_providers():
        raise BadInput(
            f"onnxruntime {ort.__version__} here has no {PROVIDERS[device][0]}",
            fix="install Limbeck's extra `gpu` in place of onnxruntime (README), or use --device cpu",
        )


def empty_past_shape(item: ort.NodeArg, batch_size: int) -> list[int]:
    """The shape of a past input of length 0: the sizes the graph leaves open are the batch and the past's length."""
    return [n if isinstance(n, int) else batch_size if "batch" in n else 0 for n in item.shape]


def positions_from_mask(attention_mask: np.ndarray) -> np.ndarray:
    """(B, T) mask -> (B, T) int64 positions, counted from each row's first real token (as transformers)."""
    return np.maximum(np.cumsum(attention_mask, axis=1, dtype=np.int64) - 1, 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedArtifact(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise DamagedArtifact(path.parent, [f"{path.name} is no JSON object"])
    return value
