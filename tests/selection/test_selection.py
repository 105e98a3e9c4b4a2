"""Selectors against their definitions: every greedy choice is made again the slow way, every set compared with all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_table, forbidden, worded_table

from drum_hf.data import TripletTable
from drum_hf.errors import ContextOverflowError, DimensionMismatchError, NonFiniteScoreError, TooFewDemonstrationsError
from drum_hf.evaluation.strategies import Retrieved
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import ScoreStore
from drum_hf.selection import (
    DPP,
    MMR,
    AdaptiveShots,
    Candidates,
    Coverage,
    IsotonicUtility,
    LogisticUtility,
    Selector,
    TokenBudget,
    TopN,
    arrange,
    choose,
    fit_utility,
    get_selector,
)
from drum_hf.training import CandidateTable, calibrate
from drum_hf.types import Query

# Order

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


# Candidates

WORDS = ("bako", "delu", "fimo", "garu")
TABLE = TripletTable.from_dataset(
    [{"id": f"c{i}", "prompt": "what?" + " well?" * (i % 5), "response": WORDS[i % 4]} for i in range(40)]
)


def make(seed: int, count: int = 12, width: int = 9, *, copies: int = 0) -> Candidates:
    """Random unit vectors, ranked by their dot product with a random query; the last `copies` repeat the first."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, width)) + 0.5
    if copies:
        vectors[-copies:] = vectors[:copies]
    query = rng.normal(size=width) + 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query /= np.linalg.norm(query)
    order = np.argsort(-(vectors @ query), kind="stable")
    ids = [TABLE.ids[i] for i in rng.permutation(len(TABLE))[:count]]
    return Candidates(Query(None, "which?", id="q"), ids, (vectors @ query)[order], vectors[order], query, TABLE)


def count_words(requests) -> list[int]:
    """A stand-in for a tokenizer: words, and two tokens a turn."""
    return [
        sum(len(f"{d.prompt} {d.response}".split()) + 4 for d in r.demonstrations) + len(r.query.prompt.split()) + 2
        for r in requests
    ]


