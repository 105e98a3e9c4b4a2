"""From ranked candidates to the order shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drum_hf.selection import arrange

ranked = st.lists(st.integers(), unique=True, max_size=8)


@given(items=ranked, seed=st.integers(0, 100))
def test_every_order_shows_each_demonstration_once(items, seed):
    assert arrange(items, "best_first") == items
    assert arrange(items) == arrange(items, "best_last") == items[::-1]
    shuffled = arrange(items, "shuffled", seed=seed)
    assert sorted(shuffled) == sorted(items)
    assert arrange(items, "shuffled", seed=seed) == shuffled


def test_shuffling_depends_on_the_seed():
    assert len({tuple(arrange(range(6), "shuffled", seed=s)) for s in range(10)}) > 1


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="best_last, best_first, shuffled; got 'worst'"):
        arrange(["a"], "worst")
