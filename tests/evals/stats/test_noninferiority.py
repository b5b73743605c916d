"""Non-inferiority tests, compared with scipy and statsmodels, and by simulation: how often do worse students pass?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from limbeck.evals.stats.estimates import Difference, average_differences, clustered_difference
from limbeck.evals.stats.noninferiority import (
    SIGNIFICANCE_LEVEL,
    Margins,
    correct_over_candidates,
    holm_adjusted_p_values,
    noninferiority_test,
)
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Noninferiority


def run_test(
    found: Difference, margin: float, *, higher_is_better: bool = True, documents: int = 100, clusters: int = 100
) -> Noninferiority:
    return noninferiority_test(found, margin, higher_is_better=higher_is_better, documents=documents, clusters=clusters)


def difference_of(candidate: np.ndarray, reference: np.ndarray, clusters: np.ndarray | None = None) -> Difference:
    count = len(candidate)
    return clustered_difference(
        candidate, reference, np.ones(count), np.arange(count) if clusters is None else clusters
    )


def test_independent_documents_without_skewness_equal_a_one_sided_t_test() -> None:
    """One to two documents like the worst are added to the bound."""
    random = np.random.default_rng(0)
    reference, half = random.normal(size=60), 0.5 * random.normal(size=30)
    difference = -0.1 + np.concatenate([half, -half])
    share = half.max() ** 2 / (2 * half @ half) if half.max() > -half.min() else half.min() ** 2 / (2 * half @ half)
    step = np.abs(half).max() / 60 / np.sqrt(1 - 1 / 60) * (1 + min(1, 4 * share))
    for margin in (0.05, 0.2, 0.5):
        expected = stats.ttest_1samp(difference - step, -margin, alternative="greater")
        found = run_test(difference_of(reference + difference, reference), margin)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.lower == pytest.approx(expected.confidence_interval(0.95).low, rel=1e-9)
        less = stats.ttest_1samp(difference + step, -margin, alternative="less")
        assert found.upper == pytest.approx(less.confidence_interval(0.95).high, rel=1e-9)
        assert (found.uncorrected == "pass") == (expected.pvalue < 0.05)
        assert (found.uncorrected == "fail") == (less.pvalue < 0.05)


def test_the_bound_of_skewed_scores_is_that_of_hall() -> None:
    """Hall 1992, by his formula for n documents, and Student's t on the side that the skewness makes narrower."""
    worse = np.random.default_rng(3).lognormal(size=80)
    found = difference_of(worse, np.zeros(80))
    n, g, s, t = 80, stats.skew(worse), worse.std(ddof=1), stats.t.ppf(0.95, 79)
    inverse = 3 / g * (np.cbrt(1 + g * (-t / np.sqrt(n) - g / (6 * n))) - 1)
    share = (worse.max() - worse.mean()) ** 2 / ((worse - worse.mean()) ** 2).sum()
    above, below = worse.max() - worse.mean(), worse.mean() - worse.min()
    step = above / n / np.sqrt(1 - 1 / n) * (1 + min(1, 4 * share))
    low, high = found.bounds(0.95)
    assert high == pytest.approx(worse.mean() - s * inverse + step, rel=0.01)  # g has another small-sample factor
    assert worse.mean() - low == pytest.approx(t * s / np.sqrt(n) + below / n, rel=0.01)
    assert found.negate().p_value_above(-high) == pytest.approx(0.05)
    assert found.p_value_above(low) == pytest.approx(0.05)


@pytest.mark.parametrize("losses", ["log-normal", "log-normal, wide", "Pareto 2.1", "a tenth of the documents"])
def test_skewed_losses_pass_at_the_margin_at_most_7_percent_of_the_time(losses: str) -> None:
    random, sets = np.random.default_rng(7), 1000
    rates = {}
    for clusters, size in ((100, 1), (300, 1), (100, 3)):
        codes = np.repeat(np.arange(clusters), size)
        passed = 0
        for _ in range(sets):
            loss, mean = draw_losses(random, losses, clusters)
            found = difference_of(np.repeat(loss, size), np.zeros(clusters * size), codes)
            passed += run_test(found, mean, higher_is_better=False).verdict == "pass"
        rates[clusters, size] = passed / sets
    assert max(rates.values()) <= 0.07, rates


