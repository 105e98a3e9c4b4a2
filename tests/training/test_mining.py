"""The candidate table: what it samples, what mining adds to it, and what survives a file."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import forbidden, worded_table

from drum_hf.errors import MissingIdError, SavedFileError
from drum_hf.training import mining
from drum_hf.training.mining import CandidateTable, doubts, mine_candidates, mine_set_level


def pool_of(scores, places):
    table = CandidateTable(["q"])
    table.extend({"q": [(f"c{i}", place) for i, place in enumerate(places)]}, scores)
    return table


#: A pool of candidates with distinct scores and places, so that "the five best" is no matter of ties.
pools = st.integers(1, 24).flatmap(
    lambda n: st.tuples(st.permutations([-0.1 * (i + 1) for i in range(n)]), st.permutations(range(n)))
)


def hard_ids(scores, places):
    """In the best third of one ranking and the worst third of the other."""
    size, third = len(scores), len(scores) // 3
    liked = sorted(range(size), key=lambda i: -scores[i])
    found = sorted(range(size), key=lambda i: places[i])
    ends = [set(order[:third]) for order in (liked, found)] + [set(order[size - third :]) for order in (liked, found)]
    return {f"c{i}" for i in (ends[0] & ends[3]) | (ends[1] & ends[2])}


@settings(max_examples=100, deadline=None)
@given(pool=pools, size=st.integers(1, 10), ends=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_lists_are_drawn_over_the_whole_range(pool, size, ends, seed):
    scores, places = pool
    table = pool_of(scores, places)
    ids, drawn = table.sample("q", size, np.random.default_rng(seed), ends=ends)
    assert len(ids) == min(size, len(scores))
    assert len(set(ids)) == len(ids)
    assert drawn == [table.candidates("q")[i] for i in ids]
    assert table.sample("q", size, np.random.default_rng(seed), ends=ends) == (ids, drawn)
    if len(ids) >= 2:
        ranked = [f"c{i}" for i in np.argsort([-s for s in scores])]
        count = max(1, min(ends, len(scores) // 2))
        assert set(ids) & set(ranked[:count])
        assert set(ids) & set(ranked[-count:])
    hard = hard_ids(scores, places)
    if hard and len(ids) >= 3:
        assert set(ids) & hard


@settings(max_examples=60, deadline=None)
@given(pool=pools, size=st.integers(2, 10), ends=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_contrastive_lists_are_one_of_the_best_then_some_of_the_worst(pool, size, ends, seed):
    scores, places = pool
    table = pool_of(scores, places)
    ids, drawn = table.sample("q", size, np.random.default_rng(seed), sampling="contrastive", ends=ends)
    ranked = [f"c{i}" for i in np.argsort([-s for s in scores])]
    count = max(1, min(ends, len(scores) // 2))
    assert ids[0] in ranked[:count]
    assert set(ids[1:]) <= set(ranked[-count:]) - {ids[0]}
    assert len(set(ids)) == len(ids) == (1 if len(scores) == 1 else min(size, 1 + count))
    assert drawn == [table.candidates("q")[i] for i in ids]
    assert drawn[0] == max(drawn)


@settings(max_examples=100, deadline=None)
@given(pool=pools, size=st.integers(2, 10), ends=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_udrs_lists_hold_exactly_one_of_the_best_and_one_of_the_worst(pool, size, ends, seed):
    scores, places = pool
    rng = np.random.default_rng(seed)
    ids, _ = pool_of(scores, places).sample("q", size, rng, ends=ends, hard=False, ends_once=True)
    assert len(ids) == len(set(ids)) == min(size, len(scores))
    if 2 <= size < len(scores):
        ranked = [f"c{i}" for i in np.argsort([-s for s in scores])]
        count = max(1, min(ends, (len(scores) - size + 2) // 2))  # as many as leave enough between
        assert [len(set(ids) & set(side)) for side in (ranked[:count], ranked[-count:])] == [1, 1]


def test_udrs_lists_of_fifty_candidates_have_five_at_each_end():
    table, drawn = pool_of([-0.1 * i for i in range(50)], range(50)), []
    for seed in range(300):
        ids, _ = table.sample("q", 8, np.random.default_rng(seed), hard=False, ends_once=True)
        drawn.append(sorted(int(i[1:]) for i in ids))
    assert {row[0] for row in drawn} == set(range(5)) and {row[-1] for row in drawn} == set(range(45, 50))
    assert {number for row in drawn for number in row[1:-1]} == set(range(5, 45))


@pytest.mark.parametrize(("negatives", "length"), [(1, 2), (3, 4), (None, 6), (9, 6)])
def test_contrastive_lists_have_as_many_negatives_as_asked(negatives, length):
    table, lists = pool_of([-0.1 * i for i in range(20)], range(20)), []
    for seed in range(100):
        ids, _ = table.sample("q", 8, np.random.default_rng(seed), sampling="contrastive", negatives=negatives)
        lists.append([int(i[1:]) for i in ids])
    assert {len(ids) for ids in lists} == {length}
    assert {ids[0] for ids in lists} == set(range(5)) and {i for ids in lists for i in ids[1:]} == set(range(15, 20))


def test_hard_candidates_are_in_the_best_third_of_one_ranking_and_the_worst_of_the_other():
    # nine candidates, thirds of three; liked in the order c0 … c8. c2 is the third best and placed seventh, c6 the
    # seventh best and placed third; c3 and c5, one place further in, are not hard
    places = [3, 4, 6, 8, 1, 0, 2, 7, 5]
    table = pool_of([-float(n) for n in range(9)], places)
    drawn = {i for seed in range(200) for i in table.sample("q", 3, np.random.default_rng(seed), ends=1)[0]}
    assert drawn == {"c0", "c8", "c2", "c6"}


def test_an_empty_pool_gives_an_empty_list_and_a_strange_query_an_error():
    table = CandidateTable(["q"])
    for sampling in ("listwise", "contrastive"):
        assert table.sample("q", 8, np.random.default_rng(0), sampling=sampling) == ([], [])
    with pytest.raises(MissingIdError, match="'other'"):
        table.sample("other", 8, np.random.default_rng(0))


def test_extend_appends_in_the_flat_order_of_the_scores():
    table = CandidateTable(["a", "b"])
    table.extend({"a": [("x", 0), ("y", 1)], "b": [("x", 4)]}, [-1.0, -2.0, -3.0])
    table.extend({"a": [("z", 0)], "b": []}, [-4.0])
    assert list(table.rows()) == [
        ("a", "x", -1.0, 0, 0, None),
        ("a", "y", -2.0, 1, 0, None),
        ("a", "z", -4.0, 0, 1, None),
        ("b", "x", -3.0, 4, 0, None),
    ]
    assert (len(table), table.rounds, table.bought, table.query_ids) == (4, 2, [3, 4], ["a", "b"])


# Set-level scoring


def at_set_level(weight=0.5):
    table = CandidateTable(["q", "other"], set_level_weight=weight)
    table.extend({"q": [(i, 0) for i in "abcd"]}, np.log([0.1, 0.8, 0.2, 0.1]))
    table.extend_set_level({"q": ["a", "c"], "other": []}, np.log([0.7, 0.3]))
    return table


def test_worth_is_the_mean_of_what_a_demonstration_does_alone_and_at_set_level():
    # b is the companion, better alone than the others at set level (0.5 in the mean, which is also d's)
    for weight in (0.5, 0.25):
        worth = at_set_level(weight).candidates("q")
        expected = [
            (1 - weight) * alone + weight * beside
            for alone, beside in ((0.1, 0.7), (0.8, 0.8), (0.2, 0.3), (0.1, 0.5))
        ]
        np.testing.assert_allclose([math.exp(worth[i]) for i in "abcd"], expected, atol=1e-12)


def test_scores_at_set_level_are_of_candidates_that_are_there():
    with pytest.raises(MissingIdError, match="candidate 'z' of query 'q' was not scored alone"):
        at_set_level().extend_set_level({"q": ["z"]}, [-1.0])
    with pytest.raises(ValueError, match="each of 1 candidates, got 2"):
        at_set_level().extend_set_level({"q": ["d"]}, [-1.0, -2.0])


def test_a_companion_counts_as_the_others_where_they_do_better_with_it_than_it_does_alone():
    table = CandidateTable(["q"], set_level_weight=0.5)
    table.extend({"q": [("a", 0), ("b", 0)]}, np.log([0.1, 0.3]))
    table.extend_set_level({"q": ["a"]}, [math.log(0.9)])
    assert math.exp(table.candidates("q")["b"]) == pytest.approx((0.3 + 0.9) / 2)


def test_scores_at_set_level_are_kept_beside_those_alone():
    table = at_set_level()
    assert (table.companion("q"), table.alone("q")) == ("b", ["d"])
    assert (table.companion("other"), table.alone("other"), table.candidates("other")) == (None, [], {})
    assert len(table) == 6 and table.bought == [4, 6]
    assert [(c, row[-1]) for _, c, *row in table.rows()] == [
        ("a", math.log(0.7)),
        ("b", None),
        ("c", math.log(0.3)),
        ("d", None),
    ]
    ids, scores = table.sample("q", 4, np.random.default_rng(0))
    assert scores == [table.candidates("q")[i] for i in ids]


def test_scored_are_the_candidates_in_their_order():
    table = at_set_level()
    for query_id in table.query_ids:
        assert table.scored(query_id) == list(table.candidates(query_id))
    with pytest.raises(MissingIdError):
        table.scored("nobody")


def test_impossible_answers_are_worth_little_and_no_infinity():
    table = CandidateTable(["q"])
    table.extend({"q": [("a", 0), ("b", 0)]}, [-1e4, -1e4])
    table.extend_set_level({"q": ["b"]}, [-1e4])
    assert np.isfinite(list(table.candidates("q").values())).all()


class Placed:
    """A retriever whose support set lies on a circle, so that cosines to a query tell every place."""

    def __init__(self, angles):
        self.angles, self.index = angles, self

    def vectors(self, ids):
        return np.array([[math.cos(self.angles[i]), math.sin(self.angles[i])] for i in ids])

    def encode_queries(self, queries):
        return np.array([[1.0, 0.0]] * len(queries))


def test_the_best_ranked_are_asked_for_at_set_level_but_never_the_companion():
    table = CandidateTable(["q", "r", "s"])
    table.extend({"q": [(i, 0) for i in "abcd"], "r": [("a", 0)], "s": []}, [-3.0, -0.1, -2.0, -1.0, -1.0])
    retriever = Placed({"a": 0.3, "b": 0.0, "c": 0.1, "d": 0.2})
    for batch_size in (1, 512):
        asked = mine_set_level(retriever, table, lambda q: None, count=2, batch_size=batch_size)
        assert asked == {"q": ["c", "d"], "r": [], "s": []}
    table.extend_set_level(asked, [-1.0, -2.0])
    assert mine_set_level(retriever, table, lambda q: None, count=2) == {"q": ["a"], "r": [], "s": []}


# Mining


class RankedRetriever:
    """Ranks the support set at random for each query, leaving out what may not demonstrate it."""

    def __init__(self, support, seed):
        self.support, self.seed, self.rankings = support, seed, {}

    def ranking(self, query_id):
        if query_id not in self.rankings:
            order = np.random.default_rng([self.seed, self.support.row(query_id)]).permutation(len(self.support))
            banned = forbidden(self.support, query_id)
            self.rankings[query_id] = [i for i in (self.support.ids[r] for r in order) if i not in banned]
        return self.rankings[query_id]

    def retrieve_ids(self, queries, k):
        assert 1 <= k <= len(self.support)
        return [self.ranking(q.id)[:k] for q in queries], [np.zeros(k)] * len(queries)


SUPPORT = worded_table(18, groups=3)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 1000),
    batch_size=st.sampled_from([4, 512]),
)
def test_rounds_propose_count_new_ones_and_never_the_same_pair_twice(count, share, seed, batch_size):
    retriever, table = RankedRetriever(SUPPORT, seed), CandidateTable(SUPPORT.ids)
    for round_ in range(3):
        mined = mine_candidates(
            retriever,
            table,
            SUPPORT.query,
            count=count,
            random_share=share if round_ == 0 else 0.0,
            rng=np.random.default_rng(seed),
            batch_size=batch_size,
        )
        assert list(mined) == SUPPORT.ids
        for query_id, found in mined.items():
            ids, known = [candidate for candidate, _ in found], table.candidates(query_id)
            left = [i for i in retriever.ranking(query_id) if i not in known]
            assert len(ids) == len(set(ids)) == min(count, len(left))
            assert not set(ids) & (forbidden(SUPPORT, query_id) | set(known))
            ranked = [(candidate, place) for candidate, place in found if place < len(SUPPORT)]
            assert [c for c, _ in ranked] == left[: len(ranked)]
            assert all(retriever.ranking(query_id)[place] == c for c, place in ranked)
            drawn = round(count * share) if round_ == 0 else 0
            assert len(ranked) == min(count - drawn, len(left))
        table.extend(mined, np.zeros(sum(map(len, mined.values()))))
    assert table.rounds == 3


def test_queries_apart_from_the_support_set():
    queries = worded_table(5, groups=2, prefix="u")  # groups named as the support set's
    retriever = RankedRetriever(SUPPORT, 0)
    retriever.ranking = lambda query_id: [
        i
        for i, g in zip(SUPPORT.ids, SUPPORT.groups, strict=True)
        if g is None or g != queries.groups[queries.row(query_id)]
    ]
    mined = mine_candidates(
        retriever,
        CandidateTable(queries.ids),
        queries.query,
        count=18,
        random_share=0.5,
        rng=np.random.default_rng(0),
    )
    for query_id, found in mined.items():
        assert sorted(c for c, _ in found) == sorted(retriever.ranking(query_id))


@pytest.mark.parametrize("total", [1, 50, 5000])
def test_random_rows_are_all_rows_in_random_order(total):
    drawn = list(mining._random_rows(total, np.random.default_rng(0)))
    assert sorted(drawn) == list(range(total))
    assert drawn == list(mining._random_rows(total, np.random.default_rng(0)))
    first = [next(iter(mining._random_rows(total, np.random.default_rng(seed)))) for seed in range(200)]
    assert abs(np.mean(first) - (total - 1) / 2) < 4 * total / np.sqrt(12 * 200)


def test_a_random_draw_from_many_rows_looks_at_few_of_them():
    class Watched(np.random.Generator):
        def permutation(self, *args, **kwargs):
            raise AssertionError("all rows were permuted")

    rows = mining._random_rows(1_000_000, Watched(np.random.PCG64(0)))
    assert len({next(rows) for _ in range(500)}) == 500


def test_a_table_takes_little_more_than_its_numbers():
    table, count = CandidateTable([f"q{i}" for i in range(2000)]), 30
    tracemalloc.start()
    mined = {f"q{i}": [(f"c{(7 * i + j) % 3000}", j) for j in range(count)] for i in range(2000)}
    table.extend(mined, np.zeros(2000 * count))
    del mined
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / len(table) < 40  # bytes a pair; objects of Python would be 75 and more


def test_scores_must_be_as_many_as_pairs():
    with pytest.raises(ValueError, match="each of 2 pairs, got 1"):
        CandidateTable(["a"]).extend({"a": [("x", 0), ("y", 1)]}, [-1.0])


# Files


def grown():
    table = CandidateTable(["a", "b", "ü"])
    table.extend({"a": [("x", 0), ("y", 18)], "b": [("x", 4)]}, [-0.1, -1 / 3, -3.0])
    table.extend({"a": [("z", 2)]}, [-4.5e-7])
    table.extend_set_level({"a": ["y"]}, [-0.25])
    return table


@pytest.mark.parametrize("table", [grown(), CandidateTable(["a"]), CandidateTable([])], ids=["grown", "new", "empty"])
def test_a_file_gives_back_the_same_table(tmp_path, table):
    table.save(tmp_path / "candidates.parquet")
    loaded = CandidateTable.load(tmp_path / "candidates.parquet")
    assert list(loaded.rows()) == list(table.rows())
    assert (loaded.query_ids, loaded.bought) == (table.query_ids, table.bought)
    assert [p.name for p in tmp_path.iterdir()] == ["candidates.parquet"]  # nothing half-written is left
    for query_id in table.query_ids:
        drawn = [t.sample(query_id, 2, np.random.default_rng(3)) for t in (table, loaded)]
        assert drawn[0] == drawn[1]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def without_metadata(path):
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def with_state(**changes):
    def change(path):
        table = pq.read_table(path)
        state = json.loads(table.schema.metadata[b"drum_hf"]) | changes
        pq.write_table(table.replace_schema_metadata({"drum_hf": json.dumps(state)}), path)

    return change


def twice(path):
    """The first pair stands there again, and its score was counted."""
    table = pq.read_table(path)
    state = json.loads(table.schema.metadata[b"drum_hf"])
    state["bought"] = [n + 1 for n in state["bought"]]
    more = pa.concat_tables([table.slice(0, 1), table])
    pq.write_table(more.replace_schema_metadata({"drum_hf": json.dumps(state)}), path)


def with_score(value):
    def change(path):
        table = pq.read_table(path)
        scores = [value, *table["score"].to_pylist()[1:]]
        column = table.schema.get_field_index("score")
        pq.write_table(table.set_column(column, table.schema.field("score"), pa.array(scores, pa.float64())), path)

    return change


def other_columns(path):
    metadata = pq.read_table(path).schema.metadata
    pq.write_table(pa.table({"query_id": ["a"]}).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    "fault",
    [
        lambda path: path.unlink(),
        truncated,
        lambda path: path.write_text("not parquet"),
        without_metadata,
        with_state(format_version=3),
        with_state(format_version=1),
        with_state(query_ids=["a"]),  # pairs of a query that is not listed
        with_state(query_ids=None),
        with_state(bought="many"),
        with_state(bought=[3, 4, 6]),  # five scores are there
        with_state(bought=[2, 4, 5]),
        with_state(bought=[4, 3, 5]),
        with_state(bought=[3, 5]),
        twice,
        with_score(np.nan),
        with_score(np.inf),
        other_columns,
    ],
)
def test_a_broken_file_is_named(tmp_path, fault):
    path = tmp_path / "candidates.parquet"
    grown().save(path)
    fault(path)
    with pytest.raises(SavedFileError, match=r"candidates\.parquet"):
        CandidateTable.load(path)


# Doubts


def rated(*lists):
    table = CandidateTable([f"q{i}" for i in range(len(lists))])
    mined = {f"q{i}": [(f"c{j}", j) for j in range(len(own))] for i, own in enumerate(lists)}
    table.extend(mined, np.log([p for own in lists for p in own]))
    return table


def test_a_table_that_can_teach_raises_no_doubt():
    assert doubts(rated([0.2, 0.6], [0.3, 0.35], [0.1, 0.5])) == []  # the medians count, not each query
    assert doubts(rated([0.5, 0.515], [], [0.2, 0.22])) == []
    assert doubts(CandidateTable(["q"])) == [] and doubts(CandidateTable([])) == []


def test_demonstrations_that_change_nothing_are_told():
    (sentence,) = doubts(rated([0.5, 0.504], [0.2, 0.203], [0.1, 0.9]))
    assert "hardly depend on the demonstration" in sentence and "differ by 0.004" in sentence


def test_hopeless_gold_answers_are_told():
    (sentence,) = doubts(rated([1e-6, 0.002], [1e-5, 0.003], [0.1, 0.9]))
    assert "nearly impossible" in sentence and "median probability 0.003" in sentence


def test_labels_with_few_queries_are_told():
    labels = ["cat"] * 5 + ["dog"] * 4 + ["ant"]
    (sentence,) = doubts(rated(*[[0.2, 0.6]] * 10), labels)
    assert sentence.startswith("2 of 3 labels have fewer than 5 training queries (such as 'ant')")


def test_a_summary_says_what_each_round_bought():
    table = CandidateTable(["q0", "q1"])
    table.extend({"q0": [("a", 0), ("b", 1)], "q1": [("a", 0)]}, np.log([0.1, 0.3, 0.2]))
    table.extend({"q0": [("c", 0)]}, np.log([0.2]))
    table.extend_set_level({"q0": ["a"], "q1": ["a"]}, np.log([0.5, 0.5]))
    told = {"gold probability": pytest.approx(0.2), "after the best so far": pytest.approx(0.25)}
    assert table.summary() == [
        {"round": 1, "scored pairs": 3, **told},
        {"round": 2, "scored pairs": 4, **told},
        {"round": 3, "scored pairs": 6, "gold probability": None, "after the best so far": None},
    ]
    assert CandidateTable(["q0"]).summary() == []
