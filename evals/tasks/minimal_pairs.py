"""Minimal pairs of Python source, after BLiMP (Warstadt et al. 2020, arXiv 1912.00582).

A pair is a snippet and the same snippet broken by one rule, of equal length. `compile()` or the scopes of names
confirm that one is valid and the other broken.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import symtable
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from limbeck.registry.core.digest import text_digest

MIN_CHARACTERS, MAX_CHARACTERS = 30, 280  # of a snippet
CLOSING = ")]}"


class Pair(NamedTuple):
    """A valid snippet and a broken one."""

    good: str
    bad: str


class Source(NamedTuple):
    """What pairs are made from: a source file, parsed once for all rules.

    Attributes:
        snippets: (first line, last line, dedented source) of each statement of suitable length.
        names: of variables and parameters that the source binds.
    """

    snippets: list[tuple[int, int, str]]
    names: set[str]


def read_source(text: str) -> Source | None:
    """The statements of a source file; None if `text` is not Python source or has no statement."""
    try:
        tree = parse(text)
    except SyntaxError:
        return None
    return Source(list(_snippets(tree, text)), _bound_names(tree)) if tree.body else None


def make_pairs(source: Source, rule: str, max_pairs: int, seed: str) -> list[Pair]:
    """At most `max_pairs` pairs of one rule from a source file, from snippets that do not overlap.

    Args:
        rule: a key of RULES.
        seed: decides which snippets are chosen and where each is broken.
    """
    pairs: list[Pair] = []
    used_lines: set[int] = set()
    for first, last, snippet in sorted(source.snippets, key=lambda item: text_digest(f"{seed}:{item}")):
        lines = set(range(first, last + 1))
        if len(pairs) == max_pairs:
            break
        if used_lines & lines or not is_source(snippet):
            continue
        options = [bad for bad in RULES[rule](snippet, source.names) if is_broken(bad, snippet, rule)]
        if options:
            pairs.append(Pair(snippet, min(options, key=lambda bad: text_digest(f"{seed}:{bad}"))))
            used_lines |= lines
    return pairs


def parse(text: str) -> ast.Module:
    """The syntax tree of a source file. Raises SyntaxError if it is not Python source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or too deeply nested
        raise SyntaxError(str(error)) from error


def is_source(snippet: str) -> bool:
    """Whether `compile()` accepts the snippet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(snippet, "<snippet>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def is_broken(bad: str, good: str, rule: str) -> bool:
    """Whether `bad` breaks the rule: it does not compile, or for `undefined_name` has one more undefined name."""
    if rule != "undefined_name":
        return not is_source(bad)
    return is_source(bad) and len(undefined_names(bad) - undefined_names(good)) == 1


def undefined_names(source: str) -> set[str]:
    """Names that a snippet reads but neither binds nor imports, and that are not builtins."""
    top = symtable.symtable(source, "<snippet>", "exec")
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    free = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = list(top.get_children())
    while tables:
        table = tables.pop()
        tables += table.get_children()
        free |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        bound |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_declared_global()}
    return free - bound - set(dir(builtins))


def _snippets(tree: ast.Module, text: str) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, dedented source) of each statement of suitable length, docstrings excluded."""
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        last = node.end_lineno or node.lineno
        snippet = textwrap.dedent("\n".join(lines[first - 1 : last]))
        if MIN_CHARACTERS <= len(snippet) <= MAX_CHARACTERS and snippet.isascii():
            yield first, last, snippet


def _swapped_brackets(snippet: str, names: set[str]) -> Iterator[str]:
    """Replace one closing bracket with one of another kind."""
    for token in _tokens(snippet):
        if token.string in CLOSING:
            for other in CLOSING.replace(token.string, ""):
                yield _replace_span(snippet, token.start, token.end, other)


def _misplaced_keywords(snippet: str, names: set[str]) -> Iterator[str]:
    """Swap a keyword with the word after it."""
    tokens = _tokens(snippet)
    for token, after in pairwise(tokens):
        if not keyword.iskeyword(token.string) or token.start[0] != after.start[0]:
            continue
        if after.type in (tokenize.NAME, tokenize.NUMBER) and after.string != token.string:
            between = snippet.splitlines()[token.start[0] - 1][token.end[1] : after.start[1]]
            yield _replace_span(snippet, token.start, after.end, after.string + between + token.string)


def _use_undefined_names(snippet: str, names: set[str]) -> Iterator[str]:
    """Replace one use of a local name with a name of equal length from elsewhere in the file."""
    tree = ast.parse(snippet)
    used = {token.string for token in _tokens(snippet)}
    others = sorted(names - used - set(dir(builtins)))
    local = _bound_names(tree) - {"self", "cls"}
    lines = snippet.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local:
            start, end = (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.id))
            # Before Python 3.12 the positions of names inside f-strings are wrong.
            if lines[node.lineno - 1][start[1] : end[1]] == node.id:
                yield from (_replace_span(snippet, start, end, name) for name in others if len(name) == len(node.id))


def _wrong_indentations(snippet: str, names: set[str]) -> Iterator[str]:
    """Swap the indentations of two consecutive lines, the snippet's first line excepted."""
    lines = snippet.splitlines()
    for index in range(1, len(lines) - 1):
        first, second = (line.lstrip() for line in lines[index : index + 2])
        if first and second:
            indents = [line[: len(line) - len(line.lstrip())] for line in lines[index : index + 2]]
            if indents[0] != indents[1]:
                swapped = [indents[1] + first, indents[0] + second]
                yield "\n".join(lines[:index] + swapped + lines[index + 2 :])


# rule -> yields every way to break a snippet; some may leave it valid (see `is_broken`)
RULES: dict[str, Callable[[str, set[str]], Iterator[str]]] = {
    "swapped_bracket": _swapped_brackets,
    "misplaced_keyword": _misplaced_keywords,
    "undefined_name": _use_undefined_names,
    "wrong_indentation": _wrong_indentations,
}


def _bound_names(tree: ast.AST) -> set[str]:
    """Names of variables and parameters that the source binds."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def _tokens(snippet: str) -> list[tokenize.TokenInfo]:
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    return [t for t in tokenize.generate_tokens(io.StringIO(snippet).readline) if t.type not in layout]


def _replace_span(snippet: str, start: tuple[int, int], end: tuple[int, int], new: str) -> str:
    """The snippet with a span of one line replaced; positions are (line from 1, column from 0)."""
    lines = snippet.splitlines()
    line = lines[start[0] - 1]
    lines[start[0] - 1] = line[: start[1]] + new + line[end[1] :]
    return "\n".join(lines)
