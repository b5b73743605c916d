"""How often does a student pass that is just not good enough, and how often do intervals cover the truth?

Simulated: retention at its limit, real-valued losses at the margin, and several candidates at once. The tables of
docs/statistics.md are from here: `python -m tests.bench statistics`, about half an hour on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from limbeck.evals.stats.estimates import Difference, clustered_difference, clustered_mean
from limbeck.evals.stats.noninferiority import (
    SIGNIFICANCE_LEVEL,
    correct_over_candidates,
    holm_adjusted_p_values,
    noninferiority_test,
)
from limbeck.evals.stats.ratio import Ratio, mean_ratio
from limbeck.registry.core.terminal import print_table

SETS = 400  # drawn sets of documents in each setting: a rate of 5% has a standard error of 1.1 points
SIZES = (30, 100, 300, 1000)


def main() -> None:
    """Simulate and print the tables."""
    print_retention()
    print_mean_retention()
    print_losses()
    print_candidates()


# --- retention


class Setting(NamedTuple):
    """A task and a student that retains just `retention` of the teacher's accuracy above chance."""

    documents: int
    clusters: str
    accuracy: float  # of the teacher
    chance: float
    retention: float
    gained: float  # answers that the student alone has right, as a share of all it could

    def shares(self) -> np.ndarray:
        """(4,) of documents: both right, the teacher alone, the student alone, neither."""
        student = self.chance + self.retention * (self.accuracy - self.chance)
        gained = self.gained * min(1 - self.accuracy, student)
        lost = self.accuracy - student + gained
        return np.array([self.accuracy - lost, lost, gained, 1 - self.accuracy - gained])


def cluster_labels(kind: str, documents: int) -> np.ndarray:
    """(N,) int64 labels. "unequal": each cluster has three quarters of the one before, the first a sixth of all."""
    if kind == "none":
        return np.arange(documents)
    sizes: list[int] = []
    while sum(sizes) < documents:
        sizes.append(min(max(1, int(documents / 6 * 0.75 ** len(sizes))), documents - sum(sizes)))
    return np.repeat(np.arange(len(sizes)), sizes)


