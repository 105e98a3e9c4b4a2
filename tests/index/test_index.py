"""DemoIndex against brute force, and every way to misuse it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drum_hf.index.demo_index
import drum_hf.index.faiss_kinds
from drum_hf.errors import (
    DimensionMismatchError,
    DuplicateIdError,
    EmptySupportError,
    MissingIdError,
    NonFiniteEmbeddingError,
    SavedFileError,
    TooFewDemonstrationsError,
)
from drum_hf.index.demo_index import DemoIndex
from drum_hf.index.faiss_kinds import KINDS, STORAGES
from drum_hf.index.files import entries_sum
from drum_hf.types import VectorIndex

SETUPS = [(kind, storage) for kind in KINDS for storage in STORAGES]
#: How far a stored vector's entries may lie from the given ones', where those are within [-1, 1].
STEPS = {"float32": 1e-7, "float16": 5e-4, "int8": 2 / 255}


@pytest.fixture
def learns_early(monkeypatch):
    """IVF-PQ learns its lists and codes from 300 rows rather than 9,984."""
    monkeypatch.setattr(drum_hf.index.faiss_kinds, "_LEAST", 300)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_vectors(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def filled(n=60, d=16, *, seed=0, **options):
    index = DemoIndex(d, **options)
    index.add(
        [f"r{i}" for i in range(n)], random_vectors(n, d, seed), [f"g{i % 7}" if i % 3 else None for i in range(n)]
    )
    return index


def as_set(entry):
    return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)


def score(stored, query):
    """Cosine, but for a stored vector that lost its unit length to rounding."""
    return float(np.clip(np.float64(stored) @ unit(np.float64([query]))[0], -1, 1))


def brute_force(table, queries, k, exclude_ids, exclude_groups):
    """`table`: (id, stored vector, group) in insertion order; ties by that order; float64."""
    result = []
    for query, no_ids, no_groups in zip(queries, exclude_ids, exclude_groups, strict=True):
        kept = [row for row in table if row[0] not in as_set(no_ids) and row[2] not in as_set(no_groups)]
        scored = [(score(v, query), id) for id, v, _ in kept]
        result.append(sorted(scored, key=lambda pair: -pair[0])[:k])
    return result


@st.composite
def histories(draw):
    """A few adds and removes, then queries with exclusions. Small integers: duplicates and exact ties are common."""
    d = draw(st.integers(1, 5))
    vector = st.lists(st.integers(-2, 2), min_size=d, max_size=d).filter(any)
    groups = st.sampled_from([None, "g", "h", "i"])
    steps, living, fresh = [], [], 0
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.lists(st.tuples(vector, groups), min_size=1, max_size=12))
        ids = [f"r{fresh + i}" for i in range(len(rows))]
        fresh += len(rows)
        living += ids
        steps.append(("add", ids, [v for v, _ in rows], [g for _, g in rows]))
        gone = draw(st.lists(st.sampled_from(living), unique=True, max_size=len(living) - 1))
        living = [id for id in living if id not in gone]
        steps.append(("remove", gone))
    several = st.sets(st.sampled_from([f"r{i}" for i in range(fresh)] + ["unknown"]), max_size=4)
    one = st.one_of(st.none(), st.sampled_from([f"r{i}" for i in range(fresh)] + ["unknown"]), several)
    group = st.one_of(st.none(), st.sampled_from(["g", "h", "unknown"]), st.sets(st.sampled_from(["g", "h", "i"])))
    queries = draw(st.lists(st.tuples(vector, one, group), min_size=1, max_size=5))
    return d, steps, living, queries, draw(st.integers(1, len(living)))


@pytest.mark.parametrize(("kind", "storage"), SETUPS)
@settings(max_examples=50, deadline=None)
@given(history=histories())
def test_search_is_brute_force_after_any_history(kind, storage, history):
    d, steps, living, queries, k = history
    index, table = DemoIndex(d, kind=kind, storage=storage), []
    for step in steps:
        if step[0] == "add":
            index.add(*step[1:])
            table += list(zip(*step[1:], strict=True))
        else:
            index.remove(step[1])
            table = [row for row in table if row[0] not in step[1]]
    assert index.ids == living and len(index) == len(living)
    assert index.groups == [group for _, _, group in table]
    stored = index.vectors()
    np.testing.assert_allclose(stored, unit(np.float64([v for _, v, _ in table])), atol=STEPS[storage])
    table = [(id, vector, group) for (id, _, group), vector in zip(table, stored, strict=True)]
    vectors, no_ids, no_groups = (list(column) for column in zip(*queries, strict=True))
    ids, scores = index.search(vectors, k, exclude_ids=no_ids, exclude_groups=no_groups)
    for query, wanted in enumerate(brute_force(table, vectors, k, no_ids, no_groups)):
        assert len(ids[query]) == len(wanted) == len(set(ids[query]))
        assert scores[query].dtype == np.float32
        np.testing.assert_allclose(scores[query], [s for s, _ in wanted], atol=2e-6)
        assert np.all(np.diff(scores[query]) <= 0)
        own = {id: score(v, vectors[query]) for id, v, _ in table}
        np.testing.assert_allclose(scores[query], [own[id] for id in ids[query]], atol=2e-6)
        assert not as_set(no_ids[query]) & set(ids[query])
        assert not as_set(no_groups[query]) & {g for id, _, g in table if id in ids[query] and g}


@pytest.mark.parametrize("storage", STORAGES)
def test_flat_finds_the_same_ids_as_numpy_on_many_rows(storage, monkeypatch):
    index, queries = filled(500, storage=storage), random_vectors(40, seed=1)
    np.testing.assert_allclose(index.vectors(), unit(random_vectors(500)), atol=STEPS[storage])
    expected = np.argsort(-(unit(queries) @ index.vectors().T), axis=1, kind="stable")[:, :9]
    for block in (1, drum_hf.index.demo_index._BLOCK):  # one query at a time, all at once
        monkeypatch.setattr(drum_hf.index.demo_index, "_BLOCK", block)
        ids, _ = index.search(queries, 9)
        assert ids == [[f"r{i}" for i in row] for row in expected]


@pytest.mark.parametrize(("copies", "k"), [(3, 40), (100, 40), (300, 150)])
def test_ties_come_in_the_order_added_whatever_the_batch(copies, k):
    vectors = random_vectors(30, d=37)
    index = DemoIndex(37)
    index.add([f"{i}-{c}" for c in range(copies) for i in range(30)], np.concatenate([vectors] * copies))
    queries = random_vectors(50, d=37, seed=1)
    together = index.search(queries, k)
    nearest = np.argmax(unit(queries) @ unit(vectors).T, axis=1)
    for q in range(50):
        alone = index.search(queries[q : q + 1], k)
        assert alone[0][0] == together[0][q]
        np.testing.assert_array_equal(alone[1][0], together[1][q])
        first = min(copies, k)
        assert together[0][q][:first] == [f"{nearest[q]}-{c}" for c in range(first)]


def test_ties_are_ours_to_break_when_faiss_keeps_the_later_rows(monkeypatch):
    index = DemoIndex(2)
    index.add([f"r{i}" for i in range(50)], [[1, 0]] * 5 + [[0, 1]] * 45)

    def keeps_the_last(queries, length, **how):
        scores = queries @ index.vectors().T
        rows = np.lexsort((-np.tile(np.arange(50), (len(queries), 1)), -scores))[:, :length]
        return np.take_along_axis(scores, rows, 1), rows

    monkeypatch.setattr(index._structure, "propose", keeps_the_last)
    for k in (3, 5, 20):
        ids = index.search([[0.0, 2.0], [1.0, 0.0]], k, exclude_ids=[None, {"r1", "r6"}])[0]
        assert ids[0] == [f"r{i}" for i in range(5, 5 + k)]
        assert ids[1] == [f"r{i}" for i in range(50) if i not in (1, 6)][:k]


@pytest.mark.parametrize(("kind", "storage"), SETUPS)
def test_a_group_of_nearly_all_rows_leaves_the_rest(kind, storage, monkeypatch, learns_early):
    index = DemoIndex(8, kind=kind, storage=storage, nprobe=2, refine=4)
    index.add([f"r{i}" for i in range(300)], random_vectors(300, 8), ["big"] * 295 + [None] * 5)
    for limit in (16, 2048):
        monkeypatch.setattr(drum_hf.index.demo_index, "_MAX_FETCH", limit)
        ids, scores = index.search(random_vectors(3, 8, 2), 6, exclude_groups=["big", None, {"big"}])
        assert [len(i) for i in ids] == [len(s) for s in scores] == [5, 6, 5]
        assert set(ids[0]) == set(ids[2]) == {f"r{i}" for i in range(295, 300)}


def test_all_excluded_gives_an_empty_list():
    index = DemoIndex(2)
    index.add(["a", "b"], np.eye(2), ["g", "g"])
    ids, scores = index.search(np.eye(2), 1, exclude_groups=["g", None], exclude_ids=[None, ("a", "b")])
    assert ids == [[], []] and [s.shape for s in scores] == [(0,), (0,)]


def test_scores_are_cosines_whatever_the_length():
    index = DemoIndex(3)
    index.add(["a", "b"], np.array([[1e-30, 0, 0], [0, 3e30, 4e30]], np.float32))
    ids, scores = index.search([[1e25, 0, 0], [0, 0, -2]], 1)
    assert ids == [["a"], ["a"]]
    np.testing.assert_allclose([s[0] for s in scores], [1.0, 0.0], atol=1e-7)
    np.testing.assert_allclose(index.vectors(), [[1, 0, 0], [0, 0.6, 0.8]], atol=1e-7)
    assert index.search(np.zeros((0, 3)), 1) == ([], [])


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_removed_rows_are_kept_as_waypoints_until_they_are_more_than_half(kind, learns_early):
    index, ids = filled(1000, kind=kind, pq_bytes=4), [f"r{i}" for i in range(1000)]
    assert isinstance(index, VectorIndex)
    index.remove(ids[:450])
    assert index._structure.size == 1000 and index.ids == ids[450:]
    assert [set(row) for row in index.search(random_vectors(5), 550)[0]] == [set(ids[450:])] * 5
    before = index.vectors()
    index.remove(ids[450:501])
    assert index._structure.size == 499 == len(index)
    np.testing.assert_array_equal(index.vectors(), before[51:])


def recall(found, exact):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)])


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("storage", STORAGES)
def test_approximate_kinds_find_nearly_all_and_exactly_all_at_full_breadth(kind, storage, learns_early):
    rows, queries = (random_vectors(n, 8, s) @ random_vectors(8, 64, 9) for n, s in ((1100, 0), (100, 3)))
    ids, groups = [f"r{i}" for i in range(1100)], [f"g{i % 40}" for i in range(1100)]
    options = {"hnsw_m": 16, "ef_construction": 60, "ef_search": 64, "pq_bytes": 16, "nprobe": 24, "refine": 64}
    flat, near = DemoIndex(64, storage=storage), DemoIndex(64, kind=kind, storage=storage, **options)
    for index in (flat, near):
        index.add(ids[:900], rows[:900], groups[:900])
        index.add(ids[900:], rows[900:], groups[900:])
        index.remove(ids[100:400])
    assert not near._structure.exact
    np.testing.assert_array_equal(near.vectors(), flat.vectors())
    without = {"exclude_groups": [f"g{i % 40}" for i in range(100)], "exclude_ids": [ids[i + 1] for i in range(100)]}
    exact = flat.search(queries, 10, **without)
    found = near.search(queries, 10, **without)
    assert recall(found[0], exact[0]) > 0.95
    for row, query in zip(found[0], range(100), strict=True):
        assert not {groups[int(id[1:])] for id in row} & {without["exclude_groups"][query]}
        assert without["exclude_ids"][query] not in row and not set(row) & set(ids[100:400])
    near.ef_search, near.nprobe, near.refine = 1100, 1100, 1100
    widest = near.search(queries, 10, **without)
    assert recall(widest[0], exact[0]) == 1.0
    np.testing.assert_array_equal(np.stack(widest[1]), np.stack(exact[1]))


def test_refining_more_than_faiss_may_be_asked_for_does_not_compare_every_row(monkeypatch, learns_early):
    index = filled(900, kind="ivfpq", refine=800, nprobe=1000)
    monkeypatch.setattr(drum_hf.index.demo_index, "_MAX_FETCH", 128)
    compared = []
    by_product = DemoIndex._by_product
    monkeypatch.setattr(
        DemoIndex, "_by_product", lambda self, *given: (compared.extend(given[3]), by_product(self, *given))[1]
    )
    found = index.search(index.vectors()[:20], 10)[0]
    assert compared == [] and all(len(row) == 10 for row in found)
    index.search(index.vectors()[:3], 200)
    assert compared == [0, 1, 2]  # what is wanted is compared, however much it is


def test_ivfpq_learns_when_there_are_enough_rows_and_again_when_they_have_quadrupled(monkeypatch):
    monkeypatch.setattr(drum_hf.index.faiss_kinds, "_LEAST", 300)
    index, learned = DemoIndex(16, kind="ivfpq", pq_bytes=7), []
    for size in (200, 99, 1, 800, 99, 1, 50):
        first = len(index)
        index.add([f"r{first + i}" for i in range(size)], random_vectors(size, seed=first))
        learned.append((index._structure.learned_from, 0 if index._structure.exact else index._structure.lists.nlist))
    assert learned == [(0, 0), (0, 0), (300, 7), (300, 7), (300, 7), (1200, 30), (1200, 30)]
    assert index._structure.code_bytes == 4  # the next below 7 that divides 16
    rows = [f"r{i}" for i in range(1250)]
    assert index.ids == rows and index.search(index.vectors(), 1)[0] == [[id] for id in rows]
    index.remove(rows[:700])  # more than half: built anew from what is left
    assert index._structure.size == 550 == len(index) and index._structure.learned_from == 550


def test_the_same_rows_make_the_same_index(learns_early):
    for kind in ("hnsw", "ivfpq"):
        one, two = (filled(900, kind=kind, storage="float16") for _ in range(2))
        ours, theirs = one._structure.state(), two._structure.state()
        assert set(ours) == set(theirs) and len(ours) >= 3
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_int8_spans_the_first_rows_and_what_is_usual():
    index = DemoIndex(100, storage="int8")
    first = np.zeros((1, 100), np.float32)
    first[0, 3] = 1.0
    index.add(["outlier"], first)
    index.add([f"r{i}" for i in range(50)], random_vectors(50, 100))
    np.testing.assert_allclose(index.reconstruct("outlier"), first[0], atol=1.5 / 255)
    np.testing.assert_allclose(index.vectors()[1:], unit(random_vectors(50, 100)), atol=1.5 / 255)


@pytest.mark.parametrize(("kind", "storage"), SETUPS)
def test_lookups(kind, storage):
    index, rows, step = filled(20, kind=kind, storage=storage), unit(random_vectors(20)), STEPS[storage]
    index.remove(["r0", "r5"])
    assert "r0" not in index and "r1" in index and index.dimension == 16
    np.testing.assert_allclose(index.reconstruct("r7"), rows[7], atol=step)
    np.testing.assert_allclose(index.vectors(["r9", "r2"]), rows[[9, 2]], atol=step)
    assert index.vectors([]).shape == (0, 16) and index.vectors().shape == (18, 16)
    index.vectors()[:] = 0  # a copy
    index.add(["r0"], rows[:1], ["g"])
    assert index.ids[-1] == "r0" and index.groups[-1] == "g"
    np.testing.assert_allclose(index.reconstruct("r0"), rows[0], atol=step)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_add_or_remove_changes_nothing(kind):
    index = filled(5, kind=kind)
    before = index.ids, index.groups, index.vectors()
    good = random_vectors(2, seed=4)
    bad = good.copy()
    bad[1, 3] = np.nan
    with pytest.raises(DuplicateIdError, match="'r3'"):
        index.add(["new", "r3"], good)
    with pytest.raises(DuplicateIdError, match="'new'"):
        index.add(["new", "new"], good)
    with pytest.raises(NonFiniteEmbeddingError, match="'b'"):
        index.add(["a", "b"], bad)
    with pytest.raises(NonFiniteEmbeddingError, match="'a'"):
        index.add(["a", "b"], good * [[0], [1]])
    with pytest.raises(NonFiniteEmbeddingError, match="'a'"):
        index.add(["a", "b"], np.float64(good) * [[1e200], [1]])
    with pytest.raises(DimensionMismatchError, match=r"\(n, 16\), got \(2, 15\)"):
        index.add(["a", "b"], good[:, :15])
    with pytest.raises(DimensionMismatchError, match="3 ids"):
        index.add(["a", "b", "c"], good)
    with pytest.raises(ValueError, match="one group"):
        index.add(["a", "b"], good, ["g"])
    with pytest.raises(TypeError, match="one string"):
        index.add("ab", good)
    with pytest.raises(TypeError, match="type int"):
        index.add([1, 2], good)
    with pytest.raises(TypeError, match="groups are strings"):
        index.add(["a", "b"], good, [1, None])
    with pytest.raises(MissingIdError, match="'x'"):
        index.remove(["r1", "x"])
    with pytest.raises(MissingIdError, match="'x'"):
        index.vectors(["x"])
    assert (index.ids, index.groups) == before[:2]
    np.testing.assert_array_equal(index.vectors(), before[2])
    assert len(index.search(good, 5)[0][0]) == 5


def test_search_errors():
    index, query = filled(5), random_vectors(1)
    with pytest.raises(EmptySupportError, match="add"):
        DemoIndex(16).search(query, 1)
    with pytest.raises(TooFewDemonstrationsError, match=r"6 demonstrations.*holds 5"):
        index.search(query, 6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        index.search(query, 0)
    with pytest.raises(NonFiniteEmbeddingError, match="query 0"):
        index.search(query * np.nan, 1)
    with pytest.raises(DimensionMismatchError):
        index.search(query[0], 1)
    with pytest.raises(DimensionMismatchError):
        index.search(query[:, :3], 1)
    with pytest.raises(ValueError, match="each of 1 queries, got 2 entries"):
        index.search(query, 1, exclude_ids=["a", "b"])
    with pytest.raises(ValueError, match="the one string"):
        index.search(query, 1, exclude_groups="g")


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": "ivf"}, {"storage": "int4"}, {"dimension": 0}, {"dimension": 2.5}, {"hnsw_m": 1}),
        *({"ef_search": 0}, {"pq_bytes": 0}, {"nprobe": True}, {"refine": "all"}),
    ],
)
def test_bad_parameters(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DemoIndex(**{"dimension": 4, **options})


@pytest.mark.parametrize(("kind", "storage"), SETUPS)
def test_saved_and_loaded_is_identical(kind, storage, tmp_path, learns_early):
    # sparse and short-sighted: another graph, other lists or other codes would show
    small = {"hnsw_m": 4, "ef_construction": 8, "ef_search": 4, "pq_bytes": 4, "nprobe": 2, "refine": 6}
    index = DemoIndex(16, kind=kind, storage=storage, **small)
    rows = random_vectors(900)
    for start, stop in ((0, 500), (500, 501), (501, 900)):
        index.add([f"é{i}" for i in range(start, stop)], rows[start:stop], [f"g{i % 50}" for i in range(start, stop)])
    queries, groups = random_vectors(60, seed=5), [f"g{i % 50}" for i in range(60)]

    def searched(index):
        ids, scores = index.search(queries, 5, exclude_groups=groups)
        return ids, np.stack(scores).tolist()

    for gone in ([], [f"é{i}" for i in range(200)]):
        before = index.vectors()[len(gone) :]
        index.remove(gone)
        index.save(tmp_path / "a")
        np.testing.assert_array_equal(index.vectors(), before)  # compacting loses nothing
        loaded = DemoIndex.load(tmp_path / "a")
        assert (loaded.ids, loaded.groups, loaded.kind) == (index.ids, index.groups, kind)
        assert {name: getattr(loaded, name) for name in small} == small and loaded.storage == storage
        np.testing.assert_array_equal(loaded.vectors(), index.vectors())
        for twin in (loaded, copy.deepcopy(index)):
            assert searched(twin) == searched(index)
    loaded.save(tmp_path / "b")
    for name in ("index.json", "vectors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"index.json", "vectors.safetensors"}
    for grown in (index, loaded):
        grown.add([f"n{i}" for i in range(300)], random_vectors(300, seed=8))
    assert searched(loaded) == searched(index)


@pytest.mark.parametrize(("kind", "storage"), SETUPS)
def test_an_empty_index_is_saved_too(kind, storage, tmp_path):
    DemoIndex(3, kind=kind, storage=storage).save(tmp_path)
    loaded = DemoIndex.load(tmp_path)
    assert len(loaded) == 0 and loaded.dimension == 3
    loaded.add(["a"], [[0.0, 3.0, 4.0]])
    np.testing.assert_allclose(loaded.vectors(), [[0, 0.6, 0.8]], atol=STEPS[storage])


def test_loading_a_graph_or_lists_builds_nothing(tmp_path, monkeypatch, learns_early):
    for kind in ("hnsw", "ivfpq"):
        filled(400, kind=kind).save(tmp_path / kind)
    for name in ("Graph.add", "Lists.add", "Lists._build"):
        monkeypatch.setattr(f"drum_hf.index.faiss_kinds.{name}", lambda *a: pytest.fail("built"))
    for kind in ("hnsw", "ivfpq"):
        loaded = DemoIndex.load(tmp_path / kind)
        assert len(loaded) == 400 and not loaded._structure.exact


def test_a_broken_save_is_named(tmp_path):
    filled(30).save(tmp_path / "good")

    def broken(name, change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad" / name)
        with pytest.raises(SavedFileError, match=r"bad.*(anew|restore)") as caught:
            DemoIndex.load(tmp_path / "bad")
        return str(caught.value)

    def edit(kept=False, **changes):
        def change(path):
            meta = {**json.loads(path.read_text()), **changes}
            if not kept:
                meta["entries_sha256"] = entries_sum(meta)
            path.write_text(json.dumps(meta))

        return change

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    vectors, meta = "vectors.safetensors", "index.json"
    ids = [f"r{i}" for i in range(30)]
    for name in (vectors, meta):
        assert f"{name}: the file is missing" in broken(name, lambda path: path.unlink())
        assert name in broken(name, lambda path: path.write_bytes(path.read_bytes()[:-7]))
        assert name in broken(name, lambda path: path.write_bytes(b""))
    assert "content" in broken(vectors, flip)
    assert "version 2, got 99" in broken(meta, edit(format_version=99))
    assert "got None" in broken(meta, lambda path: path.write_text("[]"))
    assert "31 ids" in broken(meta, edit(ids=[*ids, "more"]))
    assert "29 unique" in broken(meta, edit(ids=["r1", *ids[1:]]))
    assert "groups" in broken(meta, edit(groups=[None]))
    assert "dimension 8" in broken(meta, edit(dimension=8))
    assert "kind" in broken(meta, edit(kind="tree"))
    assert "expected a F16 tensor" in broken(meta, edit(storage="float16"))
    for changes in ({"ids": ["x", *ids[1:]]}, {"groups": ["g", *[None] * 29]}, {"ef_search": 17}):
        assert "is not what was saved" in broken(meta, edit(kept=True, **changes))
    for changes in ({"ids": [1] * 30}, {"groups": "g"}, {"dimension": "16"}, {"nprobe": None}, {"ids": None}):
        assert "type" in broken(meta, edit(**changes))


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("hnsw", "entry", lambda a: a * 0 + 400),
        ("hnsw", "entry", lambda a: np.int64(a)),
        ("hnsw", "neighbours", lambda a: a[:-1]),
        ("hnsw", "neighbours", lambda a: np.where(a == 7, 400, a)),
        ("hnsw", "neighbours", lambda a: np.where(a == 7, -2, a)),
        ("hnsw", "neighbours", lambda a: np.where(a >= 0, 11, a)),  # a row of the lowest level, linked from above
        ("hnsw", "levels", lambda a: a * 0),
        ("hnsw", "levels", lambda a: a + 100),
        ("hnsw", "levels", lambda a: a[:-1]),
        ("ivfpq", "lists", lambda a: a - 1),
        ("ivfpq", "lists", lambda a: a + 1000),
        ("ivfpq", "codes", lambda a: a[:, :-1]),
        ("ivfpq", "codebooks", lambda a: a[:-1]),
        ("ivfpq", "centres", lambda a: a * np.float32(np.nan)),
        ("ivfpq", "centres", lambda a: a[:0]),
        ("ivfpq", "learned_from", lambda a: a[:0]),
        ("flat", "ranges", lambda a: a[:, :-1]),
        ("flat", "ranges", lambda a: a * np.float32(np.inf)),
        ("hnsw", "entry", None),
        ("hnsw", "ranges", None),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_faiss_reads_them(kind, name, change, tmp_path, learns_early):
    """With a checksum that agrees, as someone else's file may have."""
    from safetensors.numpy import load_file, save_file

    index = filled(400, kind=kind, storage="int8")
    index.save(tmp_path)
    tensors = load_file(tmp_path / "vectors.safetensors")
    assert kind != "hnsw" or tensors["levels"][11] == 1
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, tmp_path / "vectors.safetensors")
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(tensors[n]).tobytes() for n in sorted(tensors)))
    meta = json.loads((tmp_path / "index.json").read_text()) | {"vectors_sha256": digest.hexdigest()}
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with pytest.raises(SavedFileError, match=rf"'({name}|entry)'"):
        DemoIndex.load(tmp_path)


