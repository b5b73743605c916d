"""Groups of scorecards that were measured the same way, and how their differences are described."""

from __future__ import annotations

import random

import pytest

from limbeck.evals.scores.comparability import describe_differences, group_comparable
from tests.evals.leaderboard_helpers import CHANGES, changes_of_card, make_card


def test_each_version_is_in_the_largest_group_it_fits() -> None:
    """Each version is in one group, the cards of a group match, and the first group is as large as can be."""
    dice = random.Random(1)
    for _ in range(100):
        cards = {}
        for number in range(dice.randint(1, 8)):
            cards[number] = [
                make_card(
                    "a", dice.choice([1.0, 0.5, None]), 1.0, harness=dice.choice("ab"), tasks_digest=dice.choice("xy")
                )
                for _ in range(dice.randint(0, 3))
            ]
        groups = group_comparable(cards)
        placed = [number for group in groups for number in group]
        assert sorted(placed) == [number for number, several in cards.items() if several]
        assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)
        for group in groups:
            assert len({(card.harness, card.tasks_digest) for card in group.values()}) == 1
        largest = max(
            (
                sum(any((c.harness, c.tasks_digest) == key for c in several) for several in cards.values())
                for key in (("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))
            ),
            default=0,
        )
        assert len(groups[0] if groups else []) == largest


@pytest.mark.parametrize("changed", CHANGES)
def test_a_card_measured_differently_has_its_own_group_and_reason(changed: str) -> None:
    changes, reason = CHANGES[changed]
    usual = make_card("a", 1.0, 1.0, **changes_of_card({}))
    other = make_card("b", 0.9, 0.1, **changes_of_card(changes))
    groups = group_comparable({1: [usual], 2: [usual], 3: [other]})
    assert groups == [{1: usual, 2: usual}, {3: other}]
    assert reason in "; ".join(describe_differences([other], [usual]))
