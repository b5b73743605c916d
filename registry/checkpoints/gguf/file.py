"""Reads a GGUF file: its metadata, with account of which keys were used, and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput, DamagedArtifact

SUFFIX = ".gguf"
SPLIT = re.compile(r".*-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
STRING_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


class Metadata(Mapping[str, Any]):
    """The metadata of a GGUF file. Keeps which keys were read, so that a key nobody understands is noticed.

    Iterating does not count as reading.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {key: _shortest(value) for key, value in values.items()}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self, prefix: str) -> dict[str, Any]:
        """The keys below `prefix` that nobody read, with their values."""
        return {key: value for key, value in self._values.items() if key.startswith(prefix) and key not in self._read}


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file without its tensor data.

    Attributes:
        shapes: of each tensor, in PyTorch's order of dimensions.
    """

    path: Path
    metadata: Metadata
    shapes: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, which is the prefix of its metadata keys."""
        return str(self.metadata["general.architecture"])

    @property
    def element_count(self) -> int:
        """Number of elements of all tensors."""
        return sum(map(prod, self.shapes.values()))

    def values(self, tensor: str) -> list[float]:
        """The values of a small float32 tensor, such as a table of rotary factors."""
        from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

        header = GgufHeader.from_file(str(self.path))
        found: list[float] = load_gguf_state_dict(header)[tensor][...].float().flatten().tolist()
        return found


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata and the tensor table of a GGUF file.

    Raises BadInput if it is one part of several, DamagedArtifact if it is not a GGUF file or is truncated.
    """
    if split := SPLIT.fullmatch(path.name):
        raise BadInput(
            f"{path} is one of {int(split[1])} parts of a GGUF file",
            fix="join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART OUTPUT.gguf",
        )
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        values, _ = read_gguf_metadata(str(path), STRING_ARRAYS)
        header = GgufHeader.from_file(str(path))
    except Exception as error:  # of struct, numpy and transformers
        raise DamagedArtifact(path, [f"it cannot be read as a GGUF file: {error}"]) from error
    end = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if end > path.stat().st_size:
        raise DamagedArtifact(path, [f"it has {path.stat().st_size} bytes, its tensors end at {end}"])
    return GgufFile(path, Metadata(values), {tensor.name: tensor.shape for tensor in header.tensors})


def only_gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that has neither safetensors nor ONNX files; None if there is none.

    Raises BadInput if there are several.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() == SUFFIX)
    if not files or any(folder.glob("*.safetensors")) or any(folder.glob("*.onnx")):
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise BadInput(f"{folder} has {len(files)} GGUF files: {names}", fix="name one of them")
    return files[0]