def every_selector() -> list[Selector]:
    return [
        TopN(),
        MMR(0.4),
        DPP(0.3),
        Coverage("parts"),
        Coverage("answers"),
        TokenBudget(count=count_words, tokens=45, base=MMR(0.6)),
        AdaptiveShots(IsotonicUtility((0.0, 1.0), (-0.3, 0.7)), base=DPP(0.5)),
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 14), k=st.integers(1, 16), copies=st.integers(0, 3))
def test_every_selector_chooses_different_candidates_as_many_as_it_may(seed, count, k, copies):
    candidates = make(seed, count, copies=min(copies, count // 2))
    for selector in every_selector():
        rows = choose(selector, candidates, k)  # raises where rows repeat, are not there or too many
        assert all(type(row) is int for row in rows)
        if selector.name not in ("budget", "adaptive"):
            assert len(rows) == min(k, count), selector
            assert choose(selector, candidates, k + 2)[: len(rows)] == rows, selector  # fewer shots begin more
        assert isinstance(selector, Selector) and get_selector(selector) is selector


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 14), k=st.integers(1, 16), copies=st.integers(0, 3))
def test_with_relevance_alone_every_diversity_is_plain_top_n(seed, count, k, copies):
    candidates = make(seed, count, copies=min(copies, count // 2))
    top = TopN()(candidates, k)
    assert top == list(range(min(k, count)))
    assert MMR(1.0)(candidates, k) == DPP(1.0)(candidates, k) == top
    assert DPP(1 - 1e-12)(candidates, min(k, 6))[:1] == top[:1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), relevance=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
def test_mmr_is_its_definition(seed, relevance):
    candidates = make(seed)
    likeness = candidates.vectors @ candidates.vectors.T
    rows = MMR(relevance)(candidates, 7)
    for at, row in enumerate(rows):
        free = [i for i in range(len(candidates)) if i not in rows[:at]]
        value = {
            i: relevance * candidates.scores[i]
            - (1 - relevance) * max((likeness[i, j] for j in rows[:at]), default=0.0)
            for i in free
        }
        assert value[row] == pytest.approx(max(value.values()), abs=1e-12)
        if relevance == 0.0 and not at:
            assert row == 0  # nothing to tell them apart: the best-ranked


def log_det(matrix: np.ndarray) -> float:
    sign, value = np.linalg.slogdet(matrix)
    return value if sign > 0 else -math.inf


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), relevance=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
def test_dpp_takes_what_adds_most_to_the_determinant_of_its_kernel(seed, relevance):
    candidates = make(seed)
    quality = np.exp(relevance / (2 * (1 - relevance)) * candidates.scores)
    kernel = quality[:, None] * (candidates.vectors @ candidates.vectors.T) * quality
    rows = DPP(relevance)(candidates, 6)
    for at, row in enumerate(rows):
        free = [i for i in range(len(candidates)) if i not in rows[:at]]
        value = {i: log_det(kernel[np.ix_([*rows[:at], i], [*rows[:at], i])]) for i in free}
        assert value[row] == pytest.approx(max(value.values()), abs=1e-8)


def test_dpp_of_orthogonal_vectors_is_by_score_and_of_duplicates_too_once_nothing_else_is_left():
    query = np.array([0.9, 0.3, np.sqrt(0.1)])
    vectors = np.eye(3)[[0, 0, 2, 1, 1]]
    candidates = Candidates(Query(None, "q"), TABLE.ids[:5], vectors @ query, vectors, query, TABLE)
    assert DPP(0.5)(candidates, 3) == [0, 2, 3]  # every determinant is that of the identity
    assert DPP(0.5)(candidates, 5) == [0, 2, 3, 1, 4]
    assert MMR(0.5)(candidates, 3) == [0, 2, 3]


def test_diversity_passes_over_a_twin_of_what_was_chosen():
    for seed in range(20):
        candidates = make(seed, copies=4)
        twins = {
            i: j
            for i, j in itertools.combinations(range(12), 2)
            if candidates.vectors[i] @ candidates.vectors[j] > 0.9999
        }
        assert twins
        for selector in (DPP(0.9), MMR(0.3)):
            rows = selector(candidates, 6)
            assert not any(i in rows and j in rows for i, j in twins.items()), (seed, selector)


def covered(covers: np.ndarray, rows) -> float:
    return covers[list(rows)].max(axis=0).sum()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
def test_coverage_against_every_set(seed, k):
    candidates = make(seed, 8)
    for of, least in (("parts", 1 - 1 / math.e), ("answers", 1.0)):
        selector = Coverage(of)
        covers = selector.covers(candidates)
        assert covers.min() >= 0
        best = max(covered(covers, rows) for rows in itertools.combinations(range(8), k))
        rows = selector(candidates, k)
        assert covered(covers, rows) >= least * best - 1e-12, of
        if k == 1:
            assert covered(covers, rows) == pytest.approx(best)


def test_what_the_parts_contribute_is_the_score_and_their_coverage_is_by_part():
    candidates = make(5)
    np.testing.assert_allclose(candidates.part_scores().sum(axis=1), candidates.scores, atol=1e-12)
    query = np.array([0.6, 0.6, np.sqrt(1 - 0.72)])
    vectors = np.array([[0.8, 0.6, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    scores = vectors @ query
    order = np.argsort(-scores, kind="stable")
    candidates = Candidates(Query(None, "q"), TABLE.ids[:4], scores[order], vectors[order], query, TABLE)
    assert Coverage()(candidates, 3) == [0, 3, 2]  # the best, the draft's part that it lacks, a better second part
    assert Coverage()(candidates, 4) == [0, 3, 2, 1]


def test_coverage_of_answers_shows_each_answer_once_before_it_shows_one_twice():
    table = TripletTable.from_dataset(
        [
            {"id": f"a{i}", "prompt": "what?", "response": response}
            for i, response in enumerate(["red", "blue", "Blue ", "blue", "red", "green"])
        ]
    )
    scores = np.array([0.90, 0.89, 0.88, 0.87, 0.5, 0.4])
    candidates = Candidates(Query(None, "q"), table.ids, scores, np.eye(6), np.ones(6) / math.sqrt(6), table)
    # three good ones say blue, one says red: blue has the larger share
    assert Coverage("answers")(candidates, 6) == [1, 0, 5, 2, 3, 4]
    assert Coverage("answers", temperature=1e-3)(candidates, 2) == [0, 1]  # only the best one's vote counts
    shares = Coverage("answers").covers(candidates).max(axis=0)
    assert shares.sum() == pytest.approx(1.0)
    e = np.exp((scores - 0.9) / 0.05)
    assert shares[0] == pytest.approx((e[0] + e[4]) / e.sum())


# Token budget


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(8, 120),
    k=st.integers(1, 10),
    reserve=st.integers(0, 5),
    base=st.sampled_from([TopN(), MMR(0.3), Coverage("answers")]),
)
def test_the_budget_is_never_exceeded_and_no_one_more_fits(seed, tokens, k, reserve, base):
    candidates = make(seed, 10)
    selector = TokenBudget(count=count_words, tokens=tokens, reserve=reserve, base=base)
    rows = choose(selector, candidates, k)
    assert selector.tokens(candidates, rows) <= tokens
    ranking = base(candidates, 10)
    assert rows == [row for row in ranking if row in rows]
    if len(rows) < k:  # whatever was left out could not have gone in
        for row in set(ranking) - set(rows):
            assert selector.tokens(candidates, [*rows, row]) > tokens
    if selector.tokens(candidates, ranking[:k]) <= tokens:
        assert rows == ranking[:k]


class CountingLVLM(StubLVLM):
    context_length = 30

    def count_tokens(self, requests):
        return count_words(requests)


def test_the_budget_is_the_lvlm_s_context_and_counts_with_it_behind_a_cache():
    lvlm = CountingLVLM()
    for given_lvlm in (lvlm, CachedLVLM(lvlm, ScoreStore())):
        selector = TokenBudget(given_lvlm, reserve=4)
        assert selector.limit == 30
        rows = selector(make(0), 8)
        assert 0 < len(rows) < 8 and selector.tokens(make(0), rows) <= 30
        assert selector.tokens(make(0), rows) == count_words_of(make(0), rows) + 4


def count_words_of(candidates, rows) -> int:
    shown = [candidates.demonstration(row) for row in rows]
    return 3 + sum(len(f"{d.prompt} {d.response}".split()) + 4 for d in shown)


def test_what_can_t_be_counted_or_fits_nothing_is_said():
    with pytest.raises(ValueError, match=r"StubLVLM, which has no count_tokens; pass .*count="):
        TokenBudget(StubLVLM(), tokens=100)
    with pytest.raises(ValueError, match="got no LVLM"):
        get_selector("budget")
    with pytest.raises(ValueError, match="pass tokens="):
        TokenBudget(count=count_words)
    with pytest.raises(ValueError, match="reserve of 0 or more"):
        TokenBudget(count=count_words, tokens=10, reserve=-1)
    with pytest.raises(ContextOverflowError, match=r"query 'q' and 32 tokens of answer to fit 20 .* they take 35"):
        TokenBudget(count=count_words, tokens=20)(make(0), 3)


# Adaptive number of shots

finite = st.floats(-5, 5, allow_nan=False, width=32)
pairs = st.lists(st.tuples(st.floats(-1, 1, width=32), finite), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(pairs=pairs, method=st.sampled_from(["isotonic", "logistic"]))
def test_a_calibration_never_falls_and_stays_within_what_it_saw(pairs, method):
    scores, utilities = np.array(pairs).T
    expected = fit_utility(scores, utilities, method=method)
    values = expected(np.linspace(-1.5, 1.5, 301))
    assert np.isfinite(values).all() and (np.diff(values) >= -1e-12).all()
    assert values.min() >= utilities.min() - 1e-6 and values.max() <= utilities.max() + 1e-6
    again = type(expected)(**json.loads(json.dumps(dataclasses.asdict(expected))))
    np.testing.assert_array_equal(again(scores), expected(scores))


@settings(max_examples=60, deadline=None)
@given(utilities=st.lists(finite, min_size=1, max_size=12))
def test_the_isotonic_calibration_is_the_max_min_formula(utilities):
    scores, y = np.linspace(-0.9, 0.9, len(utilities)), np.array(utilities)
    means = [
        max(min(y[a : b + 1].mean() for b in range(i, len(y))) for a in range(i + 1)) for i in range(len(utilities))
    ]
    np.testing.assert_allclose(fit_utility(scores, y)(scores), means, atol=1e-9)


def test_the_logistic_calibration_finds_the_probability_it_was_drawn_from():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.5, 1.0, 4000)
    chance = 1 / (1 + np.exp(-(20 * scores - 16)))
    utilities = np.where(rng.uniform(size=4000) < chance, 1.5, -0.5)
    expected = fit_utility(scores, utilities, method="logistic")
    assert isinstance(expected, LogisticUtility) and (expected.harm, expected.help) == (-0.5, 1.5)
    assert np.abs(expected(scores) - (2.0 * chance - 0.5)).max() < 0.08
    against = fit_utility(scores, -utilities, method="logistic")  # the score says the opposite: it tells nothing
    assert against([0.5, 1.0]).tolist() == pytest.approx([-utilities.mean()] * 2)
    assert fit_utility([0.1, 0.2], [-1.0, -2.0], method="logistic")([0.9]).tolist() == [-1.5]
    assert fit_utility([0.1, 0.1], [-1.0, 2.0], method="logistic")([0.9]).tolist() == [0.5]


def test_shots_stop_where_the_expected_utility_turns_negative():
    candidates = make(1)
    middle = float(candidates.scores[5] + candidates.scores[4]) / 2
    calibration = IsotonicUtility((middle - 1, middle, middle + 1), (-1.0, 0.0, 1.0))
    assert AdaptiveShots(calibration)(candidates, 12) == [0, 1, 2, 3, 4]
    assert AdaptiveShots(calibration)(candidates, 3) == [0, 1, 2]
    assert AdaptiveShots(calibration, threshold=2.0)(candidates, 3) == []
    assert AdaptiveShots(calibration, threshold=-2.0)(candidates, 12) == list(range(12))
    diverse = AdaptiveShots(calibration, base=MMR(0.0))
    assert sorted(diverse(candidates, 5)) == [0, 1, 2, 3, 4]
    assert diverse(candidates, 3) == MMR(0.0)(candidates.take(range(5)), 3)


def test_scores_and_utilities_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        fit_utility([0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match="one utility for each"):
        fit_utility([], [])
    with pytest.raises(NonFiniteScoreError, match="NaN"):
        fit_utility([0.1], [math.nan])
    with pytest.raises(ValueError, match="got 'linear'"):
        fit_utility([0.1], [1.0], method="linear")


# By name


def test_selectors_by_name():
    assert (
        get_selector("top") == TopN() and get_selector("mmr") == MMR() and get_selector("dpp", pool=9) == DPP(pool=9)
    )
    assert get_selector("coverage") == Coverage("parts") and get_selector("answers") == Coverage("answers")
    assert [get_selector(n).name for n in ("top", "mmr", "dpp", "coverage", "answers")] == [
        "top",
        "mmr",
        "dpp",
        "coverage",
        "answers",
    ]
    assert get_selector("adaptive", calibration=IsotonicUtility((0.0,), (1.0,))).name == "adaptive"
    assert get_selector("budget", count=count_words, tokens=40).name == "budget"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nearest", {}, "top, mmr, dpp, coverage, answers, budget, adaptive, got 'nearest'"),
        ("mmr", {"width": 3}, "'mmr' can't be made with width"),
        ("adaptive", {}, "calibration="),
        ("mmr", {"relevance": 1.5}, r"in \[0, 1\].*got 1.5"),
        ("dpp", {"pool": -1}, "pool of 0 candidates or more"),
        ("coverage", {"of": "words"}, "got 'words'"),
        ("answers", {"temperature": 0}, "above 0"),
    ],
)
def test_what_is_no_selector_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_selector(name, **options)


def test_what_is_no_selector_at_all_and_what_chooses_wrongly():
    with pytest.raises(TypeError, match="got int"):
        get_selector(4)
    with pytest.raises(ValueError, match="with a name"):
        get_selector(MMR(), relevance=0.2)
    with pytest.raises(DimensionMismatchError, match=r"\(12,\)"):
        dataclasses.replace(make(0), scores=np.zeros(3))

    class Wrong:
        name, pool = "wrong", 5

        def __init__(self, rows):
            self.rows = rows

        def __call__(self, candidates, k):
            return self.rows

    for rows in ([0, 0], [12], [-1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="selector 'wrong' to choose at most 3 different rows of 12"):
            choose(Wrong(rows), make(0), 3)


# In a retriever


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def support():
    return coloured_table(14)


@pytest.fixture(scope="module")
def retriever(clip, support):
    return DemoRetriever.from_encoder(clip, support=support, strategy="sit+draft", device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def queries(support):
    asked = coloured_table(4, seed=5, prefix="u")
    return [asked.query(i, draft="bako") for i in asked.ids] + [support.query(i) for i in ("r0", "r7")]


def same(found, other) -> bool:
    return found[0] == other[0] and all(np.array_equal(a, b) for a, b in zip(found[1], other[1], strict=True))


def test_no_selector_and_top_are_the_plain_search_to_the_bit(retriever, queries):
    groups, ids = [q.group for q in queries], [q.id for q in queries]
    plain = retriever.index.search(retriever.encode_queries(queries), 4, exclude_ids=ids, exclude_groups=groups)
    for selector in (None, "top", TopN()):
        assert same(retriever.retrieve_ids(queries, 4, selector=selector), plain)
    assert same(retriever.retrieve_ids(queries, 4), plain)


@pytest.mark.parametrize("selector", ["mmr", "dpp", "coverage", "answers", MMR(0.0, pool=100)])
def test_a_retriever_s_selector_sees_what_the_index_found_and_never_the_query_s_own(
    retriever, queries, support, selector
):
    ids, scores = retriever.retrieve_ids(queries, 4, selector=selector)
    made = get_selector(selector)
    for query, found, values in zip(queries, ids, scores, strict=True):
        pool, pool_scores = retriever.retrieve_ids([query], len(support))
        vectors = retriever.index.vectors(pool[0])
        candidates = Candidates(query, pool[0], pool_scores[0], vectors, retriever.encode_queries([query])[0], support)
        rows = made(candidates, 4)
        assert found == [pool[0][row] for row in rows] and len(set(found)) == 4
        np.testing.assert_allclose(values, pool_scores[0][rows], atol=1e-6)
        if query.id in support.ids:
            assert not set(found) & forbidden(support, query.id)
    called = retriever(queries, k=4, selector=selector)
    assert [r.ids for r in called] == ids == Retrieved("x", retriever, selector=selector).select(queries, 4)
    assert [r.ids for r in retriever((q for q in queries), k=4, selector=selector)] == ids
    assert retriever(queries[0], k=4, selector=selector).ids == ids[0]
    assert ids != retriever.retrieve_ids(queries, 4)[0] or selector == "coverage"
    assert [len(i) for i in retriever.retrieve_ids(queries, 14, selector=selector)[0]] == [14] * 4 + [12, 12]
    assert retriever.retrieve_ids([], 3, selector=selector) == ([], [])


def test_a_selector_of_one_s_own_is_given_what_was_found(retriever, queries, support):
    class OneAnswer:
        name, pool = "one-answer", 100

        def __call__(self, candidates, k):
            assert candidates.query.draft == "bako" or candidates.query.id in support.ids
            assert len(candidates) == len(candidates.responses) and k == 3
            assert candidates.part_scores().sum(axis=1) == pytest.approx(candidates.scores, abs=1e-5)
            return [row for row, word in enumerate(candidates.responses) if word == candidates.responses[0]][:k]

    for query, found in zip(queries, retriever(queries, k=3, selector=OneAnswer()), strict=True):
        best = retriever(query, k=1)
        assert {d.response for d in found.demonstrations} == {best.demonstrations[0].response}
        assert found.ids[0] == best.ids[0] and 1 <= len(found.ids) <= 3
        assert all(a >= b for a, b in itertools.pairwise(found.scores))


def test_a_retriever_with_a_selector_refuses_what_it_refuses_without(retriever, queries):
    with pytest.raises(ValueError, match="k is at least 1"):
        retriever(queries, k=0, selector="mmr")
    with pytest.raises(TooFewDemonstrationsError):
        retriever(queries, k=15, selector="mmr")
    for call in (
        retriever,
        retriever.retrieve_ids,
        lambda _, k, selector: Retrieved("x", retriever, selector=selector),
    ):
        with pytest.raises(ValueError, match="got 'nearest'"):
            call(iter(queries), k=2, selector="nearest")


def test_a_query_that_nothing_may_demonstrate_gets_nothing(clip):
    table = TripletTable.from_dataset(
        [{"id": f"t{i}", "prompt": f"ask {i}", "response": "yes", "group": "one"} for i in range(3)]
    )
    retriever = DemoRetriever.from_encoder(clip, support=table, strategy="st", device="cpu")
    for selector in every_selector():
        assert retriever(table.query("t0"), k=2, selector=selector).ids == []


def test_a_calibration_from_a_candidate_table_and_from_pairs_is_the_same(clip):
    table = worded_table(18, groups=3)
    retriever = DemoRetriever.from_encoder(clip, support=table, strategy="sit+draft", device="cpu")
    lvlm = StubLVLM()
    feedback = Feedback(lvlm, table, table)
    asked = list(table.ids[:6])
    mined = {q: [(d, 0) for d in table.ids if d not in forbidden(table, q)][:7] for q in asked}
    flat = [(q, d) for q, found in mined.items() for d, _ in found]
    scored = CandidateTable(table.ids)
    scored.extend(mined, feedback.score([(q, (d,)) for q, d in flat]))
    for method in ("isotonic", "logistic"):
        expected = calibrate(retriever, feedback, scored, method=method)
        assert expected == calibrate(retriever, feedback, flat, method=method)
        drafts = feedback.drafts(asked)
        vectors = retriever.encode_queries([table.query(q, draft=d) for q, d in zip(asked, drafts, strict=True)])
        by_id = dict(zip(asked, vectors, strict=True))
        x = [float(retriever.index.reconstruct(d) @ by_id[q]) for q, d in flat]
        y = [lvlm.taste(feedback.request(q, [d])) - -2.0 for q, d in flat]
        np.testing.assert_allclose(expected(np.array(x)), fit_utility(x, y, method=method)(np.array(x)), atol=1e-4)
    with pytest.raises(ValueError, match="got none"):
        calibrate(retriever, feedback, CandidateTable(table.ids))
