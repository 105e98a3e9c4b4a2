"""Plans of large indexes, exponents of growth, and the profiles of mining and of threads, at tiny sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from drum_hf.cli import main
from drum_hf.experiments.bench.mine import measure_mining, measure_threads
from drum_hf.experiments.bench.plan import growth, plan_index
from drum_hf.index.demo_index import DemoIndex
from drum_hf.playground.building.rows import playground_table


@pytest.mark.parametrize(
    ("dimension", "kind", "storage", "measured_mib"),
    [(384, "hnsw", "float16", 1134), (384, "ivfpq", "float16", 993), (1536, "ivfpq", "int8", 1740)],
)
def test_plans_are_what_a_million_rows_were_measured_to_take(dimension, kind, storage, measured_mib):
    plan = plan_index(1_000_000, dimension, kind=kind, storage=storage, calibrate=0)  # docs/benchmarks.md
    assert plan.memory / 2**20 == pytest.approx(measured_mib, rel=0.03)
    assert plan.build_seconds is None and plan.build_memory > plan.memory


@pytest.mark.parametrize(("kind", "storage"), [("flat", "float32"), ("hnsw", "float16"), ("ivfpq", "int8")])
def test_disk_is_what_is_written(kind, storage, tmp_path):
    count = 10_000
    index = DemoIndex(16, kind=kind, storage=storage, pq_bytes=8, ef_construction=20)
    index.add([f"row-{i}" for i in range(count)], np.random.default_rng(0).normal(size=(count, 16)))
    index.save(tmp_path)
    plan = plan_index(count, 16, kind=kind, storage=storage, pq_bytes=8, calibrate=0)
    assert plan.disk == pytest.approx(sum(file.stat().st_size for file in tmp_path.iterdir()), rel=0.1)


def test_shards_bound_what_building_takes_and_lists_what_mapping_leaves():
    whole, parts = (plan_index(10_000_000, 1536, kind="ivfpq", shard_rows=rows, calibrate=0) for rows in (None, 10**6))
    assert (whole.shards, parts.shards) == (1, 10)
    assert parts.build_memory < 0.3 * whole.build_memory
    assert parts.mapped_memory is not None and parts.mapped_memory < 0.1 * parts.memory
    assert plan_index(10, 8, kind="hnsw", calibrate=0).mapped_memory is None


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_time_grows_as_the_work_does(kind, monkeypatch):
    monkeypatch.setattr("drum_hf.experiments.bench.plan._build_seconds", lambda index, rows: 1.0)
    times = [plan_index(n, 8, kind=kind, calibrate=1000).build_seconds for n in (1000, 10_000, 100_000)]
    assert times[0] == 1.0
    slopes = np.diff(np.log10(times))
    low, high = {"flat": (1, 1), "hnsw": (1.05, 1.2), "ivfpq": (1.0, 1.5)}[kind]
    assert (slopes >= low - 1e-9).all() and (slopes <= high + 1e-9).all()
    monkeypatch.undo()
    assert plan_index(5000, 8, kind=kind, calibrate=500, ef_construction=20).build_seconds > 0


def test_plans_refuse_nonsense():
    for wrong in ({"rows": 0}, {"shard_rows": 0}, {"kind": "tree"}, {"calibrate": -1}):
        with pytest.raises(ValueError):
            plan_index(**({"rows": 10, "dimension": 4} | wrong))


def test_exponents_of_growth():
    def row(size, kind, power):
        point = {"recall_at_10": 1.0, "p50_ms": size**power}
        about = {"source": "s", "kind": kind, "storage": "float32", "size": size}
        return about | {"build_seconds": 2.0 * size**1.5, "memory_mb": 3.0 * size, "points": [point]}

    rows = [row(size, kind, power) for kind, power in (("flat", 1.0), ("hnsw", 0.2)) for size in (10, 100, 1000)]
    flat, hnsw = growth([*rows, {"source": "s", "kind": "flat", "storage": "int8", "size": 10, "skipped": "large"}])
    assert (flat["sizes"], flat["build_seconds"], flat["memory_mb"], flat["p50_ms"]) == (
        [10, 100, 1000],
        1.5,
        1.0,
        1.0,
    )
    assert (hnsw["kind"], hnsw["p50_ms"]) == ("hnsw", 0.2)
    (one,) = growth([row(10, "flat", 1.0) | {"build_seconds": 0.0}])
    assert one["build_seconds"] is None and one["p50_ms"] is None


def test_threads_find_the_same():
    index = DemoIndex(8)
    index.add([f"r{i}" for i in range(200)], np.random.default_rng(0).normal(size=(200, 8)))
    found = measure_threads(index, np.random.default_rng(1).normal(size=(40, 8)), threads=16, rounds=1)
    assert found["same"] and found["ratio"] > 0 and found["threads"] == 16


def test_mining_is_split_into_its_parts():
    found = measure_mining("playground", playground_table(30), queries=12, candidates=4, known=3, device="cpu")
    names = ("reading", "encoder", "index", "python")
    parts = [found[name] for name in names]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(found["seconds"], abs=0.01)
    assert sum(found[f"{name}_share"] for name in names) == pytest.approx(1, abs=0.01)


def test_a_table_is_measured_loaded_and_mapped(capsys, tmp_path):
    main(["bench", "table", "--rows", "600", "--json", str(tmp_path / "table.json")])
    found, out = json.loads((tmp_path / "table.json").read_text()), capsys.readouterr().out
    assert found["rows"] == 600 and min(found["disk"].values()) >= 0
    for name in ("loaded", "mapped first", "mapped again"):
        assert found[name]["seconds"] > 0 and found[name]["read_us"] > 0 and found[name]["peak_mb"] > 50
        assert f"table {name}" in out


def test_the_command_line_plans(capsys, tmp_path):
    arguments = ["--rows", "10000000", "--dim", "1536", "--shard-rows", "1000000", "--calibrate", "0"]
    main(["bench", "plan", *arguments, "--json", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert "10 shard(s)" in out and "with mmap=True" in out
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == 10_000_000
