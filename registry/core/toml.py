"""TOML files as frozen pydantic models, with errors that name the file, the line and the key that was probably meant.

Used for recipes and policies. The command line overrides single keys by `KEY=VALUE`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from limbeck.registry.core.errors import BadInput

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")
LARGEST = 100_000  # bytes of a file
LONGEST = 200  # lines of one value; `key_lines` stops after a longer one
Key = tuple[str | int, ...]  # ("students", 0, "hidden_size")


class Problem(NamedTuple):
    """What is wrong with a document whose values are each valid alone."""

    message: str
    keys: tuple[Key, ...] = ()  # the keys it is about
    fix: str | None = None


def load_toml(path: Path | str, model: type[Model], overrides: list[str] | tuple[str, ...] = ()) -> Model:
    """The TOML file at `path` as a `model`, after `overrides` (`KEY=VALUE`) are applied.

    A KEY is dotted, with numbers for the items of a list (`students.0.label`). A VALUE is a TOML value, or else a
    string. Raises BadInput with every problem, each with its line.
    """
    return parse_toml(read_toml_text(path), model, overrides, source_name=str(path))


def read_toml_text(path: Path | str) -> str:
    """The text of a file. Raises BadInput if it is missing, too large or not UTF-8."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if len(read := file.read(LARGEST + 1)) > LARGEST:
                raise BadInput(f"{path} has more than {LARGEST:,} bytes", fix="is it the right file?")
        return read.decode()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file", fix=_near_file(path)) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8", fix="save the file as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def parse_toml(
    text: str, model: type[Model], overrides: list[str] | tuple[str, ...] = (), *, source_name: str = "<text>"
) -> Model:
    """As `load_toml`, from a string; errors call it `source_name`."""
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise BadInput(f"{source_name}: its values are nested too deep") from None
    except tomllib.TOMLDecodeError as error:
        found = re.match(r"(.*) \(at line (\d+), column (\d+)\)$", str(error))
        message = f"{source_name}:{found[2]}: {found[1]} (column {found[3]})" if found else f"{source_name}: {error}"
        raise BadInput(message, fix="the file must be TOML: https://toml.io") from None
    given: dict[Key, str] = {}
    for override in overrides:
        given[_override(data, override)] = override
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = key_lines(text)
        problems: dict[str, str | None] = {}
        for details in error.errors():
            message, fix = _problem(details, data, model, lines, given, source_name)
            problems.setdefault(message, fix)
        fixes = list(dict.fromkeys(fix for fix in problems.values() if fix))
        raise BadInput("\n".join(problems), fix="\n  ".join(fixes) or None) from None


def problems_error(problems: Sequence[Problem], text: str, source_name: str = "<text>") -> BadInput:
    """The error that lists problems, each with the lines of its keys."""
    lines = key_lines(text)
    messages = []
    for problem in problems:
        places = sorted({line for key in problem.keys if (line := _nearest(lines, key)) is not None})
        messages.append(f"{source_name}{':' if places else ''}{' and '.join(map(str, places))}: {problem.message}")
    fixes = list(dict.fromkeys(problem.fix for problem in problems if problem.fix))
    return BadInput("\n".join(messages), fix="\n  ".join(fixes) or None)


def key_lines(text: str) -> dict[Key, int]:
    """The line (from 1) of each key, table header and array-of-tables item of a valid TOML document."""
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}  # items seen of each array of tables
    table: Key = ()
    start, statement = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            start = number
        elif number - start > LONGEST:
            break
        statement += line + "\n"
        # A complete statement is a TOML document; an incomplete one continues in the next line.
        try:
            parsed: Any = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        header = statement.lstrip().startswith("[")
        item = statement.lstrip().startswith("[[")
        key: Key = () if header else table
        while isinstance(parsed, dict) and parsed:
            if len(parsed) > 1:  # an inline table: its keys share the line
                break
            name, parsed = next(iter(parsed.items()))
            key = (*key, name)
            if header and not (item and parsed == [{}]) and key in counts:
                key = (*key, counts[key] - 1)
            lines.setdefault(key, start)
        if item:
            counts[key] = counts.get(key, 0) + 1
            key = (*key, counts[key] - 1)
            lines[key] = start
        if header:
            table = key
        statement = ""
    return lines


