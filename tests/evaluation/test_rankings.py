"""Ranking metrics and ROC-AUC against scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drum_hf.errors import DuplicateIdError, MissingIdError, RowError
from drum_hf.evaluation.metrics import (
    get_metric,
    lvlm_ndcg_at_k,
    lvlm_recall_at_k,
    ndcg_at_k,
    recall_at_k,
    roc_auc,
    roc_auc_items,
    utility,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=2, max_size=10), st.integers(1, 12), st.randoms(use_true_random=False))
def test_ndcg_equals_scikit_learn(relevance, k, random):
    from sklearn.metrics import ndcg_score

    ranked = relevance[:]
    random.shuffle(ranked)
    descending = -np.arange(len(ranked), dtype=float)
    expected = ndcg_score([ranked], [descending], k=k)
    assert ndcg_at_k(ranked, relevance, k) == pytest.approx(expected, abs=1e-9)
    assert ndcg_at_k(sorted(relevance, reverse=True), relevance, k) == pytest.approx(float(max(relevance) > 0))


def test_ndcg_closed_forms():
    assert ndcg_at_k([0, 0, 1], [0, 1, 0], 3) == pytest.approx(1 / math.log2(4))
    assert ndcg_at_k([0, 0, 1], [0, 1, 0], 2) == 0.0
    assert ndcg_at_k([], [1.0], 5) == 0.0
    assert ndcg_at_k([0.0], [0.0, 0.0], 5) == 0.0
    # What was not retrieved still belongs to the ideal.
    assert ndcg_at_k([1.0], [1.0, 1.0], 2) == pytest.approx(1 / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    ("relevance", "ideal", "k", "message"),
    [
        ([1.0], [1.0], 0, "k >= 1"),
        ([-0.5], [1.0], 1, "shift log-likelihoods"),
        ([1.0], [float("nan")], 1, "finite"),
        ([[1.0]], [1.0], 1, "one-dimensional"),
        ([2.0], [1.0], 1, "exceeds"),
    ],
)
def test_ndcg_refuses(relevance, ideal, k, message):
    with pytest.raises(ValueError, match=message):
        ndcg_at_k(relevance, ideal, k)


@given(st.permutations(range(8)), st.sets(st.integers(0, 11), min_size=1), st.integers(1, 10))
def test_recall_counts_what_is_among_the_first_k(ranked, relevant, k):
    expected = sum(item in relevant for item in ranked[:k]) / len(relevant)
    assert recall_at_k(ranked, relevant, k) == expected
    assert recall_at_k(ranked, relevant, k) <= recall_at_k(ranked, relevant, k + 1)


def test_recall_refuses():
    with pytest.raises(ValueError, match="at least one relevant id"):
        recall_at_k(["a"], [], 1)
    with pytest.raises(DuplicateIdError, match="'b' twice"):
        recall_at_k(["a", "b", "b"], ["a"], 1)
    with pytest.raises(ValueError, match="k >= 1"):
        recall_at_k(["a"], ["a"], 0)


# --- against the LVLM's scores ---------------------------------------------------------------------------------------


def random_ranking(rng, ties):
    count = int(rng.integers(1, 40))
    values = rng.normal(-2, 1.5, count)
    scores = {f"d{i}": float(v) for i, v in enumerate(np.round(values) if ties else values)}
    ranked = [f"d{i}" for i in rng.permutation(count)][: int(rng.integers(0, count + 1))]
    return ranked, scores, int(rng.integers(1, 12))


def test_lvlm_ndcg_equals_scikit_learn_on_generated_rankings():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    for case in range(300):
        ranked, scores, k = random_ranking(rng, ties=case % 2)
        gains = np.exp([scores[i] for i in scores])  # scikit-learn's is free of the scale
        place = {i: -rank for rank, i in enumerate(ranked)}
        order = [place.get(i, -1000.0) for i in scores]
        if len(scores) == 1:  # scikit-learn wants two
            assert lvlm_ndcg_at_k(ranked, scores, k) == len(ranked)
        else:
            whole = ranked + [i for i in scores if i not in ranked]
            expected = ndcg_score([gains], [[-float(whole.index(i)) for i in scores]], k=k)
            assert lvlm_ndcg_at_k(whole, scores, k) == pytest.approx(expected, abs=1e-9)
            if len(ranked) >= k:
                assert lvlm_ndcg_at_k(ranked, scores, k) == pytest.approx(ndcg_score([gains], [order], k=k), abs=1e-9)
            assert 0 <= lvlm_ndcg_at_k(ranked, scores, k) <= lvlm_ndcg_at_k(whole, scores, k) <= 1


def test_the_lvlms_own_order_is_perfect_whatever_the_ties_and_scale():
    rng = np.random.default_rng(1)
    for case in range(500):
        _, scores, k = random_ranking(rng, ties=case % 2)
        own = sorted(scores, key=lambda i: -scores[i])
        shifted = {i: value - 900.0 for i, value in scores.items()}  # exp of these alone would be 0
        assert lvlm_ndcg_at_k(own, shifted, k) == pytest.approx(1.0)
        assert lvlm_recall_at_k(own, shifted, k) == 1.0
        other = sorted(scores, key=lambda i: (-scores[i], rng.random()))
        assert lvlm_recall_at_k(other, scores, k) == 1.0  # the order among equals is nobody's loss


def test_lvlm_recall_equals_recall_of_the_k_best():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        ranked, scores, k = random_ranking(rng, ties=False)
        best = sorted(scores, key=lambda i: -scores[i])[:k]
        assert lvlm_recall_at_k(ranked, scores, k) == recall_at_k(ranked, best, k)


@pytest.mark.parametrize("function", [lvlm_ndcg_at_k, lvlm_recall_at_k])
def test_lvlm_rankings_refuse(function):
    with pytest.raises(ValueError, match="k >= 1"):
        function(["a"], {"a": 0.0}, 0)
    with pytest.raises(MissingIdError, match="'b', which has no score"):
        function(["a", "b"], {"a": 0.0}, 1)
    with pytest.raises(DuplicateIdError, match="'a' twice"):
        function(["a", "a"], {"a": 0.0}, 1)
    with pytest.raises(ValueError, match="at least one candidate"):
        function([], {}, 1)
    with pytest.raises(ValueError, match="finite"):
        function(["a"], {"a": float("nan")}, 1)


def test_utility():
    assert utility([-1.0, -3.0], [-2.0, -2.5]).tolist() == [1.0, -0.5]
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        utility([0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="finite"):
        utility([float("-inf")], [0.0])


# --- ROC-AUC ---------------------------------------------------------------------------------------------------------


def area_by_definition(scores, positive):
    pairs = [
        (a, b)
        for a, p in zip(scores, positive, strict=True)
        if p
        for b, q in zip(scores, positive, strict=True)
        if not q
    ]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


two_classes = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


@settings(max_examples=100, deadline=None)
@given(two_classes)
def test_roc_auc_is_its_definition_and_the_mean_of_the_items(rows):
    scores, positive = zip(*rows, strict=True)
    assume(len(set(positive)) == 2)
    expected = area_by_definition(scores, positive)
    assert roc_auc(scores, positive) == pytest.approx(expected, abs=1e-12)
    items = roc_auc_items(scores, positive)
    assert items.mean() == pytest.approx(expected, abs=1e-12)
    turned = roc_auc_items([-s for s in scores], [not p for p in positive])  # the other class as the positive one
    np.testing.assert_allclose(items, turned, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_roc_auc_items_are_scikit_learns_area_and_delongs_variance(ties):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(3)
    for _ in range(50):
        positive = rng.random(int(rng.integers(10, 200))) < 0.3
        if len(set(positive.tolist())) < 2 or min(positive.sum(), (~positive).sum()) < 2:
            continue
        scores = rng.normal(size=len(positive)) + positive
        scores = np.round(scores) if ties else scores
        items = roc_auc_items(scores, positive)
        assert items.mean() == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
        # DeLong: variance over the positives of their placements, over m, plus the same of the negatives
        above = (scores[positive][:, None] > scores[~positive]) + 0.5 * (
            scores[positive][:, None] == scores[~positive]
        )
        delong = above.mean(1).var() / positive.sum() + above.mean(0).var() / (~positive).sum()
        assert items.var() / len(items) == pytest.approx(delong, rel=1e-9, abs=1e-15)


def test_roc_auc_metric_takes_label_probabilities():
    metric = get_metric("roc_auc")
    predictions = [{"no": 1 - p, "yes": p} for p in (0.9, 0.1, 0.5, 0.5)]
    values = metric(predictions, [["yes"], ["no"], ["yes"], ["no"]])
    assert metric.reported(values) == pytest.approx(87.5)
    turned = [{"yes": item["yes"], "no": item["no"]} for item in predictions]
    np.testing.assert_allclose(metric(turned, [["yes"], ["no"], ["yes"], ["no"]]), values)
    with pytest.raises(RowError, match="item 1: expected one of the labels"):
        metric(predictions[:2], [["yes"], ["maybe"]])
    with pytest.raises(ValueError, match="same two labels"):
        metric([{"a": 0.2, "b": 0.3, "c": 0.5}], [["a"]])
    with pytest.raises(ValueError, match="same two labels"):
        metric([predictions[0], {"yes": 0.5, "maybe": 0.5}], [["yes"], ["yes"]])


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([1.0, 2.0], [1, 1], "all 2 items are of one"),
        ([1.0], [1, 0], "as many classes"),
        ([1.0, float("nan")], [1, 0], "not finite"),
        ([1.0, 2.0], [1, 2], r"classes 1 \(positive\) and 0"),
    ],
)
def test_roc_auc_refuses(scores, positive, message):
    with pytest.raises(ValueError, match=message):
        roc_auc(scores, positive)