def draw_losses(random: np.random.Generator, kind: str, count: int) -> tuple[np.ndarray, float]:
    """(count,) differences in bits per byte, with rare large ones, and their true mean."""
    if kind == "log-normal":
        return random.lognormal(size=count), float(np.exp(0.5))
    if kind == "log-normal, wide":
        return random.lognormal(sigma=1.5, size=count), float(np.exp(1.125))
    if kind == "Pareto 2.1":
        return random.pareto(2.1, count), 1 / 1.1
    rare = random.random(count) < 0.1
    return np.where(rare, random.lognormal(size=count), 0.1 * random.normal(size=count)), 0.1 * float(np.exp(0.5))


def test_a_difference_that_few_documents_carry_is_inconclusive() -> None:
    """Ten bits per byte worse on two documents of two hundred, and no difference on the others."""
    worse = 0.01 * np.random.default_rng(2).normal(size=200)
    worse[:2] = 10.0
    found = run_test(difference_of(worse, np.zeros(200)), 0.75, higher_is_better=False)
    assert found.uncorrected == "inconclusive"
    assert found.carried_by_few == pytest.approx(1, abs=0.02)
    # Even twice as far away is within this margin.
    assert run_test(difference_of(worse, np.zeros(200)), 3.0, higher_is_better=False).uncorrected == "pass"


def test_lower_is_better_is_the_same_test_with_opposite_signs() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=40), random.normal(size=40)
    higher, lower = run_test(difference_of(a, b), 0.3), run_test(difference_of(-a, -b), 0.3, higher_is_better=False)
    assert lower.model_dump() == pytest.approx(higher.model_dump())
    worse = run_test(difference_of(b + 1.0, b + 0.01 * a), 0.3, higher_is_better=False)  # one bit per byte more
    assert worse.uncorrected == "fail"


