"""`ShardedIndex` and mapped vectors against one `DemoIndex` in memory, and a GPU's part of the work on the CPU."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drum_hf.index.faiss_kinds
import drum_hf.index.gpu
from drum_hf.errors import (
    DependencyError,
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
from drum_hf.index.sharded import ShardedIndex
from drum_hf.types import VectorIndex
from drum_hf.utils.optional import require_faiss

MAPPED = [(kind, storage) for kind in ("flat", "ivfpq") for storage in STORAGES]


@pytest.fixture
def learns_early(monkeypatch):
    """IVF-PQ learns its lists and codes from 300 rows rather than 9,984."""
    monkeypatch.setattr(drum_hf.index.faiss_kinds, "_LEAST", 300)


def vectors(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def names(n):
    return [f"r{i}" for i in range(n)]


def groups(n):
    return [f"g{i % 7}" if i % 3 else None for i in range(n)]


def filled(index, n=60):
    index.add(names(n), vectors(n, index.dimension), groups(n))
    return index


def same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)


# Shards


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), shard_rows=st.integers(1, 45), k=st.integers(1, 12), gone=st.sets(st.integers(0, 39)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_shards_find_what_one_index_finds(rows, shard_rows, k, gone, seed):
    whole, parts = DemoIndex(8), ShardedIndex(8, shard_rows=shard_rows)
    table = np.round(vectors(rows, 8, seed))  # ties
    table[~table.any(axis=1)] = 1.0
    for index in (whole, parts):
        half = rows // 2
        index.add(names(rows)[:half], table[:half], groups(rows)[:half])
        index.add(names(rows)[half:], table[half:], groups(rows)[half:])
        index.remove([f"r{i}" for i in sorted(gone) if i < rows])
    assert (len(parts), parts.ids, parts.groups) == (len(whole), whole.ids, whole.groups)
    if k > len(whole):
        return
    asked = np.round(vectors(9, 8, seed + 1)) + 0.25
    exclusions = {"exclude_ids": [f"r{i}" for i in range(9)], "exclude_groups": [None, "g1", {"g2", "g3"}] * 3}
    same(parts.search(asked, k, **exclusions), whole.search(asked, k, **exclusions))
    np.testing.assert_array_equal(parts.vectors(whole.ids[::-1]), whole.vectors(whole.ids[::-1]))
    parts.compact()
    same(parts.search(asked, k, **exclusions), whole.search(asked, k, **exclusions))


def test_rows_go_to_the_last_shard_until_it_is_full():
    index = ShardedIndex(16, shard_rows=25)
    filled(index)
    assert [len(shard) for shard in index.shards] == [25, 25, 10] and isinstance(index, VectorIndex)
    index.remove(names(30))
    index.add(["x"], vectors(1))
    assert [len(shard) for shard in index.shards] == [0, 20, 11] and "x" in index and "r3" not in index
    index.compact()
    assert [len(shard) for shard in index.shards] == [20, 11]


def test_rows_are_added_all_or_none():
    index, before = filled(ShardedIndex(16, shard_rows=25)), names(60)
    wrong = vectors(70, seed=3)
    wrong[65] = np.nan  # in the third shard that they would need
    with pytest.raises(NonFiniteEmbeddingError):
        index.add([f"x{i}" for i in range(70)], wrong)
    assert index.ids == before and len(index.shards) == 3
    with pytest.raises(ValueError, match="shard_rows is a whole number"):
        ShardedIndex(4, shard_rows=2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_and_map(kind, tmp_path):
    index = filled(ShardedIndex(16, shard_rows=25, kind=kind, storage="float16"))
    index.remove(["r1", "r30"])
    found = index.search(vectors(5, seed=1), 9)
    index.save(tmp_path)
    loaded = ShardedIndex.load(tmp_path)
    same(loaded.search(vectors(5, seed=1), 9), found)
    assert repr(loaded) == repr(index) and loaded.ids == index.ids
    same(copy.deepcopy(loaded).search(vectors(5, seed=1), 9), found)
    if kind == "hnsw":
        with pytest.raises(ValueError, match="mmap=True is for"):
            ShardedIndex.load(tmp_path, mmap=True)
        return
    mapped = ShardedIndex.load(tmp_path, mmap=True)
    same(mapped.search(vectors(5, seed=1), 9), found)
    mapped.add(["x"], vectors(1, seed=5))
    assert len(mapped.shards) == 4 and mapped.search(vectors(1, seed=5), 1)[0] == [["x"]]


def test_built_block_by_block_equals_added_at_once(tmp_path):
    n = 60
    blocks = [(names(n)[i : i + 7], vectors(n)[i : i + 7], groups(n)[i : i + 7]) for i in range(0, n, 7)]
    ShardedIndex.build(tmp_path / "a", iter(blocks), 16, shard_rows=20, storage="int8")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "shard-00000",
        "shard-00001",
        "shard-00002",
        "shards.json",
    ]
    loaded, expected = ShardedIndex.load(tmp_path / "a", mmap=True), ShardedIndex(16, shard_rows=20, storage="int8")
    for block in blocks:
        expected.add(*block)
    same(loaded.search(vectors(5, seed=1), 9), expected.search(vectors(5, seed=1), 9))
    ShardedIndex.build(tmp_path / "none", iter([]), 16)
    assert len(ShardedIndex.load(tmp_path / "none")) == 0
    with pytest.raises(SavedFileError, match="new or empty folder"):
        ShardedIndex.build(tmp_path / "a", iter(blocks), 16)
    with pytest.raises(DuplicateIdError, match="'r0' came twice"):
        ShardedIndex.build(tmp_path / "b", iter([blocks[0], blocks[0]]), 16)


def test_errors_are_those_of_one_index():
    index = ShardedIndex(16, shard_rows=25)
    with pytest.raises(EmptySupportError):
        index.search(vectors(1), 1)
    filled(index)
    with pytest.raises(TooFewDemonstrationsError, match="holds 60"):
        index.search(vectors(1), 61)
    with pytest.raises(DuplicateIdError, match="'r3'"):
        index.add(["y", "r3"], vectors(2))
    with pytest.raises(DuplicateIdError):
        index.add(["y", "y"], vectors(2))
    with pytest.raises(DimensionMismatchError):
        index.add(["y"], vectors(2))
    with pytest.raises(MissingIdError, match="'z'"):
        index.remove(["r1", "z"])
    with pytest.raises(ValueError, match="k is at least 1"):
        index.search(vectors(1), 0)
    with pytest.raises(ValueError, match="shard_rows"):
        ShardedIndex(16, shard_rows=0)
    assert len(index) == 60 and "r1" in index and "y" not in index


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta: meta | {"shards": ["shard-00000", "../elsewhere", "shard-00002"]},
        lambda meta: meta | {"format_version": 9},
        lambda meta: meta | {"options": {"kind": "tree"}},
        lambda meta: meta | {"dimension": 8},
        lambda meta: meta | {"shards": meta["shards"] + ["shard-00003"]},
        lambda meta: [],
    ],
)
def test_altered_files_are_refused(edit, tmp_path):
    filled(ShardedIndex(16, shard_rows=25)).save(tmp_path)
    path = tmp_path / "shards.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(SavedFileError):
        ShardedIndex.load(tmp_path)


def test_an_id_in_two_shards_is_refused(tmp_path):
    filled(ShardedIndex(16, shard_rows=30)).save(tmp_path)
    filled(DemoIndex(16), 30).save(tmp_path / "shard-00001")
    with pytest.raises(SavedFileError, match="two shards"):
        ShardedIndex.load(tmp_path)


# Vectors in their file


@pytest.mark.parametrize(("kind", "storage"), MAPPED)
def test_mapped_vectors_give_the_same_results(kind, storage, tmp_path, learns_early):
    index = DemoIndex(16, kind=kind, storage=storage)
    index.add(names(900), vectors(900), groups(900))
    index.save(tmp_path)
    mapped = DemoIndex.load(tmp_path, mmap=True)
    assert mapped.mapped and isinstance(mapped._structure.codes(), np.memmap) and not index.mapped
    asked, exclusions = vectors(40, seed=2), {"exclude_groups": ["g1", None] * 20}
    same(mapped.search(asked, 10, **exclusions), index.search(asked, 10, **exclusions))
    np.testing.assert_array_equal(mapped.vectors(["r5", "r899"]), index.vectors(["r5", "r899"]))
    gone = [f"r{i}" for i in range(0, 900, 2)]
    for each in (mapped, index):
        each.remove([*gone, "r1"])  # more than half
    assert mapped.mapped and len(mapped) == 449
    found = mapped.search(asked, 10)
    assert not {id for ids in found[0] for id in ids} & set(gone)
    if kind == "flat":
        same(found, index.search(asked, 10))
    with pytest.raises(ValueError, match="takes no rows"):
        mapped.add(["x"], vectors(1))
    mapped.compact()
    assert not mapped.mapped
    mapped.add(["x"], vectors(1, seed=9))
    mapped.save(tmp_path)
    assert DemoIndex.load(tmp_path, mmap=True).search(vectors(1, seed=9), 1)[0] == [["x"]]


def test_mapped_rows_are_compared_block_by_block(monkeypatch, tmp_path):
    monkeypatch.setattr(drum_hf.index.faiss_kinds, "_BLOCK", 64)
    index = filled(DemoIndex(16), 1000)
    index.save(tmp_path)
    mapped = DemoIndex.load(tmp_path, mmap=True)
    for k in (1, 70, 1000):
        same(mapped.search(vectors(5, seed=1), k), index.search(vectors(5, seed=1), k))


def test_an_empty_index_is_mapped(tmp_path):
    DemoIndex(4).save(tmp_path)
    assert len(DemoIndex.load(tmp_path, mmap=True)) == 0


def test_saved_tensors_are_plain_safetensors(tmp_path, learns_early):
    from safetensors.numpy import load_file

    index = DemoIndex(16, kind="ivfpq", storage="int8")
    index.add(names(400), vectors(400))
    index.save(tmp_path)
    tensors = load_file(tmp_path / "vectors.safetensors")
    assert set(tensors) == {"vectors", *index._structure.state()}
    np.testing.assert_array_equal(tensors["vectors"], index._structure.codes())
    for name, array in index._structure.state().items():
        np.testing.assert_array_equal(tensors[name], array)


# A GPU, played by the CPU: it takes neither selector nor parameters, answers at most 2,048 rows, and can't forget


class Device:
    def __init__(self, index):
        self.index, self.nprobe, self.calls, self.lengths = require_faiss().clone_index(index), None, 0, []

    def add(self, unit):
        self.index.add(unit)

    def search(self, queries, length):
        assert length <= 2048
        self.calls += 1
        self.lengths.append(length)
        if self.nprobe is not None:
            self.index.nprobe = self.nprobe
        return self.index.search(queries, length)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(drum_hf.index.gpu, "transfer", lambda number: Device)


@pytest.mark.parametrize(("kind", "storage"), MAPPED)
def test_what_a_gpu_proposes_is_filtered_on_the_host(kind, storage, device, learns_early, monkeypatch):
    on_cpu = DemoIndex(16, kind=kind, storage=storage)
    on_gpu = DemoIndex(16, kind=kind, storage=storage).to_gpu()
    rows, asked = vectors(1200), vectors(60, seed=3)
    for index in (on_cpu, on_gpu):
        index.add(names(1200)[:700], rows[:700], groups(1200)[:700])
        index.add(names(1200)[700:], rows[700:], groups(1200)[700:])
        index.remove([f"r{i}" for i in range(0, 1200, 3)])
    exclusions = {"exclude_ids": [f"r{i}" for i in range(60)], "exclude_groups": ["g1", None, {"g2", "g3"}] * 20}
    # All of it by the device: no query is left to be compared on the host.
    monkeypatch.setattr(DemoIndex, "_by_product", lambda self, *a: None if not len(a[3]) else pytest.fail(str(a[3])))
    found, expected = (index.search(asked, 10, **exclusions) for index in (on_gpu, on_cpu))
    if kind == "flat":
        same(found, expected)
    hits = [len({*a} & {*b}) for a, b in zip(found[0], expected[0], strict=True)]
    assert np.mean(hits) / 10 >= 0.99
    for query, ids in enumerate(found[0]):
        for id in ids:
            number = int(id[1:])
            out = exclusions["exclude_groups"][query] or ()
            assert (
                number % 3 and number != query and groups(1200)[number] not in ({out} if isinstance(out, str) else out)
            )
    same(on_gpu.to_cpu().search(asked, 10, **exclusions), expected if kind == "flat" else found)


def test_where_the_device_gives_too_few_the_host_compares(device):
    index = filled(DemoIndex(16).to_gpu(), 3000)
    near = vectors(1, seed=8)
    crowd = near + 0.01 * vectors(2100, seed=9)
    index.add([f"c{i}" for i in range(2100)], crowd, ["crowd"] * 2100)
    expected = filled(DemoIndex(16), 3000).search(near, 5)
    same(index.search(near, 5, exclude_groups=["crowd"]), expected)
    index.remove([f"c{i}" for i in range(2100)])  # most of what the device will propose is gone
    same(index.search(near, 5), expected)
    index.compact()
    assert len(index._structure.codes()) == 3000 and type(index._structure).__name__ == "OnGpu"
    same(index.search(near, 5), expected)


def test_an_index_on_a_gpu_is_saved_and_pickled_as_any_other(device, tmp_path):
    index = filled(DemoIndex(16).to_gpu())
    index.remove(["r0"])
    found = index.search(vectors(3, seed=1), 5)
    same(copy.deepcopy(index).search(vectors(3, seed=1), 5), found)
    index.save(tmp_path)
    same(DemoIndex.load(tmp_path).search(vectors(3, seed=1), 5), found)
    with pytest.raises(ValueError, match="no hnsw graph"):
        DemoIndex(16, kind="hnsw").to_gpu()
    with pytest.raises(ValueError, match="in a file"):
        DemoIndex.load(tmp_path, mmap=True).to_gpu()


def test_without_gpu_support_to_gpu_says_so():
    faiss = require_faiss()
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is a GPU")
    index = filled(DemoIndex(16))
    with pytest.raises(DependencyError, match="faiss-gpu"):
        index.to_gpu()
    assert index.search(vectors(1), 1)[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "storage"), MAPPED)
def test_a_gpu_finds_what_the_cpu_finds(kind, storage):
    faiss = require_faiss()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("needs faiss-gpu and a GPU")
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40_000, 16)) @ rng.normal(size=(16, 128))).astype(np.float32)
    index = DemoIndex(128, kind=kind, storage=storage)
    index.add(names(40_000), rows, groups(40_000))
    index.remove(names(40_000)[::5])
    asked, exclusions = rows[::40] + 0.1, {"exclude_groups": ["g1", None] * 500}
    expected = index.search(asked, 10, **exclusions)
    found = index.to_gpu().search(asked, 10, **exclusions)
    if kind == "flat":
        same(found, expected)
    hits = [len({*a} & {*b}) for a, b in zip(found[0], expected[0], strict=True)]
    assert np.mean(hits) / 10 >= 0.99


# Threads


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_threads_get_what_one_gets(kind, learns_early):
    index = filled(ShardedIndex(16, shard_rows=700, kind=kind), 2000)
    asked = vectors(320, seed=4)
    ids = [f"r{i}" for i in range(320)]
    expected = index.search(asked, 7, exclude_ids=ids)
    start = threading.Barrier(16)

    def work(number):
        start.wait(10)
        return [index.search(asked[i : i + 1], 7, exclude_ids=[ids[i]]) for i in range(number, 320, 16)]

    with ThreadPoolExecutor(16) as pool:
        shares = list(pool.map(work, range(16)))
    for i in range(320):
        found = shares[i % 16][i // 16]
        assert found[0][0] == expected[0][i]
        np.testing.assert_allclose(found[1][0], expected[1][i], atol=1e-6)
