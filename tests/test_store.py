"""ScoreStore and CachedLVLM: nothing is paid for twice, nothing is lost, and broken files are named."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drum_hf
from drum_hf.errors import NonFiniteScoreError, SavedFileError
from drum_hf.lvlm.cached import CachedLVLM
from drum_hf.lvlm.store import ScoreStore, request_key
from drum_hf.types import LVLM, Demonstration, ICLRequest, Query

ROOT = str(Path(drum_hf.__file__).parents[1])


def request(number, *, shots=1):
    demonstrations = tuple(Demonstration(f"d{number}.{i}", None, f"p{number}.{i}", "r") for i in range(shots))
    return ICLRequest(Query(None, f"q{number}", id=f"q{number}"), demonstrations, responses=("yes",))


class Stub:
    """Scores a request by its query's number; remembers what it was sent."""

    fingerprint = "stub@1"

    def __init__(self, scores=None):
        self.scores = scores or {}
        self.batches = []

    def score(self, requests):
        self.batches.append([r.query.prompt for r in requests])
        return np.array([self.scores.get(r.query.prompt, -float(r.query.prompt[1:])) for r in requests])

    def generate(self, requests, *, max_new_tokens=32):
        self.batches.append([r.query.prompt for r in requests])
        return [f"{r.query.prompt}/{max_new_tokens}" for r in requests]


@pytest.fixture
def store(tmp_path):
    with ScoreStore(tmp_path / "sub" / "scores.sqlite") as store:
        yield store


# -- keys --------------------------------------------------


def test_a_key_changes_with_all_that_the_answer_depends_on():
    a, b = (Demonstration(id, None, id, "r") for id in "ab")
    base = ICLRequest(Query(None, "q"), (a, b), ("x", "y"), (1.0, 2.0), ("x", "y", "z"))
    change = dataclasses.replace
    others = [
        change(base, query=Query(None, "Q")),
        change(base, demonstrations=(b, a)),
        change(base, demonstrations=(a,)),
        change(base, responses=("y", "x")),
        change(base, weights=(2.0, 1.0)),
        change(base, weights=()),
        change(base, choices=("x", "y")),
        change(base, responses=("x", "y", "x"), weights=(), choices=("y", "z")),
        change(base, responses=("x", "y", "x", "y", "z"), weights=(), choices=()),
        change(base, responses=("xy",), weights=(), choices=()),
        change(base, responses=("x", "y"), weights=(), choices=()),
    ]
    keys = [request_key(r, "f") for r in (base, *others)]
    keys += [request_key(base, "g")]
    keys += [request_key(base, "f", kind="generate", max_new_tokens=n) for n in (1, 2)]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {16}


def test_a_key_does_not_change_with_what_the_lvlm_is_not_shown():
    one = ICLRequest(Query(None, "q", draft="no", id="1", group="g"), (Demonstration("a", None, "p", "r"),), ("x",))
    two = ICLRequest(Query(None, "q"), (Demonstration("b", None, "p", "r", ("r",), "g", "l"),), ("x",))
    assert request_key(one, "f") == request_key(two, "f")


@pytest.mark.parametrize("options", [{"kind": "draft"}, {"kind": "generate"}, {"max_new_tokens": 3}])
def test_bad_key_options(options):
    with pytest.raises(ValueError, match=r"kind is|max_new_tokens"):
        request_key(request(1), "f", **options)


# -- the store --------------------------------------------------

entries = st.lists(
    st.tuples(st.binary(min_size=1, max_size=2), st.floats(allow_nan=False, allow_infinity=False)), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(entries, max_size=4), asked=st.lists(st.binary(min_size=1, max_size=2), max_size=8))
def test_the_store_is_a_dict_that_keeps_first_values(batches, asked):
    model = {}
    with ScoreStore() as store:
        for batch in batches:
            store.put_scores([key for key, _ in batch], [value for _, value in batch], fingerprint="f")
            for key, value in batch:
                model.setdefault(key, value)
        keys = asked + list(model)
        assert store.get_scores(keys) == [model.get(key) for key in keys]
        assert len(store) == len(model)


def test_more_keys_than_one_query_takes(store):
    keys = [i.to_bytes(16, "big") for i in range(2500)]
    store.put_scores(keys[::2], -np.arange(0, 2500, 2) / 7, fingerprint="f")
    assert store.get_scores(keys) == [None if i % 2 else -i / 7 for i in range(2500)]
    assert store.get_scores([]) == []