def binary(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Candidate and reference with these counts: both right, right to wrong, wrong to right, both wrong."""
    return np.repeat([1.0, 0, 1, 0], counts), np.repeat([1.0, 1, 0, 0], counts)


@pytest.mark.parametrize("lost", [0, 1, 4])
def test_if_answers_only_get_worse_the_bound_is_that_of_wilson(lost: int) -> None:
    count = 200
    found = run_test(difference_of(*binary((150 - lost, lost, 0, 50))), 0.05)
    # One more document for the steps; the level is that of t with 199 degrees of freedom.
    alpha = 2 * stats.norm.sf(stats.t.ppf(0.95, count - 1))
    _, high = proportion_confint(lost + 1, count, alpha, method="wilson")
    assert found.lower == pytest.approx(-high, rel=1e-9)


def test_a_few_documents_without_a_change_are_inconclusive() -> None:
    same = binary((30, 0, 0, 10))
    found = run_test(difference_of(*same), 0.01)
    assert found.uncorrected == "inconclusive"
    assert found.lower < -0.01
    assert run_test(difference_of(*binary((3000, 0, 0, 1000))), 0.01).uncorrected == "pass"
    # Two files are less evidence; if all answers are right, the correlation within a file is unknown.
    files = np.repeat([0, 1], 1000)
    assert run_test(difference_of(np.ones(2000), np.ones(2000), files), 0.01).uncorrected == "inconclusive"


def test_repeated_documents_add_nothing() -> None:
    once = binary((150, 12, 4, 34))
    repeated = difference_of(*(np.repeat(side, 20) for side in once), np.repeat(np.arange(200), 20))
    expected = difference_of(*once).bounds(0.95)
    assert repeated.bounds(0.95) == pytest.approx(expected, abs=5e-4)  # the design effect is estimated


def test_the_verdict_agrees_with_the_p_value_and_with_the_bounds() -> None:
    random = np.random.default_rng(2)
    seen = set()
    for _ in range(600):
        clusters = random.integers(0, random.integers(2, 60), 120)
        reference = (random.random(120) < 0.7).astype(float)
        candidate = np.where(random.random(120) < random.uniform(0.6, 1), reference, random.random(120) < 0.6)
        difference, margin = difference_of(candidate.astype(float), reference, clusters), random.uniform(0.005, 0.3)
        found = run_test(difference, margin)
        assert (found.p_value < 0.05) == (found.lower > -margin) == (found.uncorrected == "pass")
        assert (found.upper < -margin) == (found.uncorrected == "fail")
        interval = difference.interval()
        assert interval.low <= found.lower <= interval.value <= found.upper <= interval.high
        seen.add(found.uncorrected)
    assert seen == {"pass", "fail", "inconclusive"}


# --- simulation


def sizes(kind: str) -> np.ndarray:
    """Documents of each cluster."""
    if kind == "half in one":
        return np.array([20] * 9 + [180])
    if kind == "unequal":
        return np.round(np.exp(np.linspace(-1.5, 1.5, 40)) * 7).astype(int) + 1
    clusters, each = map(int, kind.split(" x "))
    return np.full(clusters, each)


def draw(
    random: np.random.Generator, sizes: np.ndarray, worse: float, agreement: float, correlation: float, sets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sets, N) 0/1 scores of a candidate and of its reference, which is better by `worse`, and (N,) cluster codes.

    The difficulty of documents and the changes of answers correlate within a cluster (a Gaussian copula).
    """
    codes = np.repeat(np.arange(len(sizes)), sizes)

    def normal() -> np.ndarray:
        own = random.normal(size=(sets, len(codes)))
        if not correlation:
            return own
        return np.sqrt(correlation) * random.normal(size=(sets, len(sizes)))[:, codes] + np.sqrt(1 - correlation) * own

    right, luck = normal() < stats.norm.ppf(0.7), normal()
    lost, won = (1 - agreement + worse) / 2, (1 - agreement - worse) / 2
    candidate = np.where(right, luck >= stats.norm.ppf(lost / 0.7), luck < stats.norm.ppf(won / 0.3))
    return candidate.astype(float), right.astype(float), codes


def pass_rate(drawn: tuple[np.ndarray, np.ndarray, np.ndarray], margin: float) -> float:
    """The share of drawn pairs whose test passes, which is if the lower bound is above minus the margin."""
    candidates, references, codes = drawn
    weights = np.ones(len(codes))
    independent = len(np.unique(codes)) == len(codes)
    passed: dict[tuple[int, int, int], bool] = {}  # of independent documents only these counts matter
    count = 0
    for candidate, reference in zip(candidates, references, strict=True):
        lost, won = int((candidate < reference).sum()), int((candidate > reference).sum())
        key = (lost, won, int(candidate.sum())) if independent else (-1, -1, len(passed))
        if key not in passed:
            lower, _ = clustered_difference(candidate, reference, weights, codes).bounds(1 - SIGNIFICANCE_LEVEL)
            passed[key] = lower > -margin
        count += passed[key]
    return count / len(candidates)


SETTINGS = [
    # clusters x documents of each, margin, agreement, correlation within a cluster
    ("136 x 1", 0.02, 0.98, 0.0),  # few changes, all of them for the worse
    ("300 x 1", 0.02, 0.98, 0.0),
    ("300 x 1", 0.05, 0.90, 0.0),
    ("1000 x 1", 0.02, 0.95, 0.0),
    ("10 x 30", 0.05, 0.95, 0.2),
    ("10 x 30", 0.02, 0.90, 0.2),
    ("40 x 10", 0.05, 0.90, 0.2),
    ("200 x 5", 0.02, 0.95, 0.2),
    ("unequal", 0.05, 0.90, 0.2),
    ("unequal", 0.02, 0.98, 0.2),
    ("half in one", 0.05, 0.95, 0.2),
    ("half in one", 0.05, 0.90, 0.0),
]


def test_a_student_that_is_worse_by_the_margin_passes_at_most_5_percent_of_the_time() -> None:
    random, sets = np.random.default_rng(3), 2000
    rates = {}
    for setting in SETTINGS:
        kind, margin, agreement, correlation = setting
        rates[setting] = pass_rate(draw(random, sizes(kind), margin, agreement, correlation, sets), margin)
    # 2.5 standard errors of a rate of 5% in 2,000 draws are 1.2 points.
    assert max(rates.values()) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / sets), rates
    assert np.mean([*rates.values()]) <= 0.05, rates


