"""`drum-hf bench plan`: what an index of so many rows will take, before it is built; and how measured cost grew."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...index.demo_index import DemoIndex

__all__ = ["IndexPlan", "growth", "plan_index"]

_BYTES = {"float32": 4, "float16": 2, "int8": 1}
#: A row's id as text, its entries in list and dictionary, its group and whether it lives: what a million rows were
#: measured to take beside vectors and structure, with ids of six digits.
_ROW_BYTES = 160
#: An id in `index.json`, and its group.
_ID_BYTES = 25
#: Inverted lists grow by doubling: what they hold in reserve on average.
_RESERVE = 1.4
#: Rows of a block that is added, and its copy of unit length.
_BLOCK = 1 << 17


@dataclasses.dataclass(frozen=True)
class IndexPlan:
    """What an index will take; sizes in bytes.

    Attributes:
        shards: how many files of `shard_rows` rows.
        memory: of the index when it is searched.
        mapped_memory: the same with `mmap=True`, beside what the system caches of the file; None for `hnsw`.
        build_memory: at most, while it is built shard by shard.
        disk: of the saved index.
        build_seconds: of one core; None where nothing was measured.
    """

    rows: int
    dimension: int
    kind: str
    storage: str
    shards: int
    memory: int
    mapped_memory: int | None
    build_memory: int
    disk: int
    build_seconds: float | None

    def describe(self) -> str:
        """Some lines for a terminal."""
        mapped = "" if self.mapped_memory is None else f" ({_gb(self.mapped_memory)} with mmap=True)"
        lines = [
            f"{self.rows:,} rows of {self.dimension:,} dimensions, {self.kind} {self.storage}, {self.shards} shard(s)",
            f"memory to search  {_gb(self.memory)}{mapped}",
            f"memory to build   {_gb(self.build_memory)}",
            f"disk              {_gb(self.disk)}",
        ]
        if self.build_seconds is not None:
            lines.append(f"time to build     {self.build_seconds / 3600:.2f} h of one core")
        return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _structure_bytes(rows: int, dimension: int, kind: str, options: DemoIndex, *, saved: bool = False) -> float:
    """Beside the vectors: a graph's links, or lists, codes and what they were learned to."""
    if kind == "hnsw":
        links = 2 * options.hnsw_m + options.hnsw_m / (options.hnsw_m - 1)  # the lowest level's, and all above it
        return rows * (4 * links + 4 + 8)
    if kind == "ivfpq":
        lists = min(4 * math.sqrt(rows), rows / 39)
        row = options.pq_bytes + 4 if saved else (options.pq_bytes + 8) * _RESERVE
        return rows * row + (lists + 256) * dimension * 4
    return 0.0


def plan_index(
    rows: int,
    dimension: int,
    *,
    kind: str = "flat",
    storage: str = "float32",
    shard_rows: int | None = None,
    calibrate: int = 20_000,
    **options: Any,
) -> IndexPlan:
    """Memory, disk and time of an index, from its parts' sizes and a short build of `calibrate` rows here.

    The time grows as the work does: with n for `flat`, with n log n for `hnsw` (at a depth of search that is as good
    for n rows, which structureless data doesn't give), and for `ivfpq` with n to learn and n sqrt(n) to assign rows to
    4 sqrt(n) lists. Each shard is built by itself.

    Args:
        rows, dimension: of the table.
        kind, storage, options: as of [`DemoIndex`][drum_hf.index.demo_index.DemoIndex].
        shard_rows: rows of a shard; None: a single index.
        calibrate: rows built here, on vectors of intrinsic dimension 32; 0 measures nothing.

    Raises:
        ValueError: a number below 1, an unknown kind or storage.

    Example:
        >>> plan = plan_index(10_000_000, 1536, kind="ivfpq", storage="int8", shard_rows=1_000_000, calibrate=0)
        >>> plan.shards, round(plan.memory / 2**30, 1), round(plan.mapped_memory / 2**30, 1)
        (10, 17.0, 2.7)
    """
    sample = DemoIndex(dimension, kind=kind, storage=storage, **options)  # type: ignore[arg-type]
    if rows < 1 or (shard_rows is not None and shard_rows < 1) or calibrate < 0:
        raise ValueError(f"expected rows of at least 1, got {rows=}, {shard_rows=}, {calibrate=}")
    size = min(rows, shard_rows or rows)
    shards = -(-rows // size)
    vectors, structure = size * dimension * _BYTES[storage], _structure_bytes(size, dimension, kind, sample)
    written = _structure_bytes(size, dimension, kind, sample, saved=True)
    ids = rows * _ROW_BYTES
    block = 2 * min(_BLOCK, size) * dimension * 4
    learned = min(size, max(1 << 16, 256 * math.sqrt(size))) * dimension * 4 if kind == "ivfpq" else 0
    seconds = None
    if calibrate:
        count = min(calibrate, size)
        seconds = _build_seconds(sample, count) * shards * _work(kind, size) / _work(kind, count)
    return IndexPlan(
        rows=rows,
        dimension=dimension,
        kind=kind,
        storage=storage,
        shards=shards,
        memory=round(shards * (vectors + structure) + ids),
        mapped_memory=None if kind == "hnsw" else round(shards * structure + ids),
        # vectors are copied whenever their array grows
        build_memory=round(2 * vectors + structure + ids + block + learned),
        disk=round(shards * (vectors + written) + rows * _ID_BYTES),
        build_seconds=seconds,
    )


def _work(kind: str, rows: int) -> float:
    """Steps of building, up to a factor."""
    if kind == "hnsw":
        return rows * math.log2(max(rows, 2))
    if kind == "ivfpq":  # k-means: 25 passes over 64 points for each of 4 sqrt(n) centres; then each row to its list
        return 25 * 64 * 16 * rows + 4 * rows * math.sqrt(rows)
    return rows


def _build_seconds(index: DemoIndex, rows: int) -> float:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((rows, min(32, index.dimension)), np.float32)
    vectors = latent @ rng.standard_normal((latent.shape[1], index.dimension), np.float32)
    vectors += 0.1 * rng.standard_normal(vectors.shape, np.float32)
    names = [f"row-{number}" for number in range(rows)]
    began = time.process_time()
    index.add(names, vectors)
    return time.process_time() - began


def growth(measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How cost grew with the number of rows: exponents of what `measure_retrieval` yielded for two sizes or more.

    An exponent of 1 doubles the cost when rows double, 0 leaves it; fitted to the logarithms by least squares.

    Returns:
        For each source, kind and storage its `sizes`, and exponents `build_seconds`, `memory_mb` and `p50_ms` (of the
        fastest point with a recall of 0.99, or else of the one with the best recall); None where a cost is zero or
        was measured at one size only.
    """
    from .retrieve import best_point

    by_setup: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
    for row in measured:
        if "points" not in row:
            continue
        point = best_point(row) or max(row["points"], key=lambda point: point["recall_at_10"])
        costs = {"build_seconds": row["build_seconds"], "memory_mb": row["memory_mb"], "p50_ms": point["p50_ms"]}
        by_setup.setdefault((row["source"], row["kind"], row["storage"]), {})[row["size"]] = costs
    rows = []
    for (source, kind, storage), by_size in by_setup.items():
        sizes = sorted(by_size)
        about: dict[str, Any] = {"source": source, "kind": kind, "storage": storage, "sizes": sizes}
        for cost in ("build_seconds", "memory_mb", "p50_ms"):
            values = [by_size[size][cost] for size in sizes]
            fits = len(sizes) > 1 and min(values) > 0
            about[cost] = round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 2) if fits else None
        rows.append(about)
    return rows
