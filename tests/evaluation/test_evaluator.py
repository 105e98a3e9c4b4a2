"""Strategies choose what they say and never what they may not; the evaluator shows it in order and pays once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import tiny_clip
from tiny_training import COLOURS, StubLVLM, coloured_table, forbidden, worded_table

from drum_hf.data import TripletTable
from drum_hf.errors import LeakError, MissingIdError, RowError
from drum_hf.evaluation.evaluator import ICLEvaluator
from drum_hf.evaluation.strategies import BM25, Fixed, Random, Retrieved, SameAnswerOracle, ScoreOracle, ZeroShot
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import ScoreStore
from drum_hf.types import Query

rows = st.lists(
    st.tuples(st.sampled_from(["bako", "delu", "fimo"]), st.sampled_from(["", "g0", "g1", "g2"])),
    min_size=1,
    max_size=12,
)


def table_of(rows, prefix="r"):
    return TripletTable.from_dataset(
        [
            {"id": f"{prefix}{i}", "prompt": f"{prefix} question {i}", "response": response, "group": group}
            for i, (response, group) in enumerate(rows)
        ]
    )


def every_strategy(table):
    return [
        ZeroShot(),
        Random(table, 3),
        Fixed(table, 3),
        BM25(table),
        SameAnswerOracle(table, table, 3),
        ScoreOracle(Feedback(StubLVLM(), table, table)),
    ]


@settings(max_examples=12, deadline=None)
@given(rows=rows, k=st.integers(1, 6))
def test_no_strategy_shows_a_query_itself_or_its_group(rows, k):
    table = table_of(rows)
    queries = [table.query(i) for i in table.ids]
    for strategy in every_strategy(table):
        chosen = strategy.select(queries, k)
        assert len(chosen) == len(queries)
        deeper = strategy.select(queries, k + 2)
        for query, ids, more in zip(queries, chosen, deeper, strict=True):
            assert not set(ids) & forbidden(table, query.id), strategy.name
            assert len(set(ids)) == len(ids) <= k
            assert more[: len(ids)] == ids, strategy.name  # fewer shots are the beginning of more
            eligible = [i for i in table.ids if i not in forbidden(table, query.id)]
            if strategy.name in ("random", "fixed", "bm25"):
                assert len(ids) == min(k, len(eligible))


def test_random_differs_by_query_and_seed_and_fixed_by_seed_alone():
    table, asked = worded_table(30), worded_table(6, prefix="u")
    queries = [asked.query(i) for i in asked.ids]
    random = Random(table, 0).select(queries, 4)
    assert random == Random(table, 0).select(queries, 4) != Random(table, 1).select(queries, 4)
    assert len({tuple(ids) for ids in random}) > 1
    fixed = Fixed(table, 0).select(queries, 4)
    assert len({tuple(ids) for ids in fixed}) == 1
    assert fixed != Fixed(table, 1).select(queries, 4)
    own = fixed[0][0]  # a fixed demonstration, asked: the next in line takes its place
    assert Fixed(table, 0).select([table.query(own)], 3) == [fixed[0][1:4]]


def test_bm25_ranks_by_shared_words_and_reads_the_draft():
    table = TripletTable.from_dataset(
        [
            {"id": "bus", "prompt": "what colour is the bus", "response": "red"},
            {"id": "bus2", "prompt": "how many wheels has the bus", "response": "six"},
            {"id": "dog", "prompt": "what breed is this dog", "response": "beagle"},
            {"id": "cat", "prompt": "where does it sleep", "response": "sofa"},
        ]
    )
    ranked = BM25(table).select([Query(None, "how many wheels are on that bus"), Query(None, "breed of dog?")], 4)
    assert ranked[0][:2] == ["bus2", "bus"]
    assert ranked[1][0] == "dog"
    assert BM25(table).select([Query(None, "zzz", draft="Sofa")], 1) == [["cat"]]
    unknown = BM25(table).select([Query(None, "zzz"), Query(None, "")], 4)  # nothing shared: row order
    assert unknown == [table.ids, table.ids]


def test_bm25_reads_captions_where_prompts_are_all_alike():
    captions = ["a bus in the rain", "two dogs on a sofa"]
    table = TripletTable.from_dataset(
        [{"id": f"c{i}", "prompt": "describe", "response": text} for i, text in enumerate(captions)]
    )
    assert BM25(table).select([Query(None, "describe", draft="a sofa and dogs")], 1) == [["c1"]]


def test_same_answer_oracle_shows_only_the_gold_answer():
    table, asked = worded_table(20), worded_table(8, prefix="u")
    for query_id, ids in zip(
        asked.ids, SameAnswerOracle(table, asked).select([asked.query(i) for i in asked.ids], 4), strict=True
    ):
        assert len(ids) == 4
        assert {table[i].response for i in ids} == {asked[query_id].response}
    with pytest.raises(MissingIdError):
        SameAnswerOracle(table, asked).select([Query(None, "who?")], 1)


def test_score_oracle_is_the_brute_force_ranking():
    table, asked = worded_table(15, groups=3), worded_table(4, groups=2, prefix="u")
    lvlm = StubLVLM()
    feedback = Feedback(lvlm, table, asked)
    oracle = ScoreOracle(feedback)
    queries = [asked.query(i) for i in asked.ids]
    chosen = oracle.select(queries, 5)
    for query, ids in zip(queries, chosen, strict=True):
        eligible = [i for i, g in zip(table.ids, table.groups, strict=True) if g is None or g != query.group]
        taste = {i: StubLVLM.taste(feedback.request(query.id, [i])) for i in eligible}
        assert ids == sorted(eligible, key=lambda i: -taste[i])[:5]
    paid = len(lvlm.scored)
    assert oracle.select(queries, 2) == [ids[:2] for ids in chosen]
    assert len(lvlm.scored) == paid


def test_retrieved_shows_what_the_retriever_finds(tmp_path):
    support, asked = coloured_table(9), coloured_table(2, seed=5, prefix="u")
    retriever = DemoRetriever.from_encoder(tiny_clip(tmp_path), support=support, strategy="sit", device="cpu")
    strategy = Retrieved("sit", retriever)
    queries = [asked.query(i) for i in asked.ids] + [support.query("r0")]
    chosen = strategy.select(queries, 50)
    assert [len(ids) for ids in chosen] == [9, 9, 7]
    assert chosen[:2] == [r.ids for r in retriever(queries[:2], k=9)]
    assert not set(chosen[2]) & forbidden(support, "r0")


# The evaluator


SUPPORT = worded_table(12)
ASKED = worded_table(4, prefix="u")


class Listed:
    """What it is told, whatever is asked."""

    name = "listed"

    def __init__(self, ids):
        self.ids = ids

    def select(self, queries, k):
        return [self.ids[:k] for _ in queries]


def test_the_best_demonstration_stands_last_and_the_metric_counts_answers():
    lvlm = StubLVLM()
    ids = ["t0", "t1", "t2"]  # bako, delu, fimo
    result = ICLEvaluator(lvlm, SUPPORT, ASKED).evaluate(Listed(ids), 3)
    assert [[d.id for d in r.demonstrations] for r in lvlm.asked] == [["t2", "t1", "t0"]] * 4 == result.ids
    assert result.answers == ["bako"] * 4
    assert result.values.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert (result.mean, result.strategy, result.shots, result.metric) == (0.25, "listed", 3, "exact_match")
    first = ICLEvaluator(StubLVLM(), SUPPORT, ASKED, order="best_first").evaluate(Listed(ids), 3)
    assert first.ids == [ids] * 4
    assert first.answers == ["fimo"] * 4


def test_the_lvlm_never_sees_drafts_or_gold_answers():
    lvlm = StubLVLM()
    drafts = dict.fromkeys(ASKED.ids, "a draft")
    evaluator = ICLEvaluator(lvlm, SUPPORT, ASKED, drafts=drafts)
    seen = []

    class Spy(Listed):
        def select(self, queries, k):
            seen.extend(queries)
            return super().select(queries, k)

    evaluator.evaluate(Spy(["t0"]), 1)
    assert [q.draft for q in seen] == ["a draft"] * 4  # the strategy does
    assert all(r.query.draft is None and r.responses == () for r in lvlm.asked)


def test_nothing_is_generated_twice_with_a_store(tmp_path):
    path = tmp_path / "scores.sqlite"
    lvlm, again = StubLVLM(), StubLVLM()
    first = ICLEvaluator(lvlm, SUPPORT, ASKED, store=ScoreStore(path)).evaluate(Listed(["t0", "t5"]), 2)
    assert len(lvlm.asked) == 4
    evaluator = ICLEvaluator(again, SUPPORT, ASKED, store=ScoreStore(path))
    second = evaluator.evaluate(Listed(["t0", "t5"]), 2)
    assert again.asked == []
    assert second.answers == first.answers
    evaluator.evaluate(Listed(["t5", "t0"]), 2)  # another order is another request
    assert len(again.asked) == 4


def test_seeds_are_averaged_and_listed():
    evaluator = ICLEvaluator(StubLVLM(), SUPPORT, ASKED)
    seeds = [Listed(["t0"]), Listed(["t1"])]
    result = evaluator.evaluate(seeds, 1)
    np.testing.assert_allclose(result.values, [0.5, 0.5, 0, 0])
    assert result.seed_means == (0.25, 0.25)
    row = result.to_dict()
    assert row["metric"] == 0.25
    assert row["ci"][0] <= 0.25 <= row["ci"][1]
    assert row["seeds"] == [0.25, 0.25]
    assert "seeds" not in evaluator.evaluate(Listed(["t0"]), 1).to_dict()


def test_references_count_as_gold_answers():
    asked = TripletTable.from_dataset(
        [{"id": "v", "prompt": "which?", "response": "gusa", "references": ["gusa", "delu"]}]
    )
    assert ICLEvaluator(StubLVLM(), SUPPORT, asked).evaluate(Listed(["t1"]), 1).mean == 1.0


def test_leaks_raise_unless_told_otherwise():
    leaky = SUPPORT.select(["t3", "t4"])
    with pytest.raises(LeakError, match="t3"):
        ICLEvaluator(StubLVLM(), SUPPORT, leaky)
    result = ICLEvaluator(StubLVLM(), SUPPORT, leaky, on_leak="ignore").evaluate(ZeroShot(), 4)
    assert result.answers == ["unsure", "unsure"]
    assert result.ids == [[], []]


def test_a_metric_of_each_kind_of_query():
    result = ICLEvaluator(StubLVLM(), SUPPORT, ASKED).evaluate(Listed(["t0"]), 1)
    assert result.by(["yes/no", "number", "number", "other"]) == {"yes/no": 1.0, "number": 0.0, "other": 0.0}
    with pytest.raises(ValueError, match="2 kinds"):
        result.by(["yes/no", "other"])


# Closed label sets, by likelihood


class LabelLVLM:
    """Gives each label the logit that the query's prompt lists for it; a demonstration of a label adds one."""

    fingerprint = "labels-1"

    def __init__(self):
        self.scored = 0

    @staticmethod
    def logits(request):
        listed = dict(zip(("no", "yes", "maybe"), map(float, request.query.prompt.split()), strict=False))
        shown = [d.response for d in request.demonstrations]
        return np.array([listed[label] + shown.count(label) for label in request.choices])

    def score(self, requests):
        self.scored += len(requests)
        values = [self.logits(r) for r in requests]
        return np.array(
            [
                v[r.choices.index(r.responses[0])] - np.logaddexp.reduce(v)
                for v, r in zip(values, requests, strict=True)
            ]
        )

    def generate(self, requests, *, max_new_tokens=32):
        raise AssertionError("nothing is to be generated")


