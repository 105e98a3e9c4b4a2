"""Bootstrap: coverage, closed forms, agreement of interval and p-value, bounded memory, same seed same result."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drum_hf.evaluation import statistics
from drum_hf.evaluation.statistics import PairedDifference, bootstrap_interval, paired_bootstrap

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


def test_interval_approaches_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.5, size=2000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    lo, hi = bootstrap_interval(values, resamples=4000)
    assert lo == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert hi == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_two_values_is_the_binomial_one():
    # Means of two draws from {0, 1}: 0, ½ and 1 with probability ¼, ½, ¼.
    assert bootstrap_interval([0.0, 1.0], level=0.6) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_covers_the_true_mean_as_often_as_it_says(level):
    rng = np.random.default_rng(0)
    trials = 400
    covered = 0
    for seed in range(trials):
        lo, hi = bootstrap_interval(rng.exponential(1.0, size=80), level=level, resamples=400, seed=seed)
        covered += lo <= 1.0 <= hi
    deviation = math.sqrt(level * (1 - level) / trials)
    assert level - 0.03 - 3 * deviation < covered / trials < level + 3 * deviation


@settings(max_examples=50, deadline=None)
@given(numbers, st.integers(0, 5))
def test_interval_laws(values, seed):
    lo, hi = bootstrap_interval(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= lo <= hi <= max(values) + 1e-9
    assert (lo, hi) == bootstrap_interval(np.array(values), resamples=200, seed=seed)
    inner = bootstrap_interval(values, level=0.5, resamples=200, seed=seed)
    assert lo <= inner[0] and inner[1] <= hi
    shifted = bootstrap_interval([2 * value + 7 for value in values], resamples=200, seed=seed)
    assert shifted == pytest.approx((2 * lo + 7, 2 * hi + 7), abs=1e-6)


def test_seeds_differ():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_draw_every_item_once_a_resample(block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    table = np.zeros(50, dtype=int)
    for rows, columns in statistics._blocks(50, 33):
        assert columns * (rows.stop - rows.start) <= max(block, columns)
        table[rows] += columns
    assert (table == 33).all()
    assert bootstrap_interval([3.0] * 33, resamples=50) == (3.0, 3.0)


def test_memory_is_bounded():
    values = np.random.default_rng(0).random(30_000)  # drawn at once, 500 resamples would take 120 MB for positions
    tracemalloc.start()
    try:
        bootstrap_interval(values, resamples=500)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_paired_difference_of_equals_and_of_constants():
    same = np.random.default_rng(0).random(40)
    assert paired_bootstrap(same, same) == PairedDifference(mean=0.0, lo=0.0, hi=0.0, p=1.0)
    always = paired_bootstrap(same + 1, same, resamples=999)
    assert (always.mean, always.lo, always.hi) == pytest.approx((1.0, 1.0, 1.0))
    assert always.p == pytest.approx(2 / 1000)
    assert json.loads(json.dumps(dataclasses.asdict(always)))["p"] == always.p


def test_differences_that_cancel_give_no_evidence():
    a = np.array([0.1, 0.2, 0.3, 0.7])
    assert paired_bootstrap(a, a[::-1]).p > 0.9
    assert paired_bootstrap([0.3, 0.0], [0.0, 0.3]).p == 1.0


def test_pairing_removes_what_items_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(scale=5.0, size=100)
    a, b = difficulty + 0.3 + 0.1 * rng.normal(size=100), difficulty
    difference = paired_bootstrap(a, b)
    assert difference.mean == pytest.approx((a - b).mean())
    assert 0.25 < difference.lo < difference.mean < difference.hi < 0.35
    assert difference.p < 0.01


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=25), st.integers(0, 3))
def test_paired_laws(pairs, seed):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    forth = paired_bootstrap(a, b, resamples=399, seed=seed)
    back = paired_bootstrap(b, a, resamples=399, seed=seed)
    assert forth == paired_bootstrap(a, b, resamples=399, seed=seed)
    assert (back.mean, back.lo, back.hi, back.p) == pytest.approx((-forth.mean, -forth.hi, -forth.lo, forth.p))
    assert 0 < forth.p <= 1
    # The interval and the test tell the same story.
    if forth.lo > 1e-9 or forth.hi < -1e-9:
        assert forth.p <= 0.06
    if forth.lo < -1e-9 and forth.hi > 1e-9:
        assert forth.p >= 0.04


def test_p_is_rarely_small_where_nothing_differs():
    rng = np.random.default_rng(0)
    trials = 400
    small = 0
    for seed in range(trials):
        a, b = rng.normal(size=(2, 50))
        small += paired_bootstrap(a, b, resamples=400, seed=seed).p < 0.05
    assert 0.02 < small / trials < 0.10


def test_groups_keep_their_sizes():
    # Between the groups lies all of the difference, within them none: nothing is left to resample.
    a = [1.0] * 6 + [0.0] * 2
    b = [0.0] * 8
    groups = ["world 0"] * 6 + ["world 1"] * 2
    assert paired_bootstrap(a, b, groups=groups) == PairedDifference(0.75, 0.75, 0.75, 2 / 2001)
    pooled = paired_bootstrap(a, b)
    assert pooled.lo < 0.75 < pooled.hi and pooled.mean == 0.75


def test_stratified_interval_has_the_within_group_width():
    rng = np.random.default_rng(5)
    sizes, levels = [300, 700], [-1.0, 1.0]
    parts = [rng.normal(level, 0.5, size=size) for level, size in zip(levels, sizes, strict=True)]
    order = rng.permutation(1000)  # groups needn't stand together
    values = np.concatenate(parts)[order]
    labels = np.repeat([0, 1], sizes)[order].tolist()
    variance = sum(len(part) * part.var() for part in parts) / 1000**2
    difference = paired_bootstrap(values, np.zeros(1000), groups=labels, resamples=4000)
    half = 1.959964 * math.sqrt(variance)
    assert (difference.hi - difference.lo) / 2 == pytest.approx(half, rel=0.08)
    assert paired_bootstrap(values, np.zeros(1000), groups=[None] * 1000) == paired_bootstrap(values, np.zeros(1000))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"values": []}, "n >= 1"),
        ({"values": [[1.0]]}, r"shape \(1, 1\)"),
        ({"values": [0.0, float("nan")]}, "nan for item 1"),
        ({"values": [1.0], "level": 1.0}, "between 0 and 1"),
        ({"values": [1.0], "level": 95}, "0.95 for 95%"),
        ({"values": [1.0], "resamples": 0}, "resamples >= 1"),
    ],
)
def test_bootstrap_interval_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(kwargs.pop("values"), **kwargs)


def test_paired_bootstrap_refuses():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="each of 2 items, got 1"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="finite b"):
        paired_bootstrap([1.0], [float("inf")])
