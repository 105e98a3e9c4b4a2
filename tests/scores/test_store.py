"""ScoreStore and CachedLVLM: nothing is paid for twice, nothing is lost, and broken files are named."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drum_hf
from drum_hf.errors import NonFiniteScoreError, SavedFileError
from drum_hf.lvlm.fingerprint import describe, differences
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.store import Entry, Merged, RequestParts, ScoreStore, request_key
from drum_hf.types import LVLM, Demonstration, ICLRequest, Query, trusted

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


def test_keys_are_what_they_were_when_scores_were_paid_for():
    keyed = (
        trusted(Demonstration, id=id, image=None, prompt=f"Wie heißt {id}?", response="ä", key=key)
        for id, key in (("b", "0" * 31 + "f"), ("c", "not hex"))
    )
    shown = (Demonstration("a", None, "Wie heißt a?", "ä"), *keyed)
    asked = ICLRequest(Query(None, "q "), shown, ("x", "y"), (1.0, 2.5), ("x", "y", "größer"))
    assert request_key(asked, "f").hex() == "a5e372938d4767840851ab7b4fd92e46"
    assert request_key(asked, "f", kind="generate", max_new_tokens=7).hex() == "3b07cb521156c4ee1bd0cc0da5d0c42c"
    in_lists = dataclasses.replace(asked, responses=["x", "y"], weights=[1, 2.5], choices=["x", "y", "größer"])
    assert request_key(in_lists, "f") == request_key(asked, "f")


class Settings(types.SimpleNamespace):
    def to_dict(self):
        return dict(self.told)

    def to_str(self):
        return json.dumps(self.told)


def described(name="m", revision=None, system="Be brief.", dtype=torch.bfloat16, weight=0.5):
    """`describe` of a model that is hardly there."""
    config = {"hidden": 4, "_name_or_path": "/x", "transformers_version": "5", "deep": {"name_or_path": "y", "a": 1}}
    model = Settings(dtype=dtype, config=Settings(told=config))
    model.state_dict = lambda: {"b": torch.tensor([weight], dtype=torch.bfloat16), "a": torch.arange(3)}
    processor = Settings(
        told={"size": 2, "image_processor": {"x": 1}},
        chat_template="{{ messages }}",
        image_processor=Settings(told={"mean": [0.5]}),
    )
    tokenizer = types.SimpleNamespace(
        backend_tokenizer=Settings(told={"model": ["a"], "padding": 1, "truncation": None})
    )
    settings = {"image_position": "first", "system": system, "score_end_of_turn": False}
    chat = types.SimpleNamespace(processor=processor, tokenizer=tokenizer, settings=settings)
    return describe(model, chat, name=name, revision=revision)


def test_a_fingerprint_is_what_it_was_when_scores_were_paid_for():
    fingerprint, identity = described()
    assert fingerprint == described(name="elsewhere")[0] == "bd49fae51b8371bfce700fe6e3e6abb7"
    assert described(revision="1")[0] == "b3487df914a09d99d70705813963ee71"
    assert identity.items() >= {"name": "m", "dtype": "bfloat16", "system": "Be brief.", "class": "Settings"}.items()
    assert {type(value) for value in identity.values()} <= {str, bool, type(None)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"system": None}, ["system differs: Be brief. here, none there"]),
        ({"dtype": torch.float32}, ["dtype differs: bfloat16 here, float32 there"]),
        ({"weight": 0.25}, [r"weights differs: \w{8}… here, \w{8}… there"]),
        ({"name": "n"}, ["name differs: m here, n there"]),
    ],
)
def test_what_tells_two_lvlms_apart_is_named(change, said):
    (fingerprint, here), (other, there) = described(), described(**change)
    told = differences(here, there)
    assert len(told) == len(said) and all(map(re.fullmatch, said, told))
    assert (fingerprint == other) == ("name" in change)


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
        assert again._backend.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert again._backend.connection.execute("PRAGMA synchronous").fetchone() == (1,)


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
    store._backend.connection.execute("UPDATE meta SET value = '99'")
    store.close()
    with pytest.raises(SavedFileError, match="expected format version 3, got 99; use the version"):
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
        monkeypatch.setattr("drum_hf.scores.sqlite._CHECKED_SIZE", 0)
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
    store._backend.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(SavedFileError, match=r"scores\.sqlite: writing.*make the file and its folder writable"):
        store.put_scores([b"b"], [-1.0], fingerprint="f")
    store._backend.connection.execute("PRAGMA query_only = OFF")
    store._backend.connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(SavedFileError, match="free space"):
        store.put_scores([i.to_bytes(16, "big") for i in range(5000)], np.zeros(5000), fingerprint="f")
    store._backend.connection.execute("PRAGMA max_page_count = 1000000")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ScoreStore(store.path, timeout=0.05) as hasty:
        with pytest.raises(SavedFileError, match="raise `timeout`"):
            hasty.put_scores([b"b"], [-1.0], fingerprint="f")
        assert hasty.get_scores([b"a", b"b"]) == [-1.0, None]  # readers do not wait
    other.close()
    assert len(store) == 1


# -- what an entry is made of --------------------------------------------------

hexes = st.text("0123456789abcdef", min_size=32, max_size=32)
keys_of_contents = st.one_of(hexes, hexes.map(str.upper), st.text(max_size=4))
answers = st.lists(st.text(max_size=3), max_size=3).map(tuple)
request_parts = st.builds(
    RequestParts,
    keys_of_contents,
    st.lists(keys_of_contents, max_size=3).map(tuple),
    answers,
    st.lists(st.floats(0, exclude_min=True, allow_infinity=False), max_size=3).map(tuple),
    answers,
    st.none() | st.integers(1, 9),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(request_parts, st.sampled_from(["f", "g"])), max_size=9), st.integers(1, 4))
def test_entries_come_back_as_they_were_written(written, page_size):
    expected = {}
    with ScoreStore() as store:
        for parts, fingerprint in written:
            key = parts.key(fingerprint)
            if parts.kind == "score":
                store.put_scores([key], [-0.5], fingerprint=fingerprint, parts=[parts])
            else:
                store.put_texts([key], ["ä"], fingerprint=fingerprint, parts=[parts], identity={"name": fingerprint})
            expected[key] = Entry(parts.kind, key, -0.5 if parts.kind == "score" else "ä", fingerprint, parts)
        pages = list(store.entries(page_size=page_size))
        assert all(0 < len(page) <= page_size for page in pages)
        found = [entry for page in pages for entry in page]
        assert len(found) == len(expected) and {entry.key: entry for entry in found} == expected
        if any(fingerprint == "f" for _, fingerprint in written):
            only = [entry for page in store.entries(fingerprints=["f"]) for entry in page]
            assert {entry.key for entry in only} == {key for key, e in expected.items() if e.fingerprint == "f"}
        with pytest.raises(ValueError, match="nothing of the LVLM with fingerprint 'h'"):
            list(store.entries(fingerprints=["h"]))


def test_what_an_entry_is_made_of_is_kept_once(store):
    rows, each = [f"{i:032x}" for i in range(200)], 50
    parts = [RequestParts(q, (rows[(i + j) % 200],), (q[-2:],)) for i, q in enumerate(rows) for j in range(each)]
    keys = [part.key("f") for part in parts]
    for start in range(0, len(keys), 500):
        chunk = slice(start, start + 500)
        store.put_scores(keys[chunk], np.zeros(500), fingerprint="f", parts=parts[chunk])
    assert store.stats()["bytes"] / len(keys) < 64  # 16 of them the key, 8 the score


def test_a_known_entry_is_given_its_parts_and_keeps_its_value(store):
    parts = RequestParts("q", ("d",), ("yes",))
    key = parts.key("f")
    store.put_scores([key], [-1.0], fingerprint="f")
    assert next(store.entries()) == [Entry("score", key, -1.0, "f", None)] and store.identities() == {"f": None}
    store.put_scores([key], [-2.0], fingerprint="f", parts=[parts], identity={"name": "m", "system": None})
    store.put_scores([key], [-3.0], fingerprint="f", parts=[RequestParts("other")], identity={"name": "n"})
    assert next(store.entries()) == [Entry("score", key, -1.0, "f", parts)]
    assert store.identities() == {"f": {"name": "m", "system": None}}
    with pytest.raises(ValueError, match="parts of 1 keys of kind 'generate'"):
        store.put_texts([key], ["x"], fingerprint="f", parts=[parts])
    with pytest.raises(ValueError, match="parts of 1 keys of kind 'score', got 2"):
        store.put_scores([key], [-1.0], fingerprint="f", parts=[parts] * 2)


def test_merging_keeps_what_is_there_and_counts_what_differs(store):
    parts = [RequestParts(f"q{i}") for i in range(5)]
    entries = [Entry("score", part.key("f"), -float(i), "f", part) for i, part in enumerate(parts)]
    text = RequestParts("q", max_new_tokens=3)
    entries.append(Entry("generate", text.key("f"), "a", "f", text))
    store.put_scores([entry.key for entry in entries[:3]], [-0.0005, -1.002, -2.0], fingerprint="f")
    assert store.merge(entries, {"f": {"name": "m"}, "g": None}) == Merged(new=3, known=3, conflicts=1)
    other = entries[-1]._replace(value="b")
    assert store.merge([*entries, other]) == Merged(new=0, known=7, conflicts=2)
    assert store.get_scores([entry.key for entry in entries]) == [-0.0005, -1.002, -2.0, -3.0, -4.0, None]
    assert store.get_texts([other.key]) == ["a"] and store.identities() == {"f": {"name": "m"}, "g": None}


# -- collecting --------------------------------------------------


def filled(path):
    """Scores of two LVLMs over ten queries and ten demonstrations, a draft each, and one score without parts."""
    store = ScoreStore(path)
    for fingerprint in ("f", "g"):
        pairs = [RequestParts(f"q{i}", (f"d{j}", "d0"), (f"a{i}",)) for i in range(10) for j in range(10)]
        keys = [part.key(fingerprint) for part in pairs]
        store.put_scores(keys, np.zeros(100), fingerprint=fingerprint, parts=pairs, identity={"name": fingerprint})
        drafts = [RequestParts(f"q{i}", max_new_tokens=5) for i in range(10)]
        keys = [part.key(fingerprint) for part in drafts]
        store.put_texts(keys, ["x"] * 10, fingerprint=fingerprint, parts=drafts)
    store.put_scores([b"old"], [-1.0], fingerprint="f")
    return store


def survivors(store):
    return [entry for page in store.entries() for entry in page]


@pytest.mark.parametrize("criterion", [{"keep": ["g"]}, {"drop": ["f"]}])
def test_an_lvlms_entries_are_collected(tmp_path, criterion):
    with filled(tmp_path / "s.sqlite") as store:
        dry = store.collect(**criterion, dry_run=True)
        assert (dry.scores, dry.texts, dry.kept, dry.unknown) == (101, 10, 110, 0) and dry.bytes > 0
        assert len(survivors(store)) == 221
        done = store.collect(**criterion)
        assert dataclasses.replace(done, bytes=0) == dataclasses.replace(dry, bytes=0)
        assert {entry.fingerprint for entry in survivors(store)} == {"g"} and len(survivors(store)) == 110
        assert store.identities() == {"g": {"name": "g"}}
        again = store.collect(keep=["g"])
        assert (again.scores, again.texts, again.kept, again.bytes) == (0, 0, 110, 0)


@settings(max_examples=15, deadline=None)
@given(st.sets(st.sampled_from([*(f"q{i}" for i in range(10)), *(f"d{i}" for i in range(10))]), min_size=1))
def test_entries_of_other_contents_are_collected(contents):
    with filled(":memory:") as store:
        before = survivors(store)
        wanted = {
            entry
            for entry in before
            if not entry.parts or {entry.parts.query, *entry.parts.demonstrations} <= contents
        }
        done = store.collect(contents=contents)
        assert set(survivors(store)) == wanted
        assert (done.kept, done.unknown) == (len(wanted), 1) and done.scores + done.texts == 221 - len(wanted)
        left = {value for (value,) in store._backend.connection.execute("SELECT value FROM contents")}
        used = {key for entry in wanted if entry.parts for key in (entry.parts.query, *entry.parts.demonstrations)}
        assert left == {json.dumps(key) for key in used}  # nothing lies about that no entry needs
        store.merge(before)
        assert set(survivors(store)) == set(before)


def test_what_is_collected_is_given_back_to_the_disk(tmp_path):
    with filled(tmp_path / "s.sqlite") as store:
        keys = [i.to_bytes(16, "big") for i in range(20000)]
        store.put_scores(keys, np.zeros(20000), fingerprint="h")
        before = store.stats()["bytes"]
        done = store.collect(drop=["h"])
        assert done.scores == 20000 and done.bytes == before - store.stats()["bytes"] > 500_000
        assert os.path.getsize(store.path) == store.stats()["bytes"]


def test_nothing_is_collected_without_a_criterion(tmp_path):
    with filled(tmp_path / "s.sqlite") as store:
        for nothing in ({}, {"keep": []}, {"contents": set()}, {"dry_run": True}):
            with pytest.raises(ValueError, match="without a criterion"):
                store.collect(**nothing)
        with pytest.raises(ValueError, match="got both"):
            store.collect(keep=["f"], drop=["g"])
        with pytest.raises(ValueError, match="nothing of the LVLM with fingerprint 'F'"):
            store.collect(keep=["F"])
        assert len(survivors(store)) == 221


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


def test_what_was_asked_is_kept_with_the_answer(store):
    stub = Stub()
    CachedLVLM(stub, store).score([request(1, shots=2)])
    assert store.identities() == {"stub@1": None}  # this LVLM does not name its parts
    stub.identity = {"name": "stub", "system": None}
    CachedLVLM(stub, store).generate([request(1)], max_new_tokens=5)
    assert store.identities() == {"stub@1": {"name": "stub", "system": None}}
    (score,), (text,) = store.entries()
    assert score.parts == RequestParts.of(request(1, shots=2)) and score.parts.responses == ("yes",)
    assert text.parts == RequestParts.of(request(1), 5) and text.value == "q1/5"
    for entry in (score, text):
        assert entry.parts.key(entry.fingerprint) == entry.key


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
    with pytest.raises(
        NonFiniteScoreError, match=r"'q2' with demonstrations \['d2\.0', 'd2\.1'\]: expected finite scores, got nan"
    ):
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
    assert "LVLM score" in bar and "14/14" in bar and "new=14, known=6" in bar
    lvlm.score([request(i) for i in range(40)], progress=False)
    lvlm.score([request(i) for i in range(40)], progress=True)  # nothing new
    assert capsys.readouterr().err == ""
    lvlm.generate([request(1)], progress=True)
    assert "LVLM generate" in capsys.readouterr().err


# -- several processes, and killed ones --------------------------------------------------

SCORER = """
    import sys, time
    import numpy as np
    from drum_hf.scores.cached import CachedLVLM
    from drum_hf.scores.store import ScoreStore
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