def labelled(prompts, responses, prefix):
    return TripletTable.from_dataset(
        [
            {"id": f"{prefix}{i}", "prompt": prompt, "response": response, "label": response}
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
    )


LABELLED = labelled(["a", "b", "c"], ["no", "yes", "no"], "s")


def binary(count=40, seed=0):
    rng = np.random.default_rng(seed)
    gold = rng.choice(["no", "yes"], count).tolist()
    logits = rng.normal(size=(count, 2)) + [[0.0, g == "yes"] for g in gold]
    logits[-6:] = logits[:6]  # ties, some of them between the classes
    return labelled([f"{a} {b}" for a, b in logits.tolist()], gold, "q"), logits, np.array(gold)


def test_roc_auc_by_likelihood_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    asked, logits, gold = binary()
    lvlm = LabelLVLM()
    evaluator = ICLEvaluator(lvlm, LABELLED, asked, metric="roc_auc")
    result = evaluator.evaluate(ZeroShot(), 0)
    margin = logits[:, 1] - logits[:, 0]
    assert result.mean == pytest.approx(roc_auc_score(gold == "yes", margin), abs=1e-12)
    assert lvlm.scored == len(asked) - 6  # one label's probability is the other's; what repeats is asked once
    assert [item["yes"] for item in result.probabilities] == pytest.approx(1 / (1 + np.exp(-margin)))
    row = result.to_dict()
    assert row["ci"][0] < row["metric"] < row["ci"][1]
    swapped = ICLEvaluator(LabelLVLM(), LABELLED, asked, metric="roc_auc", choices=["yes", "no"])
    np.testing.assert_allclose(swapped.evaluate(ZeroShot(), 0).values, result.values, atol=1e-12)


def test_top1_by_likelihood_takes_the_likeliest_label_after_the_demonstrations():
    asked = labelled(["0.5 0", "0 0.5", "0 0", "3 0"], ["no", "yes", "yes", "no"], "q")
    evaluator = ICLEvaluator(LabelLVLM(), LABELLED, asked, metric="top1", scoring="likelihood")
    assert evaluator.evaluate(ZeroShot(), 0).answers == ["no", "yes", "no", "no"]  # of equals, the first
    result = evaluator.evaluate(Listed(["s1"]), 1)
    assert result.answers == ["yes", "yes", "yes", "no"]
    assert result.values.tolist() == [0.0, 1.0, 1.0, 1.0]
    three = ICLEvaluator(
        LabelLVLM(),
        LABELLED,
        labelled(["0 1 2", "2 1 0"], ["yes", "no"], "q"),
        metric="top1",
        scoring="likelihood",
        choices=["no", "yes", "maybe"],
    )
    assert three.evaluate(ZeroShot(), 0).answers == ["maybe", "no"]
    assert ICLEvaluator(StubLVLM(), SUPPORT, ASKED).evaluate(Listed(["t0"]), 1).probabilities is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "roc_auc", "scoring": "generation"}, ValueError, "generated answers do not have"),
        ({"metric": "roc_auc", "choices": ["no", "yes", "maybe"]}, ValueError, "expected 2 labels"),
        ({"scoring": "likelihood", "choices": ["no"]}, ValueError, "two labels or more"),
        ({"metric": "roc_auc", "choices": ["yes", "maybe"]}, RowError, "'q0'.*among the 2 labels"),
        ({"scoring": "guess"}, ValueError, "'guess'"),
    ],
)
def test_scoring_by_likelihood_refuses_before_anything_is_paid(options, error, message):
    asked = labelled(["0 1"], ["no"], "q")
    with pytest.raises(error, match=message):
        ICLEvaluator(LabelLVLM(), LABELLED, asked, **options)


