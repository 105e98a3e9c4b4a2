"""CachedLVLM and Feedback against a plain dictionary; what one row does to the others of its batch."""

from __future__ import annotations

import logging
import os
import signal
import types
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drum_hf.data import TripletTable
from drum_hf.errors import ContextOverflowError, EndpointError, NonFiniteScoreError, RowError, SavedFileError
from drum_hf.scores.cached import CachedLVLM, Refused
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import RequestParts, ScoreStore
from drum_hf.types import Demonstration, ICLRequest, Query

ROWS = [
    {"id": f"r{i}", "image": None, "prompt": f"p{i}", "response": f"a{i}", "references": [f"a{i}", "b", "b"][: i % 4]}
    for i in range(8)
]
TABLE = TripletTable.from_dataset(ROWS)
PAIRS = st.tuples(
    st.integers(0, 7).map("r{}".format), st.lists(st.integers(0, 7).map("r{}".format), max_size=2).map(tuple)
)


def worth(query, demonstrations, responses, weights):
    """A score that all which is asked enters."""
    shown = sum((place + 1) * int(d[1:]) for place, d in enumerate(demonstrations))
    return -(int(query[1:]) + shown / 100 + sum(len(r) for r in responses) / 1000 + sum(weights) / 1e4)


class Stub:
    fingerprint = "stub"

    def __init__(self, bad=(), error=None):
        error = error or ValueError("the processor refuses")
        self.bad, self.error, self.sent, self.sizes = set(bad), error, Counter(), []

    def score(self, requests):
        self.sizes.append(len(requests))
        if any(r.query.prompt in self.bad for r in requests):
            raise self.error
        self.sent.update((r.query.prompt, tuple(d.prompt for d in r.demonstrations)) for r in requests)
        return np.array(
            [worth(r.query.prompt, [d.prompt for d in r.demonstrations], r.responses, r.weights) for r in requests]
        )

    def generate(self, requests, *, max_new_tokens=32):
        self.sent.update(r.query.prompt for r in requests)
        return [f"{r.query.prompt}/{max_new_tokens}" for r in requests]


def gold(query):
    counted = Counter(ROWS[int(query[1:])]["references"]) or {ROWS[int(query[1:])]["response"]: 1}
    return tuple(counted), (tuple(map(float, counted.values())) if len(counted) > 1 else ())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("score"), st.lists(PAIRS, max_size=12)),
        st.tuples(st.just("drafts"), st.lists(st.integers(0, 7).map("r{}".format), max_size=9)),
        st.tuples(st.just("reopen"), st.just([])),
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(steps, st.integers(1, 5))
def test_any_interleaving_gives_what_a_dictionary_gives(steps, batch_size):
    stub, known = Stub(), {}
    with ScoreStore() as store:
        for what, asked in [*steps, ("reopen", [])]:
            lvlm = CachedLVLM(stub, store, batch_size=batch_size)
            feedback = Feedback(lvlm, TABLE, TABLE, max_new_tokens=7)
            if what == "reopen":
                continue
            new = {one for one in asked if (what, one) not in known}
            if what == "score":
                expected = [worth(q, ds, *gold(q)) for q, ds in asked]
                assert feedback.plan(asked) == (len(new), len(set(asked)) - len(new))
                assert {asked[i] for i in feedback.unscored(asked)} == new
                assert len(feedback.unscored(asked)) == len(new)
                np.testing.assert_array_equal(feedback.score(asked), np.array(expected, dtype=float))
                requests = [feedback.request(*pair) for pair in asked]
                np.testing.assert_array_equal(lvlm.score(requests), np.array(expected, dtype=float))
            else:
                assert [asked[i] for i in feedback.undrafted(asked)] == list(
                    dict.fromkeys(a for a in asked if a in new)
                )
                assert feedback.drafts(asked) == [f"p{q[1:]}/7" for q in asked]
            known |= {(what, one): True for one in asked}
            assert lvlm.calls == len(new)
        assert stub.sent.total() == len(known) and set(stub.sent.values()) <= {1}
        assert store.stats()["scores"] + store.stats()["texts"] == len(known)
        assert all(size <= batch_size for size in stub.sizes)


def request(number, **more):
    return ICLRequest(
        Query(None, f"p{number}", id=f"q{number}"), (Demonstration("d", None, "p9", "r"),), ("a",), **more
    )


@pytest.mark.parametrize("error", [ValueError("aspect ratio\x1b[2J"), ContextOverflowError("too long")])
def test_a_refused_row_is_named_and_the_rest_of_its_batch_kept(error):
    stub, requests = Stub({"p5"}, error), [request(i) for i in range(8)]
    with ScoreStore() as store:
        kind = RowError if type(error) is ValueError else type(error)
        with pytest.raises(kind, match=r"query 'q5' with demonstrations \['d'\]: (aspect ratio\\x1b|too long)"):
            CachedLVLM(stub, store).score(requests)
        assert len(store) == 7 and set(stub.sent.values()) == {1}
        stub.bad.clear()
        lvlm = CachedLVLM(stub, store)
        assert lvlm.score(requests).shape == (8,) and lvlm.calls == 1