def test_four_processes_write_the_same_keys(tmp_path):
    path = tmp_path / "scores.sqlite"
    runs = [scorer(path, start, 300, 0) for start in (0, 50, 100, 0)]
    for run in runs:
        run.communicate()
    assert [run.returncode for run in runs] == [0] * 4
    with ScoreStore(path) as store:
        found = [entry for page in store.entries() for entry in page]
        assert len(found) == 300 and list(store.identities()) == ["stub@1"]
        assert {entry.key: entry.value for entry in found} == {
            request_key(r, "stub@1"): -float(i) for i, r in enumerate(zero_shot(0, 300))
        }
        assert all(entry.parts.key("stub@1") == entry.key for entry in found)
        (contents,) = store._backend.connection.execute("SELECT COUNT(*) FROM contents").fetchone()
        assert contents == 300


WRITER = """
    import sys
    from drum_hf.scores.store import RequestParts, ScoreStore

    path, run = sys.argv[1], int(sys.argv[2])
    with ScoreStore(path) as store:
        print("ready", flush=True)
        for batch in range(100_000):
            parts = [RequestParts(f"{run} {batch} {i}", (f"{i}",), ("yes",)) for i in range(20)]
            keys = [part.key("f") for part in parts]
            store.put_scores(keys, [float(batch)] * 20, fingerprint="f", parts=parts, identity={"name": "m"})
"""


def test_kills_at_any_moment_leave_whole_batches(tmp_path):
    path = tmp_path / "scores.sqlite"
    chance = random.Random(0)
    known = 0
    for run in range(6):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(run)]
        environment = {**os.environ, "PYTHONPATH": ROOT}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.15))
            writer.send_signal(signal.SIGKILL)
        with ScoreStore(path) as store:
            assert store._backend.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            batches = {}
            for entry in (entry for page in store.entries() for entry in page):
                assert entry.parts.key("f") == entry.key
                batches.setdefault(tuple(entry.parts.query.split()[:2]), []).append(entry.value)
            for (_, batch), values in batches.items():
                assert values == [float(batch)] * 20
            own = sorted(int(batch) for number, batch in batches if number == str(run))
            assert own == list(range(len(own)))  # in the order they were written, none left out
            assert len(batches) >= known
            known = len(batches)
    assert known > 0


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
