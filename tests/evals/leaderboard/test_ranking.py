"""The Pareto frontier, compared with its definition."""

from __future__ import annotations

import random

from limbeck.evals.leaderboard.ranking import pareto_flags


def test_the_frontier_has_the_points_that_no_other_beats() -> None:
    dice = random.Random(0)
    for _ in range(200):
        # Few values, so that there are ties.
        points = [(dice.randint(1, 5), dice.randint(1, 5)) for _ in range(dice.randint(1, 9))]
        expected = []
        for cost, quality in points:
            cheaper = any(c < cost and q >= quality for c, q in points)
            better = any(c <= cost and q > quality for c, q in points)
            expected.append(not cheaper and not better)
        assert pareto_flags(points) == expected
    assert pareto_flags([(1, 1), (1, 1), (None, 2), (0.5, None)]) == [True, True, False, False]
