"""Non-inferiority: is a candidate as good as its reference? Margins, verdicts, Holm's correction, documents needed.

"Not significantly different" is no evidence for "as good": with too few documents no difference is ever significant. So
the candidate must prove it: its one-sided 95% lower bound must be above minus a margin that was set beforehand.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from limbeck.evals.stats.estimates import Difference
from limbeck.evals.stats.skew import HALF
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Noninferiority, Outcome

SIGNIFICANCE_LEVEL = 0.05  # one-sided
POWER = 0.8
DEFAULT_MARGIN = 0.01


@dataclass(frozen=True)
class Margins:
    """How much worse a candidate may be, in the metric's own units: by task, else by metric, else the default."""

    default: float = DEFAULT_MARGIN
    by_name: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Margins:
        """Parse command-line margins: `0.01` is the default, `NAME=0.02` that of a task or metric.

        Raises BadInput for a margin that is not a finite number above 0.
        """
        default, by_name = DEFAULT_MARGIN, {}
        for text in texts:
            name, _, number = text.rpartition("=")
            try:
                margin = float(number)
            except ValueError:
                margin = math.nan
            if not 0 < margin < math.inf:
                raise BadInput(f"--margin {text}: a margin is a number above 0", fix="such as 0.01 or TASK=0.02")
            if name:
                by_name[name.strip()] = margin
            else:
                default = margin
        return cls(default, by_name)

    def check(self, names: Iterable[str]) -> None:
        """Raise BadInput for a margin of a name that is not among these tasks and metrics."""
        known = list(dict.fromkeys(names))
        for name in self.by_name:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                raise BadInput(
                    f"--margin {name}=...: the comparison has no such task or metric"
                    + (f"; did you mean {' or '.join(near)}?" if near else ""),
                    fix=f"known names: {', '.join(known)}",
                )

    def margin_for(self, task: str, metric: str) -> float:
        """The margin of a task."""
        return self.by_name.get(task, self.by_name.get(metric, self.default))


def noninferiority_test(
    difference: Difference, margin: float, *, higher_is_better: bool, documents: int, clusters: int
) -> Noninferiority:
    """Test one difference by itself; `correct_over_candidates` corrects for the number of candidates.

    Args:
        difference: candidate minus reference.
        margin: above 0.
        documents, clusters: their numbers, from which the result computes how many would settle the test.
    """
    advantage = difference if higher_is_better else difference.negate()
    lower, upper = advantage.bounds(1 - SIGNIFICANCE_LEVEL)
    outcome: Outcome = "inconclusive"
    if lower > -margin:
        outcome = "pass"
    elif upper < -margin:
        outcome = "fail"
    carried = advantage.heaviest_share
    # A difference that a few documents carry has to pass with twice the reach, else it is theirs, not the model's.
    rests_on_few = outcome == "pass" and carried > HALF and 2 * lower - advantage.estimate.value <= -margin
    if rests_on_few:
        outcome = "inconclusive"
    p_value = advantage.p_value_above(-margin)
    factor = documents_factor(advantage, margin, SIGNIFICANCE_LEVEL) if outcome == "inconclusive" else None
    if factor is not None:
        factor = max(1 + 1 / documents, factor)
    return Noninferiority(
        margin=margin,
        lower=lower,
        upper=upper,
        p_value=p_value,
        p_holm=p_value,
        uncorrected=outcome,
        verdict=outcome,
        detectable=advantage.detectable(1 - SIGNIFICANCE_LEVEL, POWER),
        carried_by_few=carried if rests_on_few else None,
        documents_needed=math.ceil(documents * factor) if factor else None,
        clusters_needed=math.ceil(clusters * factor) if factor else None,
    )


def documents_factor(advantage: Difference, margin: float, level: float) -> float | None:
    """How many times as many documents settle a test with POWER, if the difference stays the same.

    None if the difference equals the margin: then no number does.
    """
    gap = abs(advantage.estimate.value + margin)
    quantiles = sum(advantage.estimate.quantile(probability) for probability in (1 - level, POWER))
    return (quantiles * advantage.stderr_at(-margin) / gap) ** 2 if gap else None


def passing_margin(advantage: Difference, level: float) -> float:
    """The smallest margin for which a test passes at `level`."""
    return -advantage.bounds(1 - level)[0]


def correct_over_candidates(candidates: Sequence[Sequence[Noninferiority]]) -> list[list[Noninferiority]]:
    """Correct the tests of several candidates for their number; a test that no longer passes is inconclusive.

    A candidate is as good if it passes on every task: an intersection-union test, whose p-value is the largest of its
    tasks (Berger 1982, "Multiparameter Hypothesis Testing and Acceptance Sampling"). It owes no correction for the
    number of its tasks. These p-values get Holm's correction, and each test the factor of its candidate.

    Args:
        candidates: the tests of each.
    """
    largest = [max((test.p_value for test in tests), default=1.0) for tests in candidates]
    corrected = []
    for tests, p_value, p_holm in zip(candidates, largest, holm_adjusted_p_values(largest), strict=True):
        factor = p_holm / p_value if p_value else 1.0
        corrected.append([_with_p_holm(test, min(1.0, factor * test.p_value)) for test in tests])
    return corrected


def _with_p_holm(test: Noninferiority, p_holm: float) -> Noninferiority:
    revoked = test.uncorrected == "pass" and p_holm >= SIGNIFICANCE_LEVEL
    return test.model_copy(update={"p_holm": p_holm, "verdict": "inconclusive" if revoked else test.uncorrected})


def holm_adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values: at most one family of tests in twenty has a false one below 0.05.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979. It holds for any dependence of the tests.
    """
    order = np.argsort(p_values)
    steps = np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(p) for p in adjusted]