def draw_answers(random: np.random.Generator, setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) 0/1 scores of student and teacher, and labels; documents of one cluster correlate by 0.1."""
    labels, shares = cluster_labels(setting.clusters, setting.documents), setting.shares()
    of_document = np.tile(shares, (len(labels), 1))
    if setting.clusters != "none":
        gamma = random.gamma(np.maximum(9 * shares, 1e-9), size=(labels.max() + 1, 4)) + 1e-300
        of_document = (gamma / gamma.sum(axis=1, keepdims=True))[labels]
    kind = (random.random((len(labels), 1)) > of_document.cumsum(axis=1)[:, :3]).sum(axis=1)
    return np.isin(kind, (0, 2)).astype(float), np.isin(kind, (0, 1)).astype(float), labels


def settings() -> Iterator[Setting]:
    """The grid."""
    parts = product(
        SIZES, ("none", "unequal"), (0.3, 0.5, 0.7, 0.9, 0.99), (0.0, 0.25), (0.5, 0.8, 0.95, 0.99), (0, 0.3)
    )
    for setting in map(Setting._make, parts):
        if setting.accuracy > setting.chance and setting.shares().min() >= 0:
            yield setting


class Rates(NamedTuple):
    """Shares of all drawn sets, and of those in which there is a retention: the teacher is clearly above chance."""

    passed: float  # of all: by the one-sided 95% bound of retention
    by_margin: float  # of all: by the margin that is equal to the limit for the teacher as measured
    disagree: float  # of all: by one but not by the other
    covered: float  # of those with a retention: by its 95% interval
    below: float  # of those with a retention: the interval lies below the truth
    known: float  # of all: there is a retention


def retention_rates(setting: Setting, seed: int = 0) -> Rates:
    """Simulate one setting."""
    random = np.random.default_rng([seed, *(int(1000 * part) for part in setting if not isinstance(part, str))])
    found = []
    for _ in range(SETS):
        ratio = draw_ratio(random, setting)
        if ratio is None:
            continue
        limit, interval = setting.retention, ratio.interval()
        by_retention = ratio.bounds(1 - SIGNIFICANCE_LEVEL)[0] > limit
        by_margin = ratio.difference.bounds(1 - SIGNIFICANCE_LEVEL)[0] > -(1 - limit) * ratio.whole.value
        covered, below = interval.low <= limit <= interval.high, interval.high < limit
        found.append((by_retention, by_margin, by_retention != by_margin, covered, below))
    if not found:
        return Rates(0, 0, 0, 1, 0, 0)
    total = np.sum(found, axis=0)
    return Rates(*total[:3] / SETS, *total[3:] / len(found), len(found) / SETS)


def draw_ratio(random: np.random.Generator, setting: Setting) -> Ratio | None:
    """The retention of one drawn set; None if the teacher is not clearly above chance."""
    student, teacher, labels = draw_answers(random, setting)
    weights = np.ones(len(labels))
    kept, whole = (clustered_mean(side - setting.chance, weights, labels) for side in (student, teacher))
    difference = clustered_difference(student, teacher, weights, labels)
    return Ratio(kept, whole, difference, setting.chance) if whole.interval().low > 0 else None


def mean_rates(parts: tuple[Setting, ...]) -> tuple[float, float]:
    """How often the 95% interval of the mean retention lies above the truth, which is a false pass, and covers it.

    Each task has documents of its own, but equal labels are one file in all tasks.
    """
    random = np.random.default_rng(0)
    truth = float(np.mean([part.retention for part in parts]))
    passed = covered = known = 0
    for _ in range(SETS):
        ratios = [ratio for part in parts if (ratio := draw_ratio(random, part))]
        if len(ratios) < len(parts):
            continue
        interval = mean_ratio(ratios)
        passed += interval.low > truth
        covered += interval.low <= truth <= interval.high
        known += 1
    return passed / SETS, covered / known if known else 1.0


def print_mean_retention() -> None:
    """Three tasks, of one difficulty and of several."""
    rows = []
    for documents, clusters in product(SIZES, ("none", "unequal")):
        cells = []
        for kept, accuracies in (((0.9, 0.9, 0.9), (0.7, 0.7, 0.7)), ((1.0, 0.9, 0.5), (0.99, 0.8, 0.5))):
            task_settings = (
                Setting(documents, clusters, a, 0.25, r, 0.1) for a, r in zip(accuracies, kept, strict=True)
            )
            passed, covered = mean_rates(tuple(task_settings))
            cells += [f"{passed:.1%}", f"{covered:.1%}"]
        rows.append([f"{documents:,}", clusters, *cells])
    columns = ["documents", "clusters", "alike: false passes", "covered", "different: false passes", "covered"]
    print_table("the 95% interval of the mean retention over three tasks", columns, rows)


def print_retention() -> None:
    """One row for each number of documents; coverage over the settings in which most teachers are above chance."""
    rows = []
    for documents, clusters in product(SIZES, ("none", "unequal")):
        chosen = [each for each in settings() if (each.documents, each.clusters) == (documents, clusters)]
        rates = np.array([retention_rates(each) for each in chosen])
        passed, by_margin, disagree = rates[:, :3].T
        covered, below = rates[rates[:, 5] >= 0.5][:, 3:5].T
        rows.append(
            [
                f"{documents:,}",
                clusters,
                f"{len(rates)}",
                f"{passed.mean():.1%}, {passed.max():.1%}",
                f"{by_margin.mean():.1%}, {by_margin.max():.1%}",
                f"{disagree.mean():.1%}",
                f"{covered.mean():.1%}, {covered.min():.1%}",
                f"{below.mean():.1%}",
            ]
        )
    columns = ["documents", "clusters", "settings", "pass by retention: mean, worst", "by the margin: mean, worst"]
    columns += ["one of the two only", "coverage: mean, least", "interval below the truth"]
    print_table("a student that retains just the limit", columns, rows)


# --- real-valued losses

LOSSES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, count: random.normal(size=count),
    "Laplace": lambda random, count: random.laplace(size=count),
    "exponential": lambda random, count: random.exponential(size=count),
    "log-normal, sigma 1": lambda random, count: random.lognormal(sigma=1.0, size=count),
    "log-normal, sigma 1.5": lambda random, count: random.lognormal(sigma=1.5, size=count),
    "log-normal, sigma 2": lambda random, count: random.lognormal(sigma=2.0, size=count),
    "Pareto 3": lambda random, count: random.pareto(3.0, count),
    "Pareto 2.1": lambda random, count: random.pareto(2.1, count),
    "normal, and Pareto 2.1 in 5%": lambda random, count: (
        random.normal(scale=0.3, size=count) + (random.random(count) < 0.05) * (1 + random.pareto(2.1, count))
    ),
}
MEANS = dict(zip(LOSSES, (0, 0, 1, np.exp(0.5), np.exp(1.125), np.exp(2), 0.5, 1 / 1.1, 0.05 * 2.1 / 1.1), strict=True))


def pass_rate(name: str, clusters: int, each: str, margin: float, seed: int = 0) -> float:
    """The share of sets that pass at a margin this far above the mean loss; `each` is "one document" or "unequal"."""
    random = np.random.default_rng([seed, clusters, len(name)])
    sizes = np.ones(clusters, int)
    if each == "unequal":
        sizes = np.maximum(1, np.round(3 * np.exp(np.linspace(-1.5, 1.5, clusters)))).astype(int)
    labels = np.repeat(np.arange(clusters), sizes)
    passed = 0
    for _ in range(SETS):
        losses, weights = LOSSES[name](random, len(labels)), np.ones(len(labels))
        if each == "unequal":
            losses = (losses + LOSSES[name](random, clusters)[labels]) / 2
            weights = random.uniform(1, 4, len(labels))
        shift = margin + MEANS[name]  # so that margins are above 0
        difference: Difference = clustered_difference(losses, np.full(len(losses), -1.0), weights, labels)
        test = noninferiority_test(
            difference, 1 + shift, higher_is_better=False, documents=len(labels), clusters=clusters
        )
        passed += test.verdict == "pass"
    return passed / SETS


def print_losses() -> None:
    """False passes at the margin, and passes of a student whose loss is far below it."""
    rows = []
    for each, name in product(("one document", "unequal"), LOSSES):
        rates = [pass_rate(name, clusters, each, 0.0) for clusters in SIZES]
        far = pass_rate(name, SIZES[-1], each, 1.0)
        rows.append([name, each, *(f"{rate:.1%}" for rate in rates), f"{far:.0%}"])
    columns = ["loss", "clusters of", *(f"{size:,} clusters" for size in SIZES), "1,000, margin 1 above the loss"]
    print_table("a student that is worse by just the margin", columns, rows)


# --- several candidates


def candidate_rates(effect: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """How often some candidate passes all its tasks, corrected over candidates and over all tests.

    Args:
        effect: (candidates, tasks) standard errors above the margin.
    """
    random, test_of = np.random.default_rng(0), noninferiority_test
    flat = clustered_difference(np.tile([1.0, -1.0], 50), np.full(100, 0.5), np.ones(100), np.arange(100))
    test = test_of(flat, 5.0, higher_is_better=True, documents=100, clusters=100)
    passed = np.zeros(2)
    for _ in range(draws):
        p_values = norm.sf(random.normal(effect))
        tests = [[test.model_copy(update={"p_value": p}) for p in row] for row in p_values]
        over_candidates = np.array([[each.p_holm for each in row] for row in correct_over_candidates(tests)])
        over_all = np.reshape(holm_adjusted_p_values(p_values.ravel()), effect.shape)
        passed += [bool((p.max(axis=1) < SIGNIFICANCE_LEVEL).any()) for p in (over_candidates, over_all)]
    return passed[0] / draws, passed[1] / draws


def print_candidates() -> None:
    """Twelve candidates on three tasks: a false pass of any, and the power for the one that is good."""
    shape = 12, 3
    far = np.full(shape, 9.0)
    far[:, 0] = 0.0
    good = np.zeros(shape)
    cases = {"all at the margin on one task, far better on the others": far, "all at the margin on all tasks": good}
    for effect in (3.0, 4.0):
        better = good.copy()
        better[0] = effect
        cases[f"one better by {effect:g} standard errors on all tasks"] = better
    rows = [[name, *(f"{rate:.1%}" for rate in candidate_rates(effect))] for name, effect in cases.items()]
    columns = ["12 candidates, 3 tasks", "Holm over candidates", "Holm over all 36 tests"]
    print_table("some candidate passes on all tasks", columns, rows)


if __name__ == "__main__":
    main()