def test_stats_and_reopening(store):
    assert store and store.stats()["by_fingerprint"] == {}
    store.put_scores([b"a", b"b"], [-1.0, -2.0], fingerprint="f")
    store.put_scores([b"c"], [-3.0], fingerprint="g")
    store.put_texts([b"a"], ["Größe\n"], fingerprint="g")
    store.put_texts([b"a"], ["other"], fingerprint="g")
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        len(store)
    with ScoreStore(store.path) as again:
        stats = again.stats()
        assert stats.pop("bytes") == os.path.getsize(store.path) > 0
        assert stats == {
            "scores": 3,
            "texts": 1,
            "by_fingerprint": {"f": {"scores": 2, "texts": 0}, "g": {"scores": 1, "texts": 1}},
        }
        assert again.get_texts([b"a", b"b"]) == ["Größe\n", None]
        assert again.get_scores([b"a"]) == [-1.0] and len(again) == 3
        assert again._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert again._connection.execute("PRAGMA synchronous").fetchone() == (1,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_with_a_bad_score_is_not_written(store, bad):
    with pytest.raises(NonFiniteScoreError, match="position 1"):
        store.put_scores([b"a", b"b"], [-1.0, bad], fingerprint="f")
    assert store.get_scores([b"a", b"b"]) == [None, None]


def test_a_refused_batch_leaves_nothing(store):
    with pytest.raises(ValueError, match="2 keys, got 1"):
        store.put_scores([b"a", b"b"], [-1.0], fingerprint="f")
    with pytest.raises(TypeError, match="got None"):
        store.put_texts([b"a", b"b"], ["x", None], fingerprint="f")
    with pytest.raises(sqlite3.Error):
        store.put_scores([b"a", object()], [-1.0, -2.0], fingerprint="f")
    assert store.stats()["scores"] == store.stats()["texts"] == 0
    store.put_scores([b"a"], [-1.0], fingerprint="f")  # and no transaction is left open
    assert store.get_scores([b"a"]) == [-1.0]


def test_threads_share_a_store(store):
    def work(worker):
        for i in range(40):
            store.put_scores([bytes([worker, i])], [-i], fingerprint=f"f{worker % 2}")
            assert store.get_scores([bytes([worker, i])]) == [-i]

    faults = []
    threads = [threading.Thread(target=lambda w=w: _catch(faults, work, w)) for w in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(store) == 240


def _catch(faults, work, *args):
    try:
        work(*args)
    except BaseException as fault:
        faults.append(fault)


# -- broken files --------------------------------------------------


@pytest.mark.parametrize("content", [b"hello", b"{}" * 1000, b"\x00" * 5000])
def test_a_file_that_is_not_sqlite(tmp_path, content):
    path = tmp_path / "scores.sqlite"
    path.write_bytes(content)
    with pytest.raises(SavedFileError, match=r"scores\.sqlite.*not a score store"):
        ScoreStore(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_as_it_is(tmp_path):
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE people (name)")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(SavedFileError, match=r"other\.sqlite.*not a score store.*people"):
        ScoreStore(path)
    assert path.read_bytes() == content


def test_another_format_version(store):
    store._connection.execute("UPDATE meta SET value = '99'")
    store.close()
    with pytest.raises(SavedFileError, match="expected format version 1, got 99; update"):
        ScoreStore(store.path)


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_file(store, monkeypatch, checked):
    keys = [i.to_bytes(16, "big") for i in range(2000)]
    store.put_scores(keys, np.zeros(2000), fingerprint="f")
    store.close()
    data = bytearray(Path(store.path).read_bytes())
    data[16384:] = b"\xff" * len(data[16384:])
    Path(store.path).write_bytes(data)
    if not checked:  # a file too large to read through at each opening
        monkeypatch.setattr("drum_hf.lvlm.store._CHECKED_SIZE", 0)
    with pytest.raises(SavedFileError, match=r"scores\.sqlite.*damaged; restore"), ScoreStore(store.path) as broken:
        broken.get_scores(keys)


def test_a_truncated_file(store):
    store.put_scores([i.to_bytes(16, "big") for i in range(2000)], np.zeros(2000), fingerprint="f")
    store.close()
    os.truncate(store.path, os.path.getsize(store.path) // 2)
    with pytest.raises(SavedFileError, match=r"scores\.sqlite.*damaged"):
        ScoreStore(store.path)


def test_a_folder_for_a_file(tmp_path):
    with pytest.raises(SavedFileError, match="give a path to a file"):
        ScoreStore(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SavedFileError, match="making its folder"):
        ScoreStore(tmp_path / "file" / "scores.sqlite")


def test_read_only_full_and_busy_say_what_to_do(store):
    store.put_scores([b"a"], [-1.0], fingerprint="f")
    store._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(SavedFileError, match=r"scores\.sqlite: writing.*make the file and its folder writable"):
        store.put_scores([b"b"], [-1.0], fingerprint="f")
    store._connection.execute("PRAGMA query_only = OFF")
    store._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(SavedFileError, match="free space"):
        store.put_scores([i.to_bytes(16, "big") for i in range(5000)], np.zeros(5000), fingerprint="f")
    store._connection.execute("PRAGMA max_page_count = 1000000")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ScoreStore(store.path, timeout=0.05) as hasty:
        with pytest.raises(SavedFileError, match="raise `timeout`"):
            hasty.put_scores([b"b"], [-1.0], fingerprint="f")
        assert hasty.get_scores([b"a", b"b"]) == [-1.0, None]  # readers do not wait
    other.close()
    assert len(store) == 1


# -- the caching LVLM --------------------------------------------------


def test_only_unknown_unique_requests_are_sent(store):
    stub = Stub()
    lvlm = CachedLVLM(stub, store, batch_size=2)
    assert isinstance(lvlm, LVLM) and lvlm.fingerprint == "stub@1" and lvlm.lvlm is stub
    requests = [request(i) for i in (3, 1, 3, 2, 1)]
    keys = [request_key(r, "stub@1") for r in requests]
    assert lvlm.plan(keys) == (3, 0)
    scores = lvlm.score(iter(requests))
    assert scores.dtype == np.float64 and scores.tolist() == [-3.0, -1.0, -3.0, -2.0, -1.0]
    assert stub.batches == [["q3", "q1"], ["q2"]] and (lvlm.calls, lvlm.hits) == (3, 2)
    assert lvlm.plan([*keys, request_key(request(9), "stub@1")]) == (1, 3)
    assert lvlm.score([request(2), request(4)]).tolist() == [-2.0, -4.0]
    assert stub.batches[2:] == [["q4"]] and (lvlm.calls, lvlm.hits) == (4, 3)
    assert lvlm.score([]).shape == (0,)
    again = CachedLVLM(Stub(), store)
    np.testing.assert_array_equal(again.score(requests), scores)
    assert (again.calls, again.hits, again.lvlm.batches) == (0, 5, [])


def test_another_fingerprint_shares_nothing(store):
    CachedLVLM(Stub(), store).score([request(1)])
    other = Stub({"q1": -0.5})
    other.fingerprint = "stub@2"
    assert CachedLVLM(other, store).score([request(1)]).tolist() == [-0.5]
    assert CachedLVLM(Stub(), store).score([request(1)]).tolist() == [-1.0]


def test_generations_are_kept_apart_from_scores(store):
    lvlm = CachedLVLM(Stub(), store, batch_size=2)
    lvlm.score([request(1)])
    wanted = ["q1/5", "q2/5", "q1/5"]
    for _ in range(2):
        assert lvlm.generate([request(1), request(2), request(1)], max_new_tokens=5) == wanted
    assert lvlm.generate([request(1)], max_new_tokens=6) == ["q1/6"]
    assert (lvlm.calls, lvlm.hits) == (4, 4)
    key = request_key(request(2), "stub@1", kind="generate", max_new_tokens=5)
    assert lvlm.plan([key], kind="generate") == (0, 1) and lvlm.plan([key]) == (1, 0)


def test_requests_are_built_only_where_they_are_new_batch_by_batch(store):
    stub = Stub()
    lvlm = CachedLVLM(stub, store, batch_size=3)
    lvlm.score([request(0), request(5)])
    keys = [request_key(request(i % 8), "stub@1") for i in range(12)]
    built = []

    def build(positions):
        built.append((list(positions), len(stub.batches)))
        return [request(i % 8) for i in positions]

    assert lvlm.score_lazily(keys, build).tolist() == [-float(i % 8) for i in range(12)]
    assert built == [([1, 2, 3], 1), ([4, 6, 7], 2)]  # each just before it is sent


def test_a_request_under_anothers_key_is_refused(store):
    lvlm = CachedLVLM(Stub(), store)
    keys = [request_key(request(i), "stub@1") for i in range(2)]
    for build in (lambda _: [request(1), request(0)], lambda _: [request(0)]):
        with pytest.raises(ValueError, match="request_key"):
            lvlm.score_lazily(keys, build)
    assert len(store) == 0 and lvlm.calls == 0


def test_a_bad_score_is_named_and_the_rest_kept(store):
    stub = Stub({"q2": float("nan"), "q3": float("inf")})
    lvlm = CachedLVLM(stub, store, batch_size=3)
    with pytest.raises(NonFiniteScoreError, match=r"nan for query 'q2' with demonstrations \['d2\.0', 'd2\.1'\]"):
        lvlm.score([request(i, shots=2) for i in range(1, 9)])
    assert len(stub.batches) == 1 and len(store) == 1
    stub.scores.clear()
    assert lvlm.score([request(i, shots=2) for i in range(1, 9)]).tolist() == [-float(i) for i in range(1, 9)]
    assert stub.batches[1] == ["q2", "q3", "q4"]


def test_an_lvlm_that_answers_too_few(store):
    stub = Stub()
    stub.score = lambda requests: np.zeros(1)
    stub.generate = lambda requests, max_new_tokens: []
    with pytest.raises(ValueError, match="expected 2 answers for 2 requests, but Stub returned 1"):
        CachedLVLM(stub, store).score([request(1), request(2)])
    with pytest.raises(ValueError, match="returned 0"):
        CachedLVLM(stub, store).generate([request(1)])
    with pytest.raises(ValueError, match="batch_size"):
        CachedLVLM(stub, store, batch_size=0)
    assert store.stats()["scores"] == store.stats()["texts"] == 0


def test_progress_only_for_long_work(store, capsys):
    lvlm = CachedLVLM(Stub(), store, batch_size=2)
    lvlm.score([request(i) for i in range(6)])
    assert capsys.readouterr().err == ""
    lvlm.score([request(i) for i in range(20)])
    bar = capsys.readouterr().err
    assert "LVLM score" in bar and "14/14" in bar and "from cache=30%" in bar
    lvlm.score([request(i) for i in range(40)], progress=False)
    lvlm.score([request(i) for i in range(40)], progress=True)  # nothing new
    assert capsys.readouterr().err == ""
    lvlm.generate([request(1)], progress=True)
    assert "LVLM generate" in capsys.readouterr().err


# -- several processes, and killed ones --------------------------------------------------

SCORER = """
    import sys, time
    import numpy as np
    from drum_hf.lvlm.cached import CachedLVLM
    from drum_hf.lvlm.store import ScoreStore
    from drum_hf.types import ICLRequest, Query

    path, start, stop, pause = sys.argv[1], *map(float, sys.argv[2:])

    class Stub:
        fingerprint = "stub@1"
        def score(self, requests):
            time.sleep(pause)
            print(len(requests), flush=True)
            return np.array([-float(r.query.prompt[1:]) for r in requests])

    requests = [ICLRequest(Query(None, f"q{i}"), responses=("yes",)) for i in range(int(start), int(stop))]
    with ScoreStore(path) as store:
        CachedLVLM(Stub(), store, batch_size=4).score(requests, progress=False)
"""


def scorer(path, start, stop, pause):
    command = [sys.executable, "-c", textwrap.dedent(SCORER), str(path), str(start), str(stop), str(pause)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def zero_shot(start, stop):
    return [ICLRequest(Query(None, f"q{i}"), responses=("yes",)) for i in range(start, stop)]


def test_a_killed_run_loses_at_most_its_last_batch(tmp_path):
    path = tmp_path / "scores.sqlite"
    with scorer(path, 0, 4000, 0.005) as run:
        scored = sum(int(run.stdout.readline()) for _ in range(20))
        run.send_signal(signal.SIGKILL)
        scored += sum(int(line) for line in run.stdout)
        assert run.wait() == -signal.SIGKILL
    with ScoreStore(path) as store:
        kept = len(store)
        assert scored - 4 <= kept <= scored < 4000 and kept % 4 == 0
        lvlm = CachedLVLM(Stub(), store, batch_size=512)
        np.testing.assert_array_equal(lvlm.score(zero_shot(0, 4000), progress=False), -np.arange(4000.0))
        assert lvlm.calls == 4000 - kept and lvlm.hits == kept


def test_processes_write_at_once(tmp_path):
    path = tmp_path / "scores.sqlite"
    runs = [scorer(path, start, start + 300, 0) for start in (0, 150)]
    for run in runs:
        run.communicate()
    assert [run.returncode for run in runs] == [0, 0]
    with ScoreStore(path) as store:
        assert len(store) == 450
        lvlm = CachedLVLM(Stub(), store)
        np.testing.assert_array_equal(lvlm.score(zero_shot(0, 450)), -np.arange(450.0))
        assert lvlm.calls == 0


def _child(store, pipe):
    store.put_scores([b"child"], [-2.0], fingerprint="f")
    pipe.send(store.get_scores([b"parent", b"child"]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_the_file_anew(store):
    store.put_scores([b"parent"], [-1.0], fingerprint="f")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(store, theirs))
    process.start()
    assert ours.poll(20) and ours.recv() == [-1.0, -2.0]
    process.join()
    assert process.exitcode == 0 and store.get_scores([b"child"]) == [-2.0]