def test_refused_rows_can_be_skipped(caplog):
    stub, requests = Stub({"p1", "p5", "p6"}), [request(i) for i in range(8)]
    with ScoreStore() as store:
        lvlm = CachedLVLM(stub, store, batch_size=3, on_error="skip")
        with caplog.at_level(logging.WARNING):
            scores = lvlm.score(requests)
        assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 5, 6]
        assert lvlm.refused == [Refused(f"q{i}", ("d",), "the processor refuses") for i in (1, 5, 6)]
        assert len(store) == lvlm.calls == 5 and caplog.text.count("skipped query") == 3
    with pytest.raises(ValueError, match="on_error"):
        CachedLVLM(stub, ScoreStore(), on_error="drop")


@pytest.mark.parametrize("status", [400, 503])
def test_an_endpoints_refusal_of_one_request_is_skipped_and_its_failure_is_not(status):
    stub = Stub({"p2"}, EndpointError("no", status=status))
    with ScoreStore() as store:
        lvlm = CachedLVLM(stub, store, on_error="skip")
        if status == 400:
            assert np.isnan(lvlm.score([request(i) for i in range(4)])).tolist() == [False, False, True, False]
        else:
            with pytest.raises(EndpointError, match="no"):
                lvlm.score([request(i) for i in range(4)])
            assert stub.sizes == [4]


def test_an_answer_that_can_not_be_stored_costs_no_other(caplog):
    texts = {"p1": "\ud83d", "p2": "a\0b", "p3": "x" * 1_000_001}
    stub = Stub()
    stub.generate = lambda requests, max_new_tokens: [texts.get(r.query.prompt, "fine") for r in requests]
    expected = ["fine", "\ufffd", "a\ufffdb", "x" * 1_000_000, "fine"]
    with ScoreStore() as store, caplog.at_level(logging.WARNING):
        requests = [request(i) for i in range(5)]
        assert CachedLVLM(stub, store).generate(requests) == expected
        again = CachedLVLM(stub, store)
        assert again.generate(requests) == expected and again.calls == 0
        assert caplog.text.count("half a surrogate pair") == 1
        stub.generate = lambda requests, max_new_tokens: [None, "kept"][: len(requests)]
        with pytest.raises(RowError, match=r"query 'q6'.*expected a text as an answer, got None"):
            again.generate([request(6), request(7)])
        assert again.generate([request(7)]) == ["kept"]


def test_a_score_that_is_not_finite_is_skipped_alone():
    stub = types.SimpleNamespace(fingerprint="f", score=lambda requests: [-1.0, float("nan"), -3.0])
    with ScoreStore() as store:
        lvlm = CachedLVLM(stub, store, on_error="skip")
        np.testing.assert_array_equal(lvlm.score([request(i) for i in range(3)]), [-1.0, np.nan, -3.0])
        assert len(store) == 2
        with pytest.raises(NonFiniteScoreError, match="query 'q1'"):
            stub.score = lambda requests: [float("inf")]
            CachedLVLM(stub, store).score([request(1)])


def test_nothing_is_paid_for_that_could_not_be_kept(tmp_path):
    stub = Stub()
    with ScoreStore(tmp_path / "s.sqlite") as store:
        store._backend.connection.execute("PRAGMA query_only = ON")
        with pytest.raises(SavedFileError, match="make the file and its folder writable"):
            CachedLVLM(stub, store).score([request(1)])
        stub.fingerprint = "\ud800"
        with pytest.raises(ValueError, match="fingerprint"):
            CachedLVLM(stub, store).score([request(1)])
    assert stub.sizes == []


def test_an_interrupt_waits_for_what_was_paid_for():
    class Interrupted(ScoreStore):
        def put_scores(self, *args, **options):
            os.kill(os.getpid(), signal.SIGINT)
            super().put_scores(*args, **options)

    stub = Stub()
    with Interrupted() as store:
        with pytest.raises(KeyboardInterrupt):
            CachedLVLM(stub, store, batch_size=4).score([request(i) for i in range(8)])
        assert stub.sizes == [4] and len(store) == 4
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- what a store says when it collects --------------------------------------------------


def test_a_dry_run_tells_the_share_of_the_file_the_unknown_and_sweeps_nothing(tmp_path):
    with ScoreStore(tmp_path / "s.sqlite") as store:
        for fingerprint, count in (("f", 30), ("g", 10)):
            parts = [RequestParts(f"q{i}", ("d",), (f"{fingerprint} answer {i}",)) for i in range(count)]
            keys = [part.key(fingerprint) for part in parts]
            store.put_scores(keys, np.zeros(count), fingerprint=fingerprint, parts=parts)
        store.put_scores([b"1", b"2"], [0.0, 0.0], fingerprint="g")

        def rows(table):
            return store._backend.connection.execute(f"SELECT * FROM {table}").fetchall()

        before = rows("lists"), rows("contents")
        dry = store.collect(drop=["f"], dry_run=True)
        assert dry.bytes == store.stats()["bytes"] * 30 // 42 and dry.unknown == 0
        assert store.collect(contents=["q1", "d"], dry_run=True).unknown == 2
        assert (rows("lists"), rows("contents")) == before
        store.collect(drop=["f"])
        left = {value for _, value in rows("lists")}
        assert left == {f'["g answer {i}"]' for i in range(10)} | {"[]"}