def _problem(
    details: Any, data: Any, model: type[BaseModel], lines: dict[Key, int], given: dict[Key, str], source_name: str
) -> tuple[str, str | None]:
    """One pydantic error as (message, fix)."""
    key = _key_path(details["loc"], data, missing=details["type"] == "missing")
    name = ".".join(map(str, key))
    place = source_name
    override, line = _nearest(given, key), _nearest(lines, key)
    if override is not None:
        place = f"--set {override}"
    elif line is not None:
        place = f"{source_name}:{line}"
    if details["type"] == "extra_forbidden":
        known = _fields(model, key[:-1])
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        table = ".".join(map(str, key[:-1])) or "the file"
        fix = f"keys of {table}: {', '.join(known)}" if known else None
        return f"{place}: unknown key {name}" + (f"; did you mean {near[0]}?" if near else ""), fix
    if details["type"] == "missing":
        return f"{place}: {name} is missing", None
    return (
        f"{place}: {name}: {describe_error(details)}"
        if name
        else f"{place}: {describe_error(details, show_value=False)}",
        None,
    )


def describe_error(details: Any, show_value: bool = True) -> str:
    """The message of one pydantic error; with the value if `show_value`."""
    message = re.sub(r"^Value error, ", "", details["msg"])
    if not show_value or details["type"] == "value_error":
        return message
    value = details.get("input")
    shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
    message = f"{message[:1].lower()}{message[1:]}, not {shown}"
    if isinstance(value, str):
        allowed = re.findall(r"'([^']+)'", details.get("ctx", {}).get("expected", ""))
        near = difflib.get_close_matches(value, allowed, n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    return message


def _nearest(values: Mapping[Key, Value], key: Key) -> Value | None:
    """The value of a key, else that of the innermost table around it that has one."""
    return next((values[key[:n]] for n in range(len(key), 0, -1) if key[:n] in values), None)


def _key_path(location: tuple[str | int, ...], data: Any, missing: bool) -> Key:
    """Pydantic's location without its parts that are not keys of the file, such as the tags of unions."""
    key: list[str | int] = []
    for place, part in enumerate(location):
        inside = part in data if isinstance(data, dict) else False
        if isinstance(data, list) and isinstance(part, int):
            inside = part < len(data)
        if inside:
            data = data[part]
        elif not (missing and place == len(location) - 1):
            continue
        key.append(part)
    return tuple(key)


def _fields(model: type[BaseModel], key: Key) -> list[str]:
    """The names that the table at `key` of a `model` may have; of every member of a union."""
    models = [model]
    named = False  # the next part is a name that the file chooses, as in [students.NAME]
    for part in key:
        if isinstance(part, int) or named:
            named = False
            continue
        inner = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        named = any(get_origin(annotation) is dict for annotation in inner)
        models = [found for annotation in inner for found in _models(annotation)]
    return list(dict.fromkeys(f.alias or name for m in models for name, f in m.model_fields.items()))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models within an annotation such as `list[A] | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list, tuple, dict):
        return [found for inner in get_args(annotation) for found in _models(inner)]
    return []


def _override(data: dict[str, Any], override: str) -> Key:
    """Apply one `KEY=VALUE` to `data`; returns the key."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise BadInput(f"--set {override}: it must be KEY=VALUE", fix="for example --set steps=100")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text.strip()
    key: list[str | int] = []
    at: Any = data
    parts = name.strip().split(".")
    for part in parts:
        last = len(key) == len(parts) - 1
        place: Any = part
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise BadInput(f"--set {override}: {part} is not an index of a list of {len(at)} items (from 0)")
            place = int(part)
        elif not isinstance(at, dict):
            raise BadInput(f"--set {override}: {part} is below a value that is not a table")
        if last:
            at[place] = value
        else:
            at = at[place] if isinstance(at, list) else at.setdefault(place, {})
        key.append(place)
    return tuple(key)


def _near_file(path: Path) -> str | None:
    folder = path.parent
    names = [p.name for p in folder.glob("*.toml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else None
