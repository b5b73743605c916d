"""MLflow's filter language for model versions: comparisons joined by AND.

    tags.`limbeck.precision` = 'int8-weight' and metrics.`retention.value` >= 0.9 and name LIKE 'coder%'

A condition is parsed from text, written for MLflow, and checked on a version that was read without MLflow, always with
the same meaning. MLflow searches tags and attributes by one call and metrics by another; a filter here can mix them.
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
    \s*(?:(?P<kind>[A-Za-z]+)\s*\.\s*)?(?P<key>`[^`]+`|"[^"]+"|[A-Za-z_][\w./-]*)
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
    """A version that a condition can be checked on, such as `limbeck.registry.mlflow.listing.ListedVersion`."""

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
    op: str  # in upper case
    value: Value  # a number for metrics and version_number; several strings for IN

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
        """Whether MLflow's language can express it: it has no escape for quotes."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        strings = [value for value in values if isinstance(value, str)]
        has_unquotable = any("\\" in string or ("'" in string and '"' in string) for string in strings)
        return "`" not in self.key and not has_unquotable

    def matches(self, version: SearchableVersion) -> bool:
        """Whether it holds for a version; False if the version does not have the tag, metric or attribute.

        As MLflow's ILIKE in SQLite, ILIKE ignores the case of ASCII letters only.
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
    """The conditions of a filter; none for an empty one.

    Raises BadInput, with the position, if it cannot be parsed.
    """
    found: list[Condition] = []
    position = 0
    while text[position:].strip():
        if found:
            joined = AND.match(text, position)
            if joined is None:
                raise _filter_error(text, position, "AND is missing")
            position = joined.end()
        match = TOKEN.match(text, position)
        if match is None:
            raise _filter_error(text, position, "this is not a comparison")
        found.append(_condition(text, match))
        position = match.end()
    return tuple(found)


def _condition(text: str, match: re.Match[str]) -> Condition:
    prefix, key, op, value = (match[part] or "" for part in ("kind", "key", "op", "value"))
    if prefix.lower() not in KINDS:
        raise _filter_error(text, match.start("kind"), f"{prefix!r} is not one of tags, metrics, attribute")
    kind, key, op = KINDS[prefix.lower()], key.strip('`"'), " ".join(op.upper().split())
    if kind == "attribute" and key not in ATTRIBUTES:
        raise _filter_error(
            text, match.start("key"), f"{key!r} is not one of {', '.join(ATTRIBUTES)}; a tag is written tags.`KEY`"
        )
    is_numeric = kind == "metric" or (kind == "attribute" and ATTRIBUTES[key] is int)
    list_operators = ("IN", "NOT IN") if kind == "attribute" and key in ("name", "run_id") else ()
    operators = NUMERIC if is_numeric else (*TEXT, *list_operators)
    if op not in operators:
        raise _filter_error(text, match.start("op"), f"{op} is not one of {', '.join(operators)}, which compare {key}")
    return Condition(kind, key, op, _value(text, match, value, is_numeric, op in list_operators))


def _value(text: str, match: re.Match[str], value: str, is_numeric: bool, is_list: bool) -> Value:
    position = match.start("value")
    if is_list:
        try:
            listed = ast.literal_eval(value if value.startswith("(") else "")
        except (SyntaxError, ValueError):
            listed = None
        values = listed if isinstance(listed, tuple) else (listed,)
        if not all(isinstance(each, str) for each in values):
            raise _filter_error(text, position, "this is not a list such as ('a', 'b')")
        return values
    if is_numeric:
        try:
            return float(value.strip("'\""))
        except ValueError:
            raise _filter_error(text, position, f"{value} is not a number") from None
    if value[0] not in "'\"":
        raise _filter_error(text, position, f"{value} is a string here: put it in quotes")
    return value[1:-1]


def _filter_error(text: str, position: int, why: str) -> BadInput:
    position += len(text[position:]) - len(text[position:].lstrip())
    here = text[position : position + 30] or "the end"
    return BadInput(
        f"the filter at character {position + 1} ({here!r}): {why}",
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
    """The regular expression of a LIKE pattern: % is any text, _ any character."""
    parts = {"%": ".*", "_": "."}
    flags = re.DOTALL | (re.IGNORECASE | re.ASCII if ignore_case else re.NOFLAG)
    return re.compile("".join(parts.get(c) or re.escape(c) for c in like), flags)
