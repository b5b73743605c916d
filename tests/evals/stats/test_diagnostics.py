"""Flips, McNemar's test and KL, compared with statsmodels and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS, compare_answers, find_flips
from limbeck.evals.stats.retention import pair_documents
from tests.evals.document_tables import documents


@pytest.mark.parametrize("counts", [(40, 9, 3, 8), (40, 0, 0, 8), (0, 5, 0, 0), (10, 6, 6, 1)])
def test_flips_and_mcnemar_equal_statsmodels(counts: tuple[int, int, int, int]) -> None:
    candidate, reference = np.repeat([1, 0, 1, 0], counts), np.repeat([1, 1, 0, 0], counts)
    found = compare_answers(pair_documents(documents("t", candidate), documents("t", reference), DIAGNOSTIC_COLUMNS))
    both, lost, won, neither = counts
    assert (found.right_to_wrong, found.wrong_to_right) == (lost, won)
    assert found.mcnemar_p == pytest.approx(mcnemar([[both, lost], [won, neither]], exact=True).pvalue)


def test_kl_is_from_the_reference_to_the_candidate() -> None:
    random = np.random.default_rng(0)
    candidate, reference = ([list(random.normal(size=size) - 20) for size in (2, 4, 3)] for _ in range(2))
    reference_table = documents("t", [1, 1, 1], choice_logprobs=reference)

    def kl(logprobs: list[list[float]]) -> float | None:
        candidate_table = documents("t", [1, 0, 1], choice_logprobs=logprobs)
        return compare_answers(pair_documents(candidate_table, reference_table, DIAGNOSTIC_COLUMNS)).kl

    def softmax(logprobs: list[float]) -> np.ndarray:
        return np.exp(logprobs) / np.exp(logprobs).sum()

    pairs = zip(reference, candidate, strict=True)
    assert kl(candidate) == pytest.approx(np.mean([stats.entropy(softmax(p), softmax(q)) for p, q in pairs]))
    assert kl(reference) == pytest.approx(0, abs=1e-12)


def test_unknown_answers_are_none() -> None:
    unknown = documents("t", [0.5, 1.2])
    known = documents("t", [1.5, 1.0], choice_logprobs=[[-1.0, -2.0]] * 2)
    differences = compare_answers(pair_documents(unknown, known, DIAGNOSTIC_COLUMNS))
    assert set(differences.model_dump().values()) == {None}
    other = documents("t", [0.7, 2.2])
    flip, _ = find_flips(pair_documents(unknown, other, DIAGNOSTIC_COLUMNS), 5)
    assert (flip.prompt_end, flip.target, flip.candidate_response, flip.reference_response) == (None,) * 4


def test_the_largest_differences_come_first() -> None:
    names = ["a", "a", "b", "b", "b"]
    candidate = documents(names, [1.0, 3.0, 0.0, 1.0, 1.0], response=["v", "w", "x", "y", "z"])
    reference = documents(names, [1.5, 1.0, 1.0, 1.0, 0.0], response=["V", "W", "X", "Y", "Z"], target=["1"] * 5)
    pairs = pair_documents(candidate, reference, DIAGNOSTIC_COLUMNS)
    assert [(flip.task, flip.doc_id) for flip in find_flips(pairs, 9)] == [("a", 1), ("a", 0), ("b", 2), ("b", 4)]
    assert [(flip.task, flip.doc_id) for flip in find_flips(pairs, 1)] == [("a", 1), ("b", 2)]
    first = find_flips(pairs, 1)[0]
    assert (first.candidate_value, first.reference_value) == (3.0, 1.0)
    assert (first.candidate_response, first.reference_response, first.target) == ("w", "W", "1")
    assert find_flips(pairs, 0) == []
