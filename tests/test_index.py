"""DemoIndex against brute force, and every way to misuse it."""

from __future__ import annotations

import copy
import json
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drum_hf.index
from drum_hf.errors import (
    DimensionMismatchError,
    DuplicateIdError,
    EmptySupportError,
    MissingIdError,
    NonFiniteEmbeddingError,
    SavedFileError,
    TooFewDemonstrationsError,
)
from drum_hf.index import DemoIndex
from drum_hf.types import VectorIndex

KINDS = ["flat", "hnsw"]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_vectors(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def filled(n=60, d=16, *, kind="flat", seed=0, **options):
    index = DemoIndex(d, kind=kind, **options)
    index.add(
        [f"r{i}" for i in range(n)], random_vectors(n, d, seed), [f"g{i % 7}" if i % 3 else None for i in range(n)]
    )
    return index


def as_set(entry):
    return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)


def brute_force(table, queries, k, exclude_ids, exclude_groups):
    """`table`: (id, vector, group) in insertion order; ties by that order; float64."""
    result = []
    for query, no_ids, no_groups in zip(unit(np.float64(queries)), exclude_ids, exclude_groups, strict=True):
        kept = [row for row in table if row[0] not in as_set(no_ids) and row[2] not in as_set(no_groups)]
        scored = [(float(unit(np.float64(v)[None])[0] @ query), id) for id, v, _ in kept]
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


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(history=histories())
def test_search_is_brute_force_after_any_history(kind, history):
    d, steps, living, queries, k = history
    index, table = DemoIndex(d, kind=kind), []
    for step in steps:
        if step[0] == "add":
            index.add(*step[1:])
            table += list(zip(*step[1:], strict=True))
        else:
            index.remove(step[1])
            table = [row for row in table if row[0] not in step[1]]
    assert index.ids == living and len(index) == len(living)
    assert index.groups == [group for _, _, group in table]
    vectors, no_ids, no_groups = (list(column) for column in zip(*queries, strict=True))
    ids, scores = index.search(vectors, k, exclude_ids=no_ids, exclude_groups=no_groups)
    for query, wanted in enumerate(brute_force(table, vectors, k, no_ids, no_groups)):
        assert len(ids[query]) == len(wanted) == len(set(ids[query]))
        assert scores[query].dtype == np.float32
        np.testing.assert_allclose(scores[query], [s for s, _ in wanted], atol=2e-6)
        assert np.all(np.diff(scores[query]) <= 0)
        own = {id: float(unit(np.float64(v)[None])[0] @ unit(np.float64([vectors[query]]))[0]) for id, v, _ in table}
        np.testing.assert_allclose(scores[query], [own[id] for id in ids[query]], atol=2e-6)
        assert not as_set(no_ids[query]) & set(ids[query])
        assert not as_set(no_groups[query]) & {g for id, _, g in table if id in ids[query] and g}


def test_flat_finds_the_same_ids_as_numpy_on_many_rows(monkeypatch):
    index, rows, queries = filled(500), random_vectors(500), random_vectors(40, seed=1)
    expected = np.argsort(-(unit(queries) @ unit(rows).T), axis=1, kind="stable")[:, :9]
    for block in (1, drum_hf.index._BLOCK):  # one query at a time, all at once
        monkeypatch.setattr(drum_hf.index, "_BLOCK", block)
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


def test_ties_are_ours_to_break_when_faiss_keeps_the_later_rows():
    index = DemoIndex(2)
    index.add([f"r{i}" for i in range(50)], [[1, 0]] * 5 + [[0, 1]] * 45)
    flat = index._faiss

    class KeepsTheLast:
        ntotal, get_xb = flat.ntotal, flat.get_xb

        def search(self, queries, length, params=None):
            scores = queries @ index.vectors().T
            rows = np.lexsort((-np.tile(np.arange(50), (len(queries), 1)), -scores))[:, :length]
            return np.take_along_axis(scores, rows, 1), rows

    index._faiss = KeepsTheLast()
    for k in (3, 5, 20):
        ids = index.search([[0.0, 2.0], [1.0, 0.0]], k, exclude_ids=[None, {"r1", "r6"}])[0]
        assert ids[0] == [f"r{i}" for i in range(5, 5 + k)]
        assert ids[1] == [f"r{i}" for i in range(50) if i not in (1, 6)][:k]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_nearly_all_rows_leaves_the_rest(kind, monkeypatch):
    index = DemoIndex(8, kind=kind)
    index.add([f"r{i}" for i in range(300)], random_vectors(300, 8), ["big"] * 295 + [None] * 5)
    for limit in (16, 2048):
        monkeypatch.setattr(drum_hf.index, "_MAX_FETCH", limit)
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


