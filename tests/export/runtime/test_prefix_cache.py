"""The prefix cache: size limit, eviction, longest common prefix."""

from __future__ import annotations

import pytest

from limbeck.export.runtime.prefix_cache import PrefixCache, common_prefix_length


def test_the_cache_is_bounded_and_evicts_the_least_recently_used_text() -> None:
    cache = PrefixCache(100)
    for start in (1, 2, 3):
        cache.store((start,) * 40, [])
    assert [cache.find_longest((start,) * 40)[0] for start in (1, 2, 3)] == [0, 40, 40]
    cache.find_longest((2,) * 40)
    cache.store((4,) * 40, [])
    assert [cache.find_longest((start,) * 40)[0] for start in (2, 3, 4)] == [40, 0, 40]
    assert not cache.should_store((5,) * 101)
    assert not cache.should_store((4,) * 30)  # a prefix of a stored text
    cache.store((4,) * 60, [])  # replaces its own prefix
    assert [cache.find_longest((start,) * 60)[0] for start in (2, 4)] == [40, 60]


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [((), (1,), 0), ((1,), (2,), 0), ((1, 2, 3), (1, 2), 2), ((1, 2, 3, 4, 5), (1, 2, 3, 9, 5), 3)],
)
def test_the_common_prefix_of_two_texts(a: tuple[int, ...], b: tuple[int, ...], length: int) -> None:
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == length