# Feedback


def test_feedback_scores_pairs_once_and_weighs_annotators():
    asked = TripletTable.from_dataset(
        [{"id": "v", "prompt": "which?", "response": "a", "references": ["a", "b", "a"]}]
    )
    lvlm = StubLVLM()
    feedback = Feedback(lvlm, SUPPORT, asked)
    request = feedback.request("v", ["t0", "t1"])
    assert (request.responses, request.weights) == (("a", "b"), (2.0, 1.0))
    assert [d.id for d in request.demonstrations] == ["t0", "t1"]
    pairs = [("v", ("t0",)), ("v", ("t1",)), ("v", ("t0",))]
    assert feedback.plan(pairs) == (2, 0)
    scores = feedback.score(pairs)
    assert scores[0] == scores[2] == StubLVLM.taste(feedback.request("v", ["t0"]))
    assert feedback.plan(pairs) == (0, 2)
    assert len(lvlm.scored) == 2
    assert feedback.zero_shot(["v"]).tolist() == [-2.0]
    with pytest.raises(MissingIdError, match="nobody"):
        feedback.score([("v", ("nobody",))])


def test_closed_label_sets_score_the_label_over_the_choices():
    feedback = Feedback(StubLVLM(), SUPPORT, ASKED, choices=list(COLOURS))
    request = feedback.request("u1", ["t0"])
    assert (request.responses, request.choices) == (("delu",), tuple(COLOURS))


def test_drafts_are_zero_shot_and_generated_once():
    lvlm = StubLVLM()
    feedback = Feedback(lvlm, SUPPORT, ASKED)
    assert feedback.drafts(ASKED.ids) == feedback.drafts(ASKED.ids) == ["unsure"] * 4
    assert len(lvlm.asked) == 4
    assert all(r.demonstrations == () and r.responses == () and r.query.draft is None for r in lvlm.asked)


def test_a_class_that_only_queries_have_counts_as_wrong(caplog):
    evaluator = ICLEvaluator(
        LabelLVLM(), LABELLED, labelled(["0 1", "1 0"], ["robin", "no"], "q"), metric="top1", scoring="likelihood"
    )
    assert "1 queries, such as 'robin' of query 'q0'" in caplog.text
    result = evaluator.evaluate(ZeroShot(), 0)
    assert result.answers == ["yes", "no"] and result.values.tolist() == [0.0, 1.0]