def test_hnsw_recall_and_always_k():
    latent = random_vectors(2000, 8) @ random_vectors(8, 64, seed=9)
    ids = [f"r{i}" for i in range(2000)]
    flat, hnsw = DemoIndex(64), DemoIndex(64, kind="hnsw", hnsw_m=16, ef_construction=60, ef_search=64)
    for index in (flat, hnsw):
        index.add(ids, latent)
        index.remove(ids[100:1000])  # under half: tombstones
    assert isinstance(hnsw, VectorIndex) and not set(hnsw.search(latent[:200], 10)[0][0]) & set(ids[100:1000])
    queries = random_vectors(100, 8, seed=3) @ random_vectors(8, 64, seed=9)
    exact, near = flat.search(queries, 10)[0], hnsw.search(queries, 10)[0]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, near, strict=True)]) > 0.95
    assert [len(row) for row in hnsw.search(queries[:5], 1100)[0]] == [1100] * 5
    hnsw.remove(ids[1000:1200])
    assert hnsw._faiss.ntotal == 900 == len(hnsw)  # more than half were dead
    np.testing.assert_array_equal(hnsw.vectors(), flat.vectors(hnsw.ids))


@pytest.mark.parametrize("kind", KINDS)
def test_lookups(kind):
    index, rows = filled(20, kind=kind), unit(random_vectors(20))
    index.remove(["r0", "r5"])
    assert "r0" not in index and "r1" in index and index.dimension == 16
    np.testing.assert_allclose(index.reconstruct("r7"), rows[7], atol=1e-7)
    np.testing.assert_allclose(index.vectors(["r9", "r2"]), rows[[9, 2]], atol=1e-7)
    assert index.vectors([]).shape == (0, 16) and index.vectors().shape == (18, 16)
    index.vectors()[:] = 0  # a copy
    index.add(["r0"], rows[:1], ["g"])
    assert index.ids[-1] == "r0" and index.groups[-1] == "g"
    np.testing.assert_allclose(index.reconstruct("r0"), rows[0], atol=1e-7)


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
    "options", [{"kind": "ivf"}, {"dimension": 0}, {"dimension": 2.5}, {"hnsw_m": 1}, {"ef_search": 0}]
)
def test_bad_parameters(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DemoIndex(**{"dimension": 4, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_identical(kind, tmp_path):
    index = DemoIndex(16, kind=kind, hnsw_m=4, ef_construction=8, ef_search=4)  # sparse: another graph would show
    rows = random_vectors(900)
    for start, stop in ((0, 500), (500, 501), (501, 900)):
        index.add([f"é{i}" for i in range(start, stop)], rows[start:stop], [f"g{i % 50}" for i in range(start, stop)])
    queries, groups = random_vectors(60, seed=5), [f"g{i % 50}" for i in range(60)]
    for gone in ([], [f"é{i}" for i in range(200)]):
        index.remove(gone)
        index.save(tmp_path / "a")
        loaded = DemoIndex.load(tmp_path / "a")
        assert (loaded.ids, loaded.groups, loaded.kind) == (index.ids, index.groups, kind)
        assert (loaded.hnsw_m, loaded.ef_construction, loaded.ef_search) == (4, 8, 4)
        np.testing.assert_array_equal(loaded.vectors(), index.vectors())
        for twin in (loaded, copy.deepcopy(index)):
            ours, theirs = (
                index.search(queries, 5, exclude_groups=groups),
                twin.search(queries, 5, exclude_groups=groups),
            )
            assert ours[0] == theirs[0]
            np.testing.assert_array_equal(np.stack(ours[1]), np.stack(theirs[1]))
    loaded.save(tmp_path / "b")
    for name in ("index.json", "vectors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"index.json", "vectors.safetensors"}


def test_an_empty_index_is_saved_too(tmp_path):
    DemoIndex(3).save(tmp_path)
    assert len(DemoIndex.load(tmp_path)) == 0 and DemoIndex.load(tmp_path).dimension == 3


def test_a_broken_save_is_named(tmp_path):
    filled(30).save(tmp_path / "good")

    def broken(name, change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad" / name)
        with pytest.raises(SavedFileError, match=r"bad.*(anew|restore)") as caught:
            DemoIndex.load(tmp_path / "bad")
        return str(caught.value)

    def edit(**changes):
        def change(path):
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

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
    assert "version 1, got 99" in broken(meta, edit(format_version=99))
    assert "version 1, got None" in broken(meta, lambda path: path.write_text("[]"))
    assert "31 ids" in broken(meta, edit(ids=[*ids, "more"]))
    assert "29 unique" in broken(meta, edit(ids=["r1", *ids[1:]]))
    assert "groups" in broken(meta, edit(groups=[None]))
    assert "9 rows" in broken(meta, edit(batches=[9]))
    assert "dimension 8" in broken(meta, edit(dimension=8))
    assert "kind" in broken(meta, edit(kind="tree"))
    for changes in ({"ids": [1] * 30}, {"groups": "g"}, {"dimension": "16"}, {"batches": [-1, 31]}, {"ids": None}):
        assert "type" in broken(meta, edit(**changes))


def test_a_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    filled(30).save(tmp_path)
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(40).save(tmp_path)
    assert len(DemoIndex.load(tmp_path)) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_threads_search_while_another_changes(kind):
    index, queries = filled(400, kind=kind, hnsw_m=8, ef_construction=20), random_vectors(30, seed=6)
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