@pytest.mark.parametrize(
    ("kind", "margin", "agreement", "at_least"),
    [
        ("1000 x 1", 0.05, 0.9, 0.99),
        ("1000 x 1", 0.02, 0.95, 0.8),
        ("200 x 5", 0.05, 0.9, 0.98),
        ("40 x 10", 0.05, 0.9, 0.8),
    ],
)
def test_a_student_that_is_as_good_passes_with_enough_documents(
    kind: str, margin: float, agreement: float, at_least: float
) -> None:
    drawn = draw(np.random.default_rng(4), sizes(kind), 0.0, agreement, 0.1, 300)
    assert pass_rate(drawn, margin) >= at_least


@pytest.mark.parametrize(("kind", "correlation"), [("400 x 1", 0.0), ("60 x 8", 0.2), ("unequal", 0.2)])
def test_intervals_of_binary_differences_cover_the_truth(kind: str, correlation: float) -> None:
    candidates, references, codes = draw(np.random.default_rng(5), sizes(kind), 0.03, 0.93, correlation, 1500)
    intervals = [difference_of(*pair, codes).interval() for pair in zip(candidates, references, strict=True)]
    covered = np.mean([interval.low <= -0.03 <= interval.high for interval in intervals])
    assert 0.94 <= covered <= 0.995


def test_a_student_that_is_as_good_passes_at_the_detectable_margin_80_percent_of_the_time() -> None:
    random = np.random.default_rng(6)
    drawn = draw(random, sizes("300 x 2"), 0.0, 0.9, 0.2, 500)
    margins = [run_test(difference_of(a, b, drawn[2]), 0.5).detectable for a, b in zip(*drawn[:2], strict=True)]
    assert pass_rate(drawn, float(np.mean(margins))) == pytest.approx(0.8, abs=0.06)


def test_the_documents_needed_settle_the_test_80_percent_of_the_time() -> None:
    answers = (328, 31, 24, 117)  # 500 documents, two in each cluster; the candidate is 1.4 points worse
    difference = difference_of(*binary(answers))
    found = run_test(difference, 0.03, documents=500, clusters=250)
    assert found.uncorrected == "inconclusive"
    assert found.documents_needed is not None
    assert found.clusters_needed == pytest.approx(found.documents_needed / 2, abs=1)
    drawn = draw(np.random.default_rng(7), np.ones(found.documents_needed, int), 7 / 500, 1 - 55 / 500, 0.0, 300)
    assert pass_rate(drawn, 0.03) == pytest.approx(0.8, abs=0.06)
    assert run_test(difference, 0.1, documents=500).documents_needed is None  # already settled


def test_no_number_of_documents_settles_a_difference_at_the_margin() -> None:
    found = run_test(difference_of(*binary((50, 10, 0, 40))), 0.1)
    assert found.uncorrected == "inconclusive"
    assert found.documents_needed is None


def test_macro_is_the_mean_of_the_tasks() -> None:
    random = np.random.default_rng(8)
    parts = [difference_of(random.normal(size=n), random.normal(size=n)) for n in (30, 90)]
    found = average_differences(parts)
    assert found.estimate.value == pytest.approx(np.mean([part.estimate.value for part in parts]))
    # Both tasks number their clusters from 0, so the first 30 of both are the same clusters.
    a, b = (part.estimate.errors for part in parts)
    together = np.concatenate([a + b[:30], b[30:]]) / 2
    assert found.estimate.stderr == pytest.approx(np.sqrt((together**2).sum()))
    ones = [difference_of(*binary((20, 2, 2, 6))), difference_of(*binary((60, 2, 2, 16)))]
    assert average_differences(ones).step == pytest.approx((1 / 30 + 1 / 80) / 4)
    assert average_differences([*ones, *parts]).step == 0  # not all scores are 0 or 1


