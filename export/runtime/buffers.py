"""Memory for a key-value cache that the graph writes in place: main memory, or a GPU's."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort


class Buffer:
    """(rows, heads, width, size) numbers of which each row's first ones mean something.

    What was not written is not set to 0; on Linux it takes no memory until then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        self._array: np.ndarray | None = None
        if device == "cpu":
            self._array = np.empty(shape, dtype)
            self._pointer = self._array.ctypes.data
        else:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
            self._pointer = self._value.data_ptr()

    def bind(self, binding: ort.IOBinding, past: str, present: str, first: int, rows: int) -> None:
        """Let the graph read and write `rows` rows from `first` on, as its input `past` and its output `present`."""
        shape = (rows, *self.shape[1:])
        pointer = self._pointer + first * self._row_bytes
        binding.bind_input(past, self.device, 0, self.dtype, shape, pointer)
        binding.bind_output(present, self.device, 0, self.dtype, shape, pointer)

    @contextmanager
    def edit(self) -> Iterator[np.ndarray]:
        """The numbers, to read and change; those of a GPU go to main memory and back."""
        if self._array is not None:
            yield self._array
            return
        array = self._value.numpy()
        yield array
        self._value.update_inplace(array)


def ortvalue_to_numpy(value: ort.OrtValue) -> np.ndarray:
    """The numbers of a value, good for as long as it is held; copied only where they lie on a GPU."""
    if value.device_name() != "cpu":
        return value.numpy()
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.data_type()]
    size = math.prod(value.shape()) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(value.shape(), dtype)
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(value.shape())
