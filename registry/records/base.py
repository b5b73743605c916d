"""The base of all records: frozen, with a digest."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from limbeck.registry.core.digest import json_digest

Kind = Literal["teacher", "student", "onnx"]
Engine = Literal["torch", "onnxruntime", "endpoint"]  # endpoint: its files hold the URL
Outcome = Literal["pass", "fail", "inconclusive"]


class Frozen(BaseModel):
    """A pydantic model that cannot be changed; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Record(Frozen):
    """A frozen record with a digest of its fields."""

    def digest(self) -> str:
        """Hex SHA-256 of the record's JSON."""
        return json_digest(to_jsonable_python(self))


class Estimate(Record):
    """A number with its confidence interval."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
    degrees_of_freedom: float | None = None  # of Student's t; None if the interval is not from it
