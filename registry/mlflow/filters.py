"""MLflow's filter language, as far as versions are searched in it: conditions that AND joins.

    tags.`limbeck.precision` = 'int8' and metrics.`retention.value` >= 0.9 and name LIKE 'coder%'

A condition is read from text, said to MLflow, and tried on a version that was read without MLflow: all three mean
the same. MLflow asks for tags and attributes with one call and for metrics with another; here they go together.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from limbeck.registry.core.errors import BadInput

Value = str | float | tuple[str, ...]

ATTRIBUTES = {"name": str, "run_id": str, "source_path": str, "version_number": int}
TOKEN = re.compile(
    r"""
    \s*(?:(?P<of>[A-Za-z]+)\s*\.\s*)?(?P<key>`[^`]+`|"[^"]+"|[A-Za-z_][\w./-]*)
    \s*(?P<op>!=|<=|>=|=|<|>|(?:NOT\s+IN|IN|I?LIKE)(?=[\s'"(]))
    \s*(?P<value>'[^']*'|"[^"]*"|\([^()]*\)|[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
AND = re.compile(r"\s+AND(?=\s)", re.IGNORECASE)
KINDS: dict[str, Literal["attribute", "tag", "metric"]] = {
    "": "attribute", "attribute": "attribute", "tag": "tag", "tags": "tag", "metrics": "metric",
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "IN": lambda own, values: own in values,
    "NOT IN": lambda own, values: own not in values,
}  # fmt: skip
NUMERIC = ("=", "!=", "<", "<=", ">", ">=")
TEXT = ("=", "!=", "LIKE", "ILIKE")


class SearchableVersion(Protocol):
    """What a condition is tried on: a version as `limbeck.registry.mlflow.listing.ListedVersion`."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def tags(self) -> Mapping[str, str]: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Condition(NamedTuple):
    """One comparison."""

    kind: Literal["attribute", "tag", "metric"]
    key: str
    op: str  # in capital letters
    value: Value  # a number of a metric and of version_number; several texts of IN

    def __str__(self) -> str:
        key = {"attribute": self.key, "tag": f"tags.`{self.key}`", "metric": f"metrics.`{self.key}`"}[self.kind]
        value = (
            f"({', '.join(map(_quote_value, self.value))})"
            if isinstance(self.value, tuple)
            else _quote_value(self.value)
        )
        return f"{key} {self.op} {value}"

    @property
    def is_expressible(self) -> bool:
        """Whether MLflow's language has a way to write it."""
        texts = self.value if isinstance(self.value, tuple) else (self.value,)
        both = any("\\" in text or ("'" in text and '"' in text) for text in texts if isinstance(text, str))
        return "`" not in self.key and not both

    def matches(self, version: SearchableVersion) -> bool:
        """Whether it holds of a version; what the version does not have holds nothing.

        As MLflow has it in SQLite, ILIKE takes capital letters of ASCII, and of ASCII alone, as small ones.
        """
        own = self._value_in(version)
        if own is None:
            return False
        if self.op in ("LIKE", "ILIKE"):
            return bool(_pattern(str(self.value), self.op == "ILIKE").fullmatch(str(own)))
        return COMPARISONS[self.op](own, self.value)

    def _value_in(self, version: SearchableVersion) -> str | float | None:
        if self.kind == "tag":
            return version.tags.get(self.key)
        if self.kind == "metric":
            return version.metrics.get(self.key)
        attributes: dict[str, str | int | None] = {
            "name": version.name,
            "version_number": version.version,
            "run_id": version.run_id,
            "source_path": version.source,
        }
        return attributes[self.key]


def parse_filter(text: str) -> tuple[Condition, ...]:
    """The conditions of a filter; none of an empty one.

    Raises BadInput, with the place, where it cannot be read.
    """
    found: list[Condition] = []
    place = 0
    while text[place:].strip():
        if found:
            joined = AND.match(text, place)
            if joined is None:
                raise _filter_error(text, place, "AND is missing")
            place = joined.end()
        match = TOKEN.match(text, place)
        if match is None:
            raise _filter_error(text, place, "this is no comparison")
        found.append(_condition(text, match))
        place = match.end()
    return tuple(found)


def _condition(text: str, match: re.Match[str]) -> Condition:
    of, key, op, value = (match[part] or "" for part in ("of", "key", "op", "value"))
    if of.lower() not in KINDS:
        raise _filter_error(text, match.start("of"), f"{of!r} is none of tags, metrics, attribute")
    kind, key, op = KINDS[of.lower()], key.strip('`"'), " ".join(op.upper().split())
    if kind == "attribute" and key not in ATTRIBUTES:
        raise _filter_error(
            text, match.start("key"), f"{key!r} is none of {', '.join(ATTRIBUTES)}; a tag is written tags.`KEY`"
        )
    numeric = kind == "metric" or ATTRIBUTES.get(key if kind == "attribute" else "") is int
    lists = ("IN", "NOT IN") if kind == "attribute" and key in ("name", "run_id") else ()
    operators = NUMERIC if numeric else (*TEXT, *lists)
    if op not in operators:
        raise _filter_error(text, match.start("op"), f"{op} is none of {', '.join(operators)}, which compare {key}")
    return Condition(kind, key, op, _value(text, match, value, numeric, op in lists))


def _value(text: str, match: re.Match[str], value: str, numeric: bool, several: bool) -> Value:
    place = match.start("value")
    if several:
        try:
            listed = ast.literal_eval(value if value.startswith("(") else "")
        except (SyntaxError, ValueError):
            listed = None
        values = listed if isinstance(listed, tuple) else (listed,)
        if not all(isinstance(each, str) for each in values):
            raise _filter_error(text, place, "this is no list such as ('a', 'b')")
        return values
    if numeric:
        try:
            return float(value.strip("'\""))
        except ValueError:
            raise _filter_error(text, place, f"{value} is no number") from None
    if value[0] not in "'\"":
        raise _filter_error(text, place, f"{value} is a text here: put it in quotes")
    return value[1:-1]


def _filter_error(text: str, place: int, why: str) -> BadInput:
    place += len(text[place:]) - len(text[place:].lstrip())
    here = text[place : place + 30] or "the end"
    return BadInput(
        f"the filter at character {place + 1} ({here!r}): {why}",
        fix="write \"tags.`limbeck.kind` = 'onnx' and metrics.`retention.value` >= 0.9\"",
    )


def to_filter_string(conditions: Iterable[Condition]) -> str:
    """The conditions in MLflow's language."""
    return " and ".join(map(str, conditions))


def _quote_value(value: str | float) -> str:
    if isinstance(value, str):
        return f'"{value}"' if "'" in value else f"'{value}'"
    return str(int(value)) if value.is_integer() else repr(value)


def _pattern(like: str, ignore_case: bool) -> re.Pattern[str]:
    """The pattern of LIKE: % is any text, _ any character."""
    parts = {"%": ".*", "_": "."}
    flags = re.DOTALL | (re.IGNORECASE | re.ASCII if ignore_case else re.NOFLAG)
    return re.compile("".join(parts.get(c) or re.escape(c) for c in like), flags)
