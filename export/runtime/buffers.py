"""Memory of the static cache, on the CPU or a GPU: the graph reads and writes it in place."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort


class Buffer:
    """A (rows, heads, width, head size) tensor of keys or values of one layer, or (rows, ...) recurrent states.

    Each row is valid up to its slot's length. Pages that were never written take no memory and no time.

    Args:
        shape: (rows, heads, width, head size), width in tokens; or (rows, ...).
        dtype: numpy's type of the elements.
        device: "cpu" or "cuda".
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        self._array: np.ndarray | None = None
        if device == "cpu":
            self._array = _untouched_array(shape, dtype)
            self._pointer = self._array.ctypes.data
        else:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
            self._pointer = self._value.data_ptr()

    def bind(self, binding: ort.IOBinding, past: str, present: str, first: int, rows: int) -> None:
        """Bind `rows` rows from row `first` on as both the input `past` and the output `present` of the graph."""
        shape = (rows, *self.shape[1:])
        pointer = self._pointer + first * self._row_bytes
        binding.bind_input(past, self.device, 0, self.dtype, shape, pointer)
        binding.bind_output(present, self.device, 0, self.dtype, shape, pointer)

    @contextmanager
    def edit(self) -> Iterator[np.ndarray]:
        """Give the tensor as an array to read and change; a GPU's is copied to main memory and back."""
        if self._array is not None:
            yield self._array
            return
        array = self._value.numpy()
        yield array
        self._value.update_inplace(array)


def _untouched_array(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Return an array in memory of its own, of small pages.

    numpy asks for pages of 2 MB. The first tokens of each head would touch all of them: a row of 8,192 tokens of
    SmolLM2-135M takes 377 MB when its first token is written, and a stream beside it pauses that long.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or not hasattr(mmap, "MADV_NOHUGEPAGE"):  # nothing to map, or not Linux
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def ortvalue_to_numpy(value: ort.OrtValue) -> np.ndarray:
    """View a float32 or float16 value as an array, valid while `value` lives; a value on a GPU is copied."""
    if value.device_name() != "cpu":
        return value.numpy()
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.data_type()]
    size = math.prod(value.shape()) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(value.shape(), dtype)
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(value.shape())