def test_a_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    filled(30).save(tmp_path)
    monkeypatch.setattr("drum_hf.index.files._write_tensors", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(40).save(tmp_path)
    assert len(DemoIndex.load(tmp_path)) == 30


@pytest.mark.parametrize(("kind", "storage"), [("flat", "float32"), ("hnsw", "float16"), ("ivfpq", "int8")])
def test_threads_search_while_another_changes(kind, storage, learns_early):
    index = filled(400, kind=kind, storage=storage, hnsw_m=8, ef_construction=20)
    queries = random_vectors(30, seed=6)
    expected = index.search(queries, 5, exclude_groups=["g1"] * 30)[0]
    stop, faults = threading.Event(), []

    def search():
        try:
            while not stop.is_set():
                found = index.search(queries, 5, exclude_groups=["g1"] * 30)[0]
                if kind == "flat":
                    assert found == expected
                assert all(len(row) == 5 and not set(row) & {"x0", "x1"} for row in found)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        index.add(["x0", "x1"], random_vectors(2, seed=7), ["g1", "g1"])
        index.remove(["x0", "x1"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults and len(index) == 400


def test_the_command_builds_each_kind_and_storage(tmp_path, capsys):
    from drum_hf.cli import main
    from drum_hf.retriever.retriever import DemoRetriever

    table = tmp_path / "t.jsonl"
    rows = [{"id": f"r{i}", "prompt": f"what is {i}?", "response": word} for i, word in enumerate(("red", "green"))]
    table.write_text("\n".join(map(json.dumps, rows)))
    command = ["-q", "index", str(tmp_path / "r"), "--data", str(table), "--strategy", "st"]
    assert main([*command, "--kind", "ivfpq", "--storage", "float16"]) == 0
    assert "index='ivfpq'" in capsys.readouterr().out
    index = DemoRetriever.from_pretrained(tmp_path / "r").index
    assert (index.kind, index.storage, index.ids) == ("ivfpq", "float16", ["r0", "r1"])
    meta = json.loads((tmp_path / "r" / "index" / "index.json").read_text())
    assert (meta["kind"], meta["storage"], meta["format_version"]) == ("ivfpq", "float16", 2)


def test_an_index_that_is_changed_does_not_hold_up_another():
    busy, other = DemoIndex(4), DemoIndex(4)
    for index in (busy, other):
        index.add(["a", "b"], np.eye(4, dtype=np.float32)[:2])
    asked = np.eye(4, dtype=np.float32)[:1]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1) + 1) as pool:
        with busy._lock.writing():
            waiting = [pool.submit(busy.search, asked, 1) for _ in range(2 * (os.cpu_count() or 1))]
            assert pool.submit(other.search, asked, 1).result(timeout=60)[0] == [["a"]]
            assert not any(future.done() for future in waiting)
        assert all(future.result(timeout=60)[0] == [["a"]] for future in waiting)
