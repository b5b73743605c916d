"""Flips, McNemar and KL against statsmodels and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS, compare_answers, find_flips
from limbeck.evals.stats.retention import pair_documents
from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA


def table(values: Any, logprobs: Any = None, **more: Any) -> pa.Table:
    """Documents as a scorecard keeps them."""
    count = len(values)
    columns = {
        "task": ["t"] * count,
        "doc_id": list(range(count)),
        "doc_hash": [f"d{i}" for i in range(count)],
        "prompt_hash": [f"p{i}" for i in range(count)],
        "metric": ["acc"] * count,
        "value": [float(value) for value in values],
        "weight": [1.0] * count,
        "cluster": [f"t:{i}" for i in range(count)],
        "choice_logprobs": logprobs,
    } | more
    return pa.table(
        {name: pa.array(columns.get(name) or [None] * count, of) for name, of in zip(*fields(), strict=True)}
    )


def fields() -> tuple[list[str], list[pa.DataType]]:
    return DOCUMENT_SCHEMA.names, DOCUMENT_SCHEMA.types


@pytest.mark.parametrize("counts", [(40, 9, 3, 8), (40, 0, 0, 8), (0, 5, 0, 0), (10, 6, 6, 1)])
def test_flips_and_mcnemar(counts: tuple[int, int, int, int]) -> None:
    candidate, reference = np.repeat([1, 0, 1, 0], counts), np.repeat([1, 1, 0, 0], counts)
    found = compare_answers(pair_documents(table(candidate), table(reference), DIAGNOSTIC_COLUMNS))
    both, lost, won, neither = counts
    assert (found.right_to_wrong, found.wrong_to_right) == (lost, won)
    assert found.mcnemar_p == pytest.approx(mcnemar([[both, lost], [won, neither]], exact=True).pvalue)


def test_kl_is_from_the_reference_to_the_candidate() -> None:
    random = np.random.default_rng(0)
    of = [[list(random.normal(size=size) - 20) for size in (2, 4, 3)] for _ in range(2)]
    found = compare_answers(pair_documents(table([1, 0, 1], of[0]), table([1, 1, 1], of[1]), DIAGNOSTIC_COLUMNS))
    softmax = [[np.exp(x) / np.exp(x).sum() for x in each] for each in of]
    expected = np.mean([stats.entropy(p, q) for q, p in zip(*softmax, strict=True)])
    assert found.kl == pytest.approx(expected)
    same = compare_answers(pair_documents(table([1, 0, 1], of[0]), table([1, 0, 1], of[0]), DIAGNOSTIC_COLUMNS))
    assert same.kl == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_told_is_null() -> None:
    old = table([0.5, 1.2]).drop_columns(["target", "response", "choice_logprobs", "choice_lengths", "prompt_end"])
    found = compare_answers(pair_documents(old, table([1.5, 1.0], [[-1.0, -2.0]] * 2), DIAGNOSTIC_COLUMNS))
    assert set(found.model_dump().values()) == {None}
    (flip, _) = find_flips(pair_documents(old, old.set_column(5, "value", pa.array([0.7, 2.2])), DIAGNOSTIC_COLUMNS), 5)
    assert (flip.prompt_end, flip.target, flip.candidate_response, flip.reference_response) == (None,) * 4


def test_the_largest_differences_come_first() -> None:
    names = ["a", "a", "b", "b", "b"]
    ours = table([1.0, 3.0, 0.0, 1.0, 1.0], task=names, response=["v", "w", "x", "y", "z"])
    theirs = table([1.5, 1.0, 1.0, 1.0, 0.0], task=names, response=["V", "W", "X", "Y", "Z"], target=["1"] * 5)
    pairs = pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS)
    assert [(flip.task, flip.doc_id) for flip in find_flips(pairs, 9)] == [("a", 1), ("a", 0), ("b", 2), ("b", 4)]
    assert [(flip.task, flip.doc_id) for flip in find_flips(pairs, 1)] == [("a", 1), ("b", 2)]
    first = find_flips(pairs, 1)[0]
    assert (first.candidate_value, first.reference_value) == (3.0, 1.0)
    assert (first.candidate_response, first.reference_response, first.target) == ("w", "W", "1")
    assert find_flips(pairs, 0) == []
