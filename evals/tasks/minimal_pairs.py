"""Minimal pairs of Python source, in the manner of BLiMP (Warstadt et al. 2020, arXiv 1912.00582).

A pair is a snippet and the same snippet broken by one rule, of the same length. That the one is right and the
other wrong is checked with `compile()` or by the scopes of its names.
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

SHORTEST, LONGEST = 30, 280  # characters of a snippet
CLOSING = ")]}"


class Pair(NamedTuple):
    """A right snippet, and a broken one."""

    good: str
    bad: str


def make_pairs(text: str, rule: str, max_pairs: int, seed: str) -> list[Pair]:
    """At most `max_pairs` pairs of one rule from a source file, from places that do not overlap.

    Args:
        rule: a key of RULES. seed: what decides which snippets are taken and where each is broken.

    Raises:
        SyntaxError: `text` is no Python source.
    """
    tree = parse(text)
    found: list[Pair] = []
    taken: set[int] = set()
    names = _bound_names(tree)
    for first, last, snippet in sorted(_snippets(tree, text), key=lambda item: text_digest(f"{seed}:{item}")):
        lines = set(range(first, last + 1))
        if len(found) == max_pairs:
            break
        if taken & lines or not is_source(snippet):
            continue
        options = [bad for bad in RULES[rule](snippet, names) if is_broken(bad, snippet, rule)]
        if options:
            found.append(Pair(snippet, min(options, key=lambda bad: text_digest(f"{seed}:{bad}"))))
            taken |= lines
    return found


def parse(text: str) -> ast.Module:
    """The syntax tree of a source file. Raises SyntaxError where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or nested too deep
        raise SyntaxError(str(error)) from error


def is_source(snippet: str) -> bool:
    """Whether `compile()` takes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(snippet, "<snippet>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def is_broken(bad: str, good: str, rule: str) -> bool:
    """Whether `bad` is wrong in the way of the rule: no source, or a name that `good` defines is undefined."""
    if rule != "undefined_name":
        return not is_source(bad)
    return is_source(bad) and len(undefined_names(bad) - undefined_names(good)) == 1


def undefined_names(source: str) -> set[str]:
    """Names that a snippet reads, but neither binds nor imports, and that are no builtins."""
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
    """(first line, last line, source moved to the left margin) of each statement of a fitting length."""
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        last = node.end_lineno or node.lineno
        snippet = textwrap.dedent("\n".join(lines[first - 1 : last]))
        if SHORTEST <= len(snippet) <= LONGEST and snippet.isascii():
            yield first, last, snippet


def _swapped_brackets(snippet: str, names: set[str]) -> Iterator[str]:
    """A closing bracket becomes one of another kind."""
    for token in _tokens(snippet):
        if token.string in CLOSING:
            for other in CLOSING.replace(token.string, ""):
                yield _replace_span(snippet, token.start, token.end, other)


def _misplaced_keywords(snippet: str, names: set[str]) -> Iterator[str]:
    """A keyword changes places with the word after it."""
    tokens = _tokens(snippet)
    for token, after in pairwise(tokens):
        if not keyword.iskeyword(token.string) or token.start[0] != after.start[0]:
            continue
        if after.type in (tokenize.NAME, tokenize.NUMBER) and after.string != token.string:
            between = snippet.splitlines()[token.start[0] - 1][token.end[1] : after.start[1]]
            yield _replace_span(snippet, token.start, after.end, after.string + between + token.string)


def _use_undefined_names(snippet: str, names: set[str]) -> Iterator[str]:
    """One use of a local name becomes a name that the file has elsewhere, of the same length."""
    tree = ast.parse(snippet)
    used = {token.string for token in _tokens(snippet)}
    others = sorted(names - used - set(dir(builtins)))
    local = _bound_names(tree) - {"self", "cls"}
    lines = snippet.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local:
            start, end = (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.id))
            # The places of names within f-strings are not to be trusted before Python 3.12.
            if lines[node.lineno - 1][start[1] : end[1]] == node.id:
                yield from (_replace_span(snippet, start, end, name) for name in others if len(name) == len(node.id))


def _wrong_indentations(snippet: str, names: set[str]) -> Iterator[str]:
    """Two lines, one after the other, change their indentations. The first line stays at the margin."""
    lines = snippet.splitlines()
    for index in range(1, len(lines) - 1):
        first, second = (line.lstrip() for line in lines[index : index + 2])
        if first and second:
            indents = [line[: len(line) - len(line.lstrip())] for line in lines[index : index + 2]]
            if indents[0] != indents[1]:
                swapped = [indents[1] + first, indents[0] + second]
                yield "\n".join(lines[:index] + swapped + lines[index + 2 :])


# rule -> gives every way to break a snippet, some of which may leave it right
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
    """The snippet with what is between two places (line from 1, column from 0) of one line replaced."""
    lines = snippet.splitlines()
    line = lines[start[0] - 1]
    lines[start[0] - 1] = line[: start[1]] + new + line[end[1] :]
    return "\n".join(lines)
