"""Strategies' rankings against the LVLM's own: oracles, closed forms, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_training import StubLVLM, worded_table

from drum_hf.errors import EmptySupportError
from drum_hf.evaluation.metrics import lvlm_ndcg_at_k
from drum_hf.evaluation.retrieval import RetrievalEvaluator
from drum_hf.evaluation.strategies import Random, ScoreOracle, ZeroShot
from drum_hf.scores.feedback import Feedback

SUPPORT, ASKED = worded_table(15, groups=3), worded_table(4, groups=2, prefix="u")


class Ranked:
    """A ranking of ids, whatever is asked."""

    name = "ranked"

    def __init__(self, ids):
        self.ids = ids

    def select(self, queries, k):
        return [self.ids[:k] for _ in queries]


def feedback_of(lvlm=None):
    return Feedback(lvlm or StubLVLM(), SUPPORT, ASKED)


def allowed(query_id):
    group = ASKED.groups[ASKED.row(query_id)]
    return [i for i, g in zip(SUPPORT.ids, SUPPORT.groups, strict=True) if g is None or g != group]


def test_every_measure_is_that_of_the_lvlms_scores():
    feedback = feedback_of()
    ids = ["t0", "t4", "t2"]
    result = RetrievalEvaluator(feedback).evaluate(Ranked(ids), 3)
    for row, query in enumerate(ASKED.ids):
        alone = {i: StubLVLM.taste(feedback.request(query, [i])) for i in allowed(query)}
        best = sorted(alone, key=lambda i: -alone[i])[:3]
        assert result.recall[row] == len(set(best) & set(ids)) / 3
        assert result.ndcg[row] == pytest.approx(lvlm_ndcg_at_k(ids, alone, 3))
        shown = feedback.request(query, ids[::-1])  # the best stands last
        assert result.utility[row] == pytest.approx(StubLVLM.taste(shown) + 2.0)
    row = result.to_dict()
    assert (row["strategy"], row["k"]) == ("ranked", 3)
    assert row["utility"]["metric"] == pytest.approx(result.utility.mean())
    assert row["ndcg"]["ci"][0] <= row["ndcg"]["metric"] <= row["ndcg"]["ci"][1]


def test_the_oracle_is_perfect_and_no_demonstration_is_worth_nothing():
    feedback = feedback_of()
    evaluator = RetrievalEvaluator(feedback)
    oracle = evaluator.evaluate(ScoreOracle(feedback), 4)
    assert oracle.ndcg.tolist() == pytest.approx([1.0] * 4) and oracle.recall.tolist() == [1.0] * 4
    nothing = evaluator.evaluate(ZeroShot(), 4)
    assert [values.tolist() for values in nothing.values.values()] == [[0.0] * 4] * 3
    random = evaluator.evaluate([Random(SUPPORT, s) for s in range(3)], 4)
    seeds = [evaluator.evaluate(Random(SUPPORT, s), 4) for s in range(3)]
    for name, values in random.values.items():
        np.testing.assert_allclose(values, np.mean([one.values[name] for one in seeds], axis=0))
    assert random.ndcg.mean() < oracle.ndcg.mean() and random.utility.mean() < oracle.utility.mean()


def test_the_cost_is_as_stated_and_paid_once():
    lvlm = StubLVLM()
    evaluator = RetrievalEvaluator(feedback_of(lvlm))
    pairs = sum(len(allowed(q)) for q in ASKED.ids) + len(ASKED)
    assert evaluator.plan() == (pairs, 0) and len(evaluator.pairs) == pairs
    evaluator.evaluate(Ranked(["t0", "t4"]), 2)
    assert len(lvlm.scored) == pairs + len(ASKED)
    assert evaluator.plan() == (0, pairs)
    evaluator.evaluate(Ranked(["t0", "t4"]), 2)
    evaluator.evaluate(Ranked(["t0", "t2"]), 1)  # alone it was scored before
    assert len(lvlm.scored) == pairs + len(ASKED)


def test_a_sample_is_the_same_for_all_strategies_and_ranks_only_itself():
    lvlm = StubLVLM()
    feedback = feedback_of(lvlm)
    evaluator = RetrievalEvaluator(feedback, candidates=5, seed=1)
    assert evaluator.plan() == (4 * 6, 0)
    assert [len(ids) for ids in evaluator.ranked_ids] == [5] * 4
    assert evaluator.ranked_ids == RetrievalEvaluator(feedback, candidates=5, seed=1).ranked_ids
    assert evaluator.ranked_ids != RetrievalEvaluator(feedback, candidates=5, seed=2).ranked_ids
    everything = Ranked(
        sorted(SUPPORT.ids, key=lambda i: SUPPORT.groups[SUPPORT.row(i)] or "")
    )  # those of no group first
    result = evaluator.evaluate(everything, 2)
    for row, (ids, scores) in enumerate(zip(evaluator.ranked_ids, evaluator.scores, strict=True)):
        assert list(scores) == ids
        ranked = [i for i in everything.ids if i in ids]
        assert result.ndcg[row] == pytest.approx(lvlm_ndcg_at_k(ranked, scores, 2))
    exact = RetrievalEvaluator(feedback).evaluate(everything, 2)
    np.testing.assert_array_equal(result.utility, exact.utility)  # of what is really shown
    whole = RetrievalEvaluator(feedback, candidates=10_000).evaluate(ScoreOracle(feedback), 2)
    assert whole.recall.tolist() == [1.0] * 4


def test_drafts_reach_the_strategy_alone():
    seen = []

    class Spy(Ranked):
        def select(self, queries, k):
            seen.extend(query.draft for query in queries)
            return super().select(queries, k)

    lvlm = StubLVLM()
    RetrievalEvaluator(feedback_of(lvlm), drafts={"u0": "a draft"}).evaluate(Spy(["t0"]), 1)
    assert seen == ["a draft", None, None, None]


def test_refusals():
    with pytest.raises(ValueError, match="at least 1"):
        RetrievalEvaluator(feedback_of(), candidates=0)
    with pytest.raises(ValueError, match="k >= 1"):
        RetrievalEvaluator(feedback_of()).evaluate(ZeroShot(), 0)
    only = SUPPORT.select(["t0"])
    with pytest.raises(EmptySupportError, match="'t0'"):
        RetrievalEvaluator(Feedback(StubLVLM(), only, only)).evaluate(ZeroShot(), 1)
