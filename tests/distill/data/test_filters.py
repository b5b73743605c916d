"""Filters of a teacher's answers: what each one drops, the report, and the verifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.distill.data.filters import Answer, AnswerFilter, final_answer, repetition, same_answer
from limbeck.distill.recipe.schema import Filter
from limbeck.registry.core.errors import BadInput

GOOD = Answer("Two and two are four.\n#### 4", tokens=9, finished=True, logprob=-0.5)


def make_filter(recipe_folder: Path = Path(), **rules: Any) -> AnswerFilter:
    return AnswerFilter(Filter(**rules), recipe_folder)


@pytest.mark.parametrize(
    ("rules", "change", "reason"),
    [
        ({}, {}, None),
        ({}, {"text": " \n", "tokens": 2}, "min_tokens"),
        ({"min_tokens": 10}, {}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 9}, {}, None),
        ({"max_tokens": 8}, {}, "max_tokens"),
        ({}, {"finished": False}, "finished"),
        ({"finished": False}, {"finished": False}, None),
        ({"regex": r"####\s*\d+$"}, {}, None),
        ({"regex": r"^####"}, {}, "regex"),
        ({"regex": r"two.*####"}, {"text": "two\n#### 4"}, None),
        ({"min_logprob": -0.5}, {}, None),
        ({"min_logprob": -0.4}, {}, "min_logprob"),
        ({"max_repetition": 0.4}, {"text": "a b c d a b c d a b c d"}, "max_repetition"),
        ({"max_repetition": 0.6}, {"text": "a b c d a b c d a b c d"}, None),
        ({"verifier": "final_answer", "answer_column": "a"}, {}, None),
        ({"verifier": "final_answer", "answer_column": "a"}, {"text": "It is 5."}, "verifier"),
    ],
)
def test_each_filter(rules: dict[str, Any], change: dict[str, Any], reason: str | None) -> None:
    answer_filter = make_filter(**rules)
    assert answer_filter.keeps("2 + 2?", GOOD._replace(**change), {"a": "#### 4.0"}) == (reason is None)
    assert dict(answer_filter.dropped) == ({reason: 1} if reason else {})
    assert answer_filter.kept_count == (reason is None)


def test_a_dropped_answer_counts_for_the_first_filter_it_fails() -> None:
    answer_filter = make_filter(max_tokens=5, regex="x")
    for answer in (
        GOOD,
        GOOD,
        GOOD._replace(tokens=3),
        GOOD._replace(tokens=3, text="x"),
        GOOD._replace(finished=False),
    ):
        answer_filter.keeps("", answer, {})
    assert answer_filter.summary() == "1 of 5 answers kept; dropped: 3 by max_tokens, 1 by regex"


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    # a b c d | b c d a | c d a b | d a b c | a b c d: the last repeats the first.
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c d e f g h") == 0
    assert repetition("a b c") == 0
    assert repetition("no " * 100) == pytest.approx(96 / 97)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 7 is 42.\n#### 42", "42"),
        ("#### 1\nno, rather\n#### 1,234 dollars\n", "1,234 dollars"),
        ("so it is \\boxed{42}", "42"),
        ("\\boxed{1} and then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is $1,234.50.", "1,234.50"),
        ("<think>it is 7, no, #### 9</think>It is 8", "8"),
        ("<think>it is 7</think>I do not know", None),
        ("nothing", None),
        ("####", None),
        ("\\boxed{4", "4"),
    ],
)
def test_the_final_answer_of_a_solution(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "wanted", "equal"),
    [
        ("42", "42.0", True),
        ("$1,234.50", "1234.5", True),
        ("42 apples", "42", True),
        ("\\frac{1}{2}", "0.5", True),
        ("-3/4", "-0.75", True),
        ("42", "43", False),
        ("-42", "42", False),
        ("x + 1", " X+1 ", True),
        ("x + 1", "x + 2", False),
        ("3 and 4", "3", False),
        ("1/0", "1", False),
        (None, "1", False),
        ("1", None, False),
    ],
)
def test_final_answers_are_compared_as_numbers(given: str | None, wanted: str | None, equal: bool) -> None:
    assert same_answer(given, wanted) == equal


def test_a_custom_verifier_is_imported_from_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own_checks.py").write_text(
        "def is_upper(prompt, answer, row):\n    return answer == prompt.upper() + row['end']\n"
        "def fails(prompt, answer, row):\n    raise RuntimeError('no such word')\n"
        "number = 3\n"
    )
    answer_filter = make_filter(tmp_path, verifier="own_checks:is_upper")
    assert answer_filter.keeps("yes", GOOD._replace(text="YES!"), {"end": "!"})
    assert not answer_filter.keeps("yes", GOOD._replace(text="YES!"), {"end": "?"})
    with pytest.raises(BadInput, match=r"own_checks:fails.*RuntimeError: no such word.*begins 'Two"):
        make_filter(tmp_path, verifier="own_checks:fails").keeps("", GOOD, {})
    for name in ("own_checks:number", "own_checks:none", "no_such_module_here:f", "own_checks"):
        with pytest.raises(BadInput, match=f"verifier '{name}'"):
            make_filter(tmp_path, verifier=name)


def test_a_row_without_a_right_answer_is_an_error(tmp_path: Path) -> None:
    answer_filter = make_filter(verifier="final_answer", answer_column="solution")
    answer_filter.check({"solution": "it is 4"}, "row 1")
    with pytest.raises(BadInput, match=r"row 2 has no 'solution'.*\n.*its columns are: answer"):
        answer_filter.check({"answer": "4"}, "row 2")
    with pytest.raises(BadInput, match="row 3: 'solution' has no final answer"):
        answer_filter.check({"solution": "many"}, "row 3")
    make_filter(regex="x").check({}, "row 4")


def test_min_logprob_needs_log_probabilities() -> None:
    with pytest.raises(BadInput, match="returned an answer without them"):
        make_filter(min_logprob=-1.0).keeps("", GOOD._replace(logprob=None), {})


@pytest.mark.parametrize("rules", [{"regex": "("}, {"verifier": "final_answer"}])
def test_filters_with_a_mistake_are_refused(rules: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"regular expression|answer_column"):
        Filter(**rules)
