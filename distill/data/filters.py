"""Which of a teacher's answers are kept: by length, ending, repetition, a pattern, a verifier, their likelihood."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.distill.recipe.schema import Filter
from limbeck.registry.core.errors import BadInput

# (prompt, answer, row of the data) -> whether the answer is right
Verifier = Callable[[Any, str, Mapping[str, Any]], bool]

GRAM = 4
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?|-?\.\d+")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
THINK_END = "</think>"


class Answer(NamedTuple):
    """What a teacher wrote for one prompt.

    Attributes:
        tokens: how many it took, the one that ends it not counted.
        finished: whether it ended by itself, not at max_new_tokens.
        logprob: mean log-probability of a token under the teacher, in nats; None where it is not known.
        input_tokens, output_tokens: what a teacher behind an API was sent and gave, as it counts them; else 0.
        seconds: that a local teacher took; of a batch, its share.
    """

    text: str
    tokens: int
    finished: bool
    logprob: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


class AnswerFilter:
    """The filters of a recipe, in the order of its keys.

    Args:
        beside: the recipe's folder, where a verifier's module may lie.

    Raises:
        BadInput: a verifier that cannot be imported.
    """

    def __init__(self, rules: Filter, recipe_folder: Path) -> None:
        self.rules = rules
        self.verifier = _verifier(rules, recipe_folder)
        self.dropped: Counter[str] = Counter()  # by the first filter that said no
        self.kept_count = 0

    def keeps(self, prompt: Any, answer: Answer, row: Mapping[str, Any]) -> bool:
        """Whether an answer stays; counted."""
        if (reason := self._failed_filter(prompt, answer, row)) is None:
            self.kept_count += 1
            return True
        self.dropped[reason] += 1
        return False

    def check(self, row: Mapping[str, Any], row_name: str) -> None:
        """Raises BadInput where the verifier would find nothing in a row to compare an answer with."""
        if self.rules.answer_column is None:
            return
        if row.get(self.rules.answer_column) is None:
            raise BadInput(
                f"{row_name} has no {self.rules.answer_column!r}, which generate.filter.answer_column names",
                fix=f"its columns are: {', '.join(row)}",
            )
        if self.rules.verifier == "final_answer" and final_answer(str(row[self.rules.answer_column])) is None:
            raise BadInput(
                f"{row_name}: {self.rules.answer_column!r} has no final answer: no '#### 42', \\boxed{{42}} or number",
                fix="leave the row out, or give a verifier of your own: package.module:function",
            )

    def _failed_filter(self, prompt: Any, answer: Answer, row: Mapping[str, Any]) -> str | None:
        """The first filter that an answer fails."""
        rules = self.rules
        if answer.tokens < rules.min_tokens or not answer.text.strip():
            return "min_tokens"
        if rules.max_tokens is not None and answer.tokens > rules.max_tokens:
            return "max_tokens"
        if rules.finished and not answer.finished:
            return "finished"
        if rules.max_repetition < 1 and repetition(answer.text) > rules.max_repetition:
            return "max_repetition"
        if rules.regex is not None and not re.search(rules.regex, answer.text, re.DOTALL):
            return "regex"
        if rules.min_logprob is not None:
            if answer.logprob is None:
                raise BadInput(
                    "generate.filter.min_logprob needs log-probabilities and the teacher gave none with an answer",
                    fix="leave min_logprob out, or take a server that gives them",
                )
            if answer.logprob < rules.min_logprob:
                return "min_logprob"
        if self.verifier is not None and not self._passes_verifier(prompt, answer.text, row):
            return "verifier"
        return None

    def _passes_verifier(self, prompt: Any, answer: str, row: Mapping[str, Any]) -> bool:
        assert self.verifier is not None
        try:
            return bool(self.verifier(prompt, answer, row))
        except Exception as error:  # the recipe's own code can raise anything
            raise BadInput(
                f"generate.filter.verifier {self.rules.verifier!r} failed on an answer: "
                f"{type(error).__name__}: {error}; the answer begins {answer[:80]!r}"
            ) from error

    def summary(self) -> str:
        """What was kept and what each filter dropped, in words."""
        total = self.kept_count + self.dropped.total()
        dropped = ", ".join(f"{count} by {name}" for name, count in self.dropped.most_common())
        return f"{self.kept_count} of {total} answers kept" + (f"; dropped: {dropped}" if dropped else "")


def repetition(text: str) -> float:
    """The share of a text's 4-grams of words and marks that came before in it."""
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def final_answer(text: str) -> str | None:
    """The answer that a solution comes to; None where it comes to none.

    What follows the last `####` (GSM8K), else what the last `\\boxed{}` holds (MATH), else the last number. Of
    reasoning between `<think>` and `</think>` nothing counts.
    """
    text = text.rpartition(THINK_END)[2]
    if "####" in text:
        after = text.rpartition("####")[2].strip()
        return after.splitlines()[0].strip() if after else None
    if boxed := _boxed(text):
        return boxed
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_answer(answer: str | None, expected: str | None) -> bool:
    """Whether two final answers are equal: as numbers where both are, else letter by letter."""
    if answer is None or expected is None:
        return False
    ours, theirs = _number(answer), _number(expected)
    if ours is not None and theirs is not None:
        return ours == theirs
    return _plain(answer) == _plain(expected)


def _boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` holds, braces within it counted."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None


def _number(text: str) -> Fraction | None:
    """The one number that a text is about: `$1,234.50`, `42 apples`, `\\frac{1}{2}`, `-3/4`; None if not one."""
    found = NUMBER.findall(FRACTION.sub(r"\1/\2", text.replace("\\!", "")))
    if len(found) != 1:
        return None
    above, _, below = found[0].replace(",", "").partition("/")
    try:
        return Fraction(above.strip()) / Fraction(below.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return "".join(text.split()).strip("$.").lower()


def _verifier(rules: Filter, recipe_folder: Path) -> Verifier | None:
    if rules.verifier is None:
        return None
    if rules.verifier == "final_answer":
        column = rules.answer_column or ""
        return lambda prompt, answer, row: same_answer(final_answer(answer), final_answer(str(row[column])))
    module, _, name = rules.verifier.partition(":")
    try:
        with _importable(recipe_folder):
            found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the recipe's own code
        raise BadInput(
            f"generate.filter.verifier {rules.verifier!r} cannot be imported: {type(error).__name__}: {error}",
            fix=f"give final_answer or package.module:function; {recipe_folder} and {Path.cwd()} are looked in too",
        ) from error
    if not callable(found):
        raise BadInput(f"generate.filter.verifier {rules.verifier!r} is no function")
    return found  # type: ignore[no-any-return]


@contextmanager
def _importable(recipe_folder: Path) -> Any:
    """Modules beside the recipe and here can be imported within."""
    before = list(sys.path)
    sys.path[:0] = [str(recipe_folder), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before
