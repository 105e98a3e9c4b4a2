"""The benchmarks at tiny sizes: what they count and write, never how fast anything is."""

from __future__ import annotations

import json
import os

import memory_use
import numpy as np
import pytest
import torch

import drum_hf.experiments.bench.retrieve
import drum_hf.playground.building.rows
from drum_hf.cli import main
from drum_hf.encoders import build_encoder, encode_items
from drum_hf.experiments.bench.encode import compare, measure_encode
from drum_hf.experiments.bench.machine import describe_machine, measure_gemm, measure_memory, resident_mb
from drum_hf.experiments.bench.retrieve import Setup, best_point, exact_neighbours, measure_index, measure_retrieval
from drum_hf.experiments.bench.train import measure_training
from drum_hf.experiments.bench.vectors import SyntheticVectors
from drum_hf.playground import make_world
from drum_hf.playground.building.rows import PlaygroundVectors, embed_rows, playground_rows
from drum_hf.types import content_key, image_key


@pytest.fixture(scope="module")
def encoder():
    return build_encoder("playground/clip", device="cpu")


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of 14 rows, embedded in this process."""

    class Here:
        def __init__(self, *args, **kwargs): ...

        def __enter__(self):
            return self

        def __exit__(self, *args): ...

        def submit(self, function, *args):
            function(*args)
            return self

        def result(self):
            return None

    for name, value in {"_ASKED": 5, "_CAPTIONED": 2, "_DIGITS": 2, "ProcessPoolExecutor": Here}.items():
        monkeypatch.setattr(drum_hf.playground.building.rows, name, value)
    monkeypatch.setattr(drum_hf.playground.building.rows, "as_completed", lambda futures: futures)


# Vectors


def test_rows_are_a_worlds_rows_and_always_the_same(small_batches):
    pictures, rows = playground_rows(3)
    assert [place for place, *_ in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8] and len(pictures) == 9
    assert all(prompt and response.split()[-1].isalpha() for _, prompt, response in rows)
    again, other = playground_rows(3), playground_rows(4)
    assert again[1] == rows and [p.tobytes() for p in again[0]] == [p.tobytes() for p in pictures]
    assert other[1] != rows and other[0][0].tobytes() != pictures[0].tobytes()


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.6, 0.3, 0.1)])
def test_embedding_each_part_once_is_embedding_the_rows(encoder, small_batches, weights):
    before, encoder[0].weights = encoder[0].weights, weights
    try:
        pictures, rows = playground_rows(0)
        items = [{"image": pictures[place], "text": list(texts)} for place, *texts in rows]
        np.testing.assert_allclose(embed_rows(encoder, pictures, rows), encode_items(encoder, items), atol=1e-6)
    finally:
        encoder[0].weights = before


def test_playground_vectors_are_distinct_resumed_and_cut_from_one_table(small_batches, tmp_path, monkeypatch):
    vectors = PlaygroundVectors(60, 5, str(tmp_path))
    vectors.prepare()
    (folder,) = tmp_path.iterdir()
    table, asked = np.concatenate(list(vectors.blocks(60))), vectors.asked()
    assert table.shape == (60, vectors.dimension) and asked.shape == (5, vectors.dimension)
    assert len(np.unique(np.concatenate([table, asked]), axis=0)) == 65
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(20))), table[:20])
    # the first two batches' pictures 0 and 5 are asked about, two rows of one and one of the other
    pictures, rows = playground_rows(0)
    with np.load(folder / "batch-000000.npz") as batch:
        held_out = batch["pictures"] % 5 == 0
        assert held_out.sum() == 3
        np.testing.assert_array_equal(asked[:3], batch["vectors"][held_out])
        np.testing.assert_array_equal(table[: (~held_out).sum()], batch["vectors"][~held_out])
        keys = [content_key(image_key(pictures[place]), *texts) for place, *texts in rows]
        assert [key.tobytes().hex() for key in batch["keys"]] == keys
    # stopped and run again: what is there is not embedded again, what is missing is
    calls, embed = [], drum_hf.playground.building.rows._embed_batch
    monkeypatch.setattr(drum_hf.playground.building.rows, "_embed_batch", lambda *a: (calls.append(a[0]), embed(*a)))
    (folder / "batch-000001.npz").unlink()
    next(folder.glob("table-*")).unlink()
    vectors.prepare()
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(60))), table)
    vectors.prepare()
    assert calls == [1]


def test_rows_that_come_twice_stand_in_the_table_once(small_batches, tmp_path, monkeypatch):
    draw = drum_hf.playground.building.rows.playground_rows
    monkeypatch.setattr(drum_hf.playground.building.rows, "playground_rows", lambda number: draw(number // 2))
    vectors = PlaygroundVectors(50, 3, str(tmp_path))
    vectors.prepare()
    assert len(np.unique(np.concatenate([*vectors.blocks(50), vectors.asked()]), axis=0)) == 53


def test_synthetic_vectors_have_the_dimension_they_state():
    vectors = SyntheticVectors(9000, 50, intrinsic=3, parts=2, width=16, noise=0.01, seed=4)
    rows = np.concatenate(list(vectors.blocks(9000)))
    assert rows.shape == (9000, 32) == (9000, vectors.dimension) and vectors.asked().shape == (50, 32)
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(8200))), rows[:8200])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows[:, :16], axis=1), 0.5**0.5, atol=1e-5)
    for part in (rows[:, :16], rows[:, 16:]):
        energy = np.linalg.svd(part, compute_uv=False) ** 2
        assert energy[:3].sum() / energy.sum() > 0.999
    assert vectors.describe()["intrinsic_dimension"] == 3
    assert not np.isin(vectors.asked()[:, 0], rows[:, 0]).any()


# Retrieval


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(drum_hf.experiments.bench.retrieve, "_ROUNDS", 1)
    monkeypatch.setattr(
        drum_hf.experiments.bench.retrieve, "SWEEPS", {"hnsw": ({"ef_search": 10}, {"ef_search": 300})}
    )


def test_exact_neighbours_are_numpys(tmp_path):
    vectors = SyntheticVectors(9000, 20, intrinsic=4, width=8)
    exact = np.load(exact_neighbours(vectors, 9000, tmp_path))
    rows = np.concatenate(list(vectors.blocks(9000)))
    expected = np.argsort(-(vectors.asked() @ rows.T), axis=1)[:, :10]
    assert [set(row) for row in exact] == [set(row) for row in expected]
    assert len(list(tmp_path.iterdir())) == 1
    exact_neighbours(SyntheticVectors(20_000, 20, intrinsic=4, width=8), 9000, tmp_path)  # the same rows
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("kind", "points"), [("flat", 1), ("hnsw", 2)])
def test_an_index_is_measured_against_the_exact_one(kind, points, tmp_path, quick):
    vectors = SyntheticVectors(300, 20, intrinsic=4, width=8)
    exact = exact_neighbours(vectors, 300, tmp_path)
    measured = measure_index(vectors, 300, Setup(kind, "float32"), os.fspath(exact))
    assert len(measured["points"]) == points and measured["build_seconds"] >= 0
    last = measured["points"][-1]
    assert last["recall_at_10"] == 1.0 and last["asked"] == 20 and 0 < last["p50_ms"] <= last["p95_ms"]
    assert [point.get("ef_search") for point in measured["points"]] == ([None] if kind == "flat" else [10, 300])
    np.save(exact, np.load(exact) * 0 + 299)  # another truth gives another recall
    assert measure_index(vectors, 300, Setup(kind, "float32"), os.fspath(exact))["points"][-1]["recall_at_10"] < 0.2


def test_what_was_measured_is_kept_and_what_is_too_large_is_said(tmp_path, quick, monkeypatch):
    vectors = SyntheticVectors(300, 20, intrinsic=4, width=8)
    setups = [Setup("flat", "float32"), Setup("flat", "int8")]
    rows = list(measure_retrieval(vectors, [10, 300], setups, cache=tmp_path, limit_mb=0.02))
    assert [(row["size"], row["storage"], "skipped" in row) for row in rows] == [
        (10, "float32", False),
        (10, "int8", False),
        (300, "float32", True),
        (300, "int8", False),
    ]
    assert "0 MiB" in rows[2]["skipped"] and rows[0]["peak_mb"] > 10 and rows[0]["points"][0]["recall_at_10"] == 1.0
    monkeypatch.setattr(drum_hf.experiments.bench.retrieve, "measure_memory", lambda *a: pytest.fail("measured again"))
    assert list(measure_retrieval(vectors, [10, 300], setups, cache=tmp_path, limit_mb=0.02)) == rows


def test_the_best_point_is_the_fastest_that_finds_enough():
    points = [{"recall_at_10": r, "p50_ms": t} for r, t in ((0.98, 0.1), (0.99, 0.4), (0.995, 0.3), (1.0, 2.0))]
    assert best_point({"points": points}) == points[2]
    assert best_point({"points": points[:1]}) is None is best_point({"skipped": "too large"})


def test_setups_and_sizes_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="kind"):
        Setup("tree", "float32")
    with pytest.raises(ValueError, match="storage"):
        Setup("flat", "int4")
    with pytest.raises(ValueError, match="at least 10"):
        list(measure_retrieval(SyntheticVectors(5, 5), [5], [Setup("flat", "int8")], cache=tmp_path))


# Encoding and training


def test_compare_alternates_and_takes_the_median(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("time.process_time", lambda: clock[0])

    def taking(name, seconds):
        durations = iter(seconds)

        def function():
            calls.append(name)
            clock[0] += next(durations)

        return function

    ratio = compare(taking("a", [9, 2, 3, 40]), taking("b", [1, 1, 1, 1]), repeats=3)
    assert ratio == pytest.approx(3.0)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_encode_is_measured_on_the_same_items(small_batches):
    pictures, rows = playground_rows(0)
    items = [{"image": pictures[place], "text": list(texts)} for place, *texts in rows]
    threads = torch.get_num_threads()
    measured = measure_encode("playground", items[:8], batch_size=4, repeats=1, device="cpu")
    assert torch.get_num_threads() == threads
    assert set(measured) >= {"shape", "items", "batch_size", "forward_overhead", "encode_overhead", "forward_share"}
    assert (measured["items"], measured["batch_size"]) == (8, 4) and 0 < measured["forward_share"] < 1.5
    with pytest.raises(ValueError, match="clip-vit-b-32"):
        measure_encode("clip-vit-b-33", items, repeats=1)


def test_a_training_steps_images_are_counted():
    measured = measure_training(
        "playground", make_world(0, difficulty="easy").support, batch_size=4, list_size=3, steps=2, device="cpu"
    )
    assert measured["images_encoded_twice"] == measured["images_encoded"] - measured["images_distinct"] == 0
    assert 0 < measured["images_distinct"] <= 2 * 4 * (1 + 3) and measured["ratio"] > 0
    assert 4 < measured["rows"] <= 4 * (1 + 3)


# The machine


def test_gemm_and_machine():
    assert measure_gemm(torch.float32, sizes=((8, 16, 8),), repeats=2) > 0
    machine = describe_machine()
    assert machine["gpu"] is None and machine["cores"] >= 1 and machine["torch"] == torch.__version__
    assert machine["cpu"] and machine["memory_gb"] > 0 and json.dumps(machine)


def test_memory_is_that_of_a_process_of_its_own():
    held = np.ones(300 * 2**17)  # ours, and no business of the child's
    little, much = measure_memory(memory_use.take, 1), measure_memory(memory_use.take, megabytes=200)
    assert much.result[0] == 200 * 2**17 and much.result[1] != os.getpid() != little.result[1]
    assert 150 < much.peak_mb - little.peak_mb < 250
    assert little.peak_mb < resident_mb() and held.any()
    with pytest.raises(TypeError):
        measure_memory(memory_use.take, None)
    with pytest.raises(RuntimeError, match="exit code 3"):
        measure_memory(memory_use.die, 3)


# The command


def test_bench_retrieve_writes_what_it_measured(small_batches, quick, tmp_path, capsys):
    out = tmp_path / "r.json"
    command = ["-q", "bench", "retrieve", "--sizes", "40", "--queries", "4", "--cache", str(tmp_path / "c")]
    command += [
        "--kinds",
        "flat,hnsw",
        "--storages",
        "float16",
        "--items",
        "4",
        "--batch-size",
        "2",
        "--json",
        str(out),
    ]
    assert main([*command, "--vectors", "playground,synthetic", "--device", "cpu"]) == 0
    content, said = json.loads(out.read_text()), capsys.readouterr().out
    assert set(content) == {"machine", "encode", "retrieve", "best"}
    assert [(r["source"], r["dimension"], r["kind"]) for r in content["retrieve"]] == [
        ("playground", 384, "flat"),
        ("playground", 384, "hnsw"),
        ("synthetic", 1536, "flat"),
        ("synthetic", 1536, "hnsw"),
    ]
    for row in content["retrieve"]:
        assert {"size", "storage", "build_seconds", "memory_mb", "peak_mb", "points", "queries"} <= set(row)
    assert len(content["best"]) == 4 and "recall_at_10" in said and "encode_overhead" in said
    assert main([*command, "--vectors", "photographs"]) == 2
    assert "playground, synthetic" in capsys.readouterr().err


def test_bench_train_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "t.json"
    command = ["-q", "bench", "train", "--batch-size", "2", "--list-size", "2", "--steps", "1", "--device", "cpu"]
    assert main([*command, "--json", str(out)]) == 0
    assert {"machine", "ratio", "images_encoded_twice"} <= set(json.loads(out.read_text()))
    assert "ratio" in capsys.readouterr().out