# --- several tests


def test_holm_equals_statsmodels() -> None:
    random = np.random.default_rng(9)
    for count in (1, 2, 7, 30):
        p_values = list(random.random(count) ** 3)
        assert holm_adjusted_p_values(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], rel=1e-12)
    assert holm_adjusted_p_values([]) == []


def test_a_pass_that_holm_revokes_is_inconclusive() -> None:
    noise = np.tile([1.0, -1.0], 50)
    just = 1.8 * noise.std(ddof=1) / 10 - 0.05  # p is 0.037
    clear, near, bad = (difference_of(shift + noise, np.zeros(100)) for shift in (2.0, just, -2.0))
    tests = [run_test(each, 0.05) for each in (clear, near, bad)]
    assert [test.uncorrected for test in tests] == ["pass", "pass", "fail"]
    found = [test for [test] in correct_over_candidates([[test] for test in tests])]
    assert [test.verdict for test in found] == ["pass", "inconclusive", "fail"]
    assert [test.p_holm for test in found] == pytest.approx(holm_adjusted_p_values([test.p_value for test in tests]))
    # The tasks of a single candidate need no correction.
    assert [test.verdict for test in correct_over_candidates([tests])[0]] == ["pass", "pass", "fail"]


def test_no_candidate_passes_by_luck_and_tasks_cost_no_power() -> None:
    """Twelve candidates on three tasks. Simulated p-values, of tests at the margin and of tests of good candidates."""
    random, draws, shape = np.random.default_rng(5), 500, (12, 3)
    alike = run_test(difference_of(np.tile([1.0, -1.0], 50), np.zeros(100)), 5.0)

    def share_that_pass(effect: np.ndarray, corrects: bool = True) -> float:
        """How often some candidate passes on all its tasks; `effect` is in standard errors above the margin."""
        passed = 0
        for _ in range(draws):
            p_values = stats.norm.sf(random.normal(effect))
            if corrects:
                tests = [[alike.model_copy(update={"p_value": p}) for p in row] for row in p_values]
                adjusted = np.array([[test.p_holm for test in row] for row in correct_over_candidates(tests)])
            else:
                adjusted = np.reshape(holm_adjusted_p_values(p_values.ravel()), shape)
            passed += bool((adjusted.max(axis=1) < 0.05).any())
        return passed / draws

    # Each candidate is worse by just the margin on one task, and far better on the others.
    bad = np.full(shape, 9.0)
    bad[:, 0] = 0.0
    error = 3 * np.sqrt(0.05 * 0.95 / draws)
    assert 0.05 - error <= share_that_pass(bad) <= 0.05 + error
    assert share_that_pass(np.zeros(shape)) <= 0.01
    # One candidate is good: a correction over all 36 tests would find it less often.
    good = np.zeros(shape)
    good[0] = 3.0
    assert share_that_pass(good) >= 1.5 * share_that_pass(good, corrects=False)


# --- margins


def test_margins_by_task_by_metric_and_for_the_rest() -> None:
    margins = Margins.parse(["0.02", "bits_per_byte=0.1", "hard=0.05"])
    assert margins.margin_for("hard", "acc") == 0.05
    assert margins.margin_for("easy", "acc") == 0.02
    assert margins.margin_for("text", "bits_per_byte") == 0.1
    assert Margins.parse([]).margin_for("easy", "acc") == 0.01
    margins.check(["hard", "easy", "text", "acc", "bits_per_byte"])
    with pytest.raises(BadInput, match=r"hard=.*did you mean hardest"):
        margins.check(["hardest", "acc", "bits_per_byte"])


@pytest.mark.parametrize("text", ["0", "-0.01", "nan", "inf", "x", "", "hard=", "hard=x"])
def test_a_margin_is_a_number_above_0(text: str) -> None:
    with pytest.raises(BadInput, match="a margin is a number above 0"):
        Margins.parse([text])
