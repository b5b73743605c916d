"""Filters a teacher's answers by length, ending, repetition, regular expression, verifier and log-probability."""

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

# (prompt, answer, row of the table) -> whether the answer is right
Verifier = Callable[[Any, str, Mapping[str, Any]], bool]

NGRAM = 4
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?|-?\.\d+")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
THINK_END = "</think>"


class Answer(NamedTuple):
    """What a teacher wrote for one prompt.

    Attributes:
        tokens: its length, without the token that ends it.
        finished: whether it ended by itself, not at max_new_tokens.
        logprob: mean log-probability per token under the teacher, in nats; None if unknown.
        input_tokens: tokens that an endpoint read, as it counts them; else 0.
        output_tokens: tokens that an endpoint wrote, as it counts them; else 0.
        seconds: time of a local teacher; of a batch, the answer's share.
    """

    text: str
    tokens: int
    finished: bool
    logprob: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


class AnswerFilter:
    """Applies the filters of a recipe, and counts what each drops.

    Args:
        rules: `[generate.filter]`.
        recipe_folder: searched for the module of a verifier.

    Raises:
        BadInput: a verifier that cannot be imported.
    """

    def __init__(self, rules: Filter, recipe_folder: Path) -> None:
        self.rules = rules
        self.verifier = _load_verifier(rules, recipe_folder)
        self.dropped: Counter[str] = Counter()  # by the first filter that failed
        self.kept_count = 0

    def keeps(self, prompt: Any, answer: Answer, row: Mapping[str, Any]) -> bool:
        """Whether an answer passes all filters. Counts it."""
        failed = self._failed_filter(prompt, answer, row)
        if failed is None:
            self.kept_count += 1
        else:
            self.dropped[failed] += 1
        return failed is None

    def check(self, row: Mapping[str, Any], row_name: str) -> None:
        """Raise BadInput if a row has no right answer for the verifier to compare with."""
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
                fix="leave the row out, or write your own verifier: package.module:function",
            )

    def _failed_filter(self, prompt: Any, answer: Answer, row: Mapping[str, Any]) -> str | None:
        """The first filter that an answer fails, in the order below; None if it passes all."""
        rules = self.rules
        passes: dict[str, Callable[[], bool]] = {
            "min_tokens": lambda: answer.tokens >= rules.min_tokens and answer.text.strip() != "",
            "max_tokens": lambda: rules.max_tokens is None or answer.tokens <= rules.max_tokens,
            "finished": lambda: answer.finished or not rules.finished,
            "max_repetition": lambda: rules.max_repetition >= 1 or repetition(answer.text) <= rules.max_repetition,
            "regex": lambda: rules.regex is None or re.search(rules.regex, answer.text, re.DOTALL) is not None,
            "min_logprob": lambda: rules.min_logprob is None or _logprob(answer) >= rules.min_logprob,
            "verifier": lambda: self._passes_verifier(prompt, answer.text, row),
        }
        return next((name for name, check in passes.items() if not check()), None)

    def _passes_verifier(self, prompt: Any, answer: str, row: Mapping[str, Any]) -> bool:
        if self.verifier is None:
            return True
        try:
            return bool(self.verifier(prompt, answer, row))
        except Exception as error:  # the recipe's own code can raise anything
            raise BadInput(
                f"generate.filter.verifier {self.rules.verifier!r} failed on an answer: "
                f"{type(error).__name__}: {error}; the answer begins {answer[:80]!r}"
            ) from error

    def summary(self) -> str:
        """A line with how many answers were kept, and how many each filter dropped."""
        total = self.kept_count + self.dropped.total()
        dropped = ", ".join(f"{count} by {name}" for name, count in self.dropped.most_common())
        return f"{self.kept_count} of {total} answers kept" + (f"; dropped: {dropped}" if dropped else "")


def _logprob(answer: Answer) -> float:
    if answer.logprob is None:
        raise BadInput(
            "generate.filter.min_logprob needs log-probabilities, and the teacher returned an answer without them",
            fix="leave min_logprob out, or use a server that returns them",
        )
    return answer.logprob


def repetition(text: str) -> float:
    """The share of a text's 4-grams (of words and punctuation marks) that repeat an earlier one."""
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def final_answer(text: str) -> str | None:
    """The final answer of a solution; None if it has none.

    The text after the last `####` (GSM8K), else the content of the last `\\boxed{}` (MATH), else the last number.
    Ignores reasoning up to `</think>`.
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
    """Whether two final answers are equal: as numbers if both are numbers, else as text."""
    if answer is None or expected is None:
        return False
    ours, theirs = _number(answer), _number(expected)
    if ours is not None and theirs is not None:
        return ours == theirs
    return _plain(answer) == _plain(expected)


def _boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, which may contain braces; None if there is none."""
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
    """The only number in a text such as `$1,234.50`, `42 apples`, `\\frac{1}{2}`, `-3/4`; None if there is not one."""
    found = NUMBER.findall(FRACTION.sub(r"\1/\2", text.replace("\\!", "")))
    if len(found) != 1:
        return None
    numerator, _, denominator = found[0].replace(",", "").partition("/")
    try:
        return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return "".join(text.split()).strip("$.").lower()


def _load_verifier(rules: Filter, recipe_folder: Path) -> Verifier | None:
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
            fix=f"set final_answer or package.module:function; {recipe_folder} and {Path.cwd()} are searched too",
        ) from error
    if not callable(found):
        raise BadInput(f"generate.filter.verifier {rules.verifier!r} is not a function")
    return found  # type: ignore[no-any-return]


@contextmanager
def _importable(recipe_folder: Path) -> Any:
    """Let modules beside the recipe and in the current folder be imported."""
    before = list(sys.path)
    sys.path[:0] = [str(recipe_folder), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before
