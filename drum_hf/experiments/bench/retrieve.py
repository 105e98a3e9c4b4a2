"""`drum-hf bench retrieve`: recall against latency against memory, by kind of index, storage and number of vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...index.demo_index import DemoIndex
from ...utils.files import write_text
from ...utils.optional import require_faiss
from .machine import measure_memory, resident_mb
from .vectors import Vectors

__all__ = ["SWEEPS", "Setup", "best_point", "exact_neighbours", "measure_index", "measure_retrieval"]

#: What is varied at search time, by kind: options of `DemoIndex`, from quick to thorough.
SWEEPS: dict[str, tuple[dict[str, int], ...]] = {
    "hnsw": tuple({"ef_search": n} for n in (16, 32, 64, 128, 256, 512, 1024)),
    "ivfpq": (
        *({"nprobe": n} for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
        *({"nprobe": n, "refine": r} for n, r in ((32, 512), (64, 512), (128, 1024), (256, 2048))),
    ),
}
#: Rows asked for.
DEPTH = 10
#: Each query is asked so often, in rounds over all of them; its fastest answer counts, so that whatever else the
#: machine does disturbs less. Between two rounds the others' rows have passed through the caches.
_ROUNDS = 3
#: A search that takes longer (seconds) is measured in one round over so many queries.
_SLOW, _FEW = 0.02, 200
#: Vectors added at once, so that a large index is never beside all of its input.
_ADDED = 1 << 17


@dataclasses.dataclass(frozen=True)
class Setup:
    """One index that is measured: a kind and a storage of `DemoIndex`."""

    kind: str
    storage: str

    def __post_init__(self) -> None:
        DemoIndex(1, kind=self.kind, storage=self.storage)  # type: ignore[arg-type]  # refused now, not in hours

    def megabytes(self, size: int, dimension: int) -> float:
        """What the stored vectors alone take, in MiB."""
        return size * dimension * {"float32": 4, "float16": 2, "int8": 1}[self.storage] / 2**20


def measure_retrieval(
    vectors: Vectors,
    sizes: Sequence[int],
    setups: Sequence[Setup],
    *,
    cache: str | os.PathLike[str],
    workers: int = 1,
    limit_mb: float = 4096,
) -> Iterator[dict[str, Any]]:
    """Measure every setup at every size, each in a fresh process; what the cache has is not measured again.

    Args:
        vectors: where they come from; as many as the largest size.
        sizes: numbers of vectors.
        setups: what is measured.
        cache: folder for the vectors and for what was measured.
        workers: processes that prepare the vectors.
        limit_mb: setups whose vectors take more memory are left out, and said to be.

    Yields:
        For each size and setup what `measure_index` returns, or its `skipped` reason.

    Raises:
        ValueError: a size below 10, the number of rows that each query asks for.
    """
    if min(sizes) < DEPTH:
        raise ValueError(f"expected sizes of at least {DEPTH}, the rows that a query asks for; got {min(sizes)}")
    vectors.prepare(workers=workers)
    about = vectors.describe()
    rows = _rows(vectors)
    for size in sizes:
        exact = None
        for setup in setups:
            row = {"source": vectors.name, **about, "size": size, "kind": setup.kind, "storage": setup.storage}
            if (takes := setup.megabytes(size, vectors.dimension)) > limit_mb:
                yield row | {"skipped": f"its vectors alone take {takes:,.0f} MiB of the {limit_mb:,.0f} allowed"}
                continue
            kept = Path(cache, f"measured-{_digest([row, rows, SWEEPS.get(setup.kind), _defaults()])}.json")
            if kept.exists():
                yield json.loads(kept.read_text(encoding="utf-8"))
                continue
            exact = exact_neighbours(vectors, size, cache) if exact is None else exact
            measured = measure_memory(measure_index, vectors, size, setup, os.fspath(exact))
            row |= measured.result | {"peak_mb": round(measured.peak_mb)}
            write_text(kept, json.dumps(row))
            yield row


def measure_index(vectors: Vectors, size: int, setup: Setup, exact: str) -> dict[str, Any]:
    """Build an index and ask it, one query at a time and on one thread.

    Args:
        vectors: prepared.
        size: how many of them to add.
        setup: what to build; options are `DemoIndex`'s defaults.
        exact: `.npy` file of the rows that are nearest to each query, (queries, 10).

    Returns:
        `build_seconds` (of one core), `memory_mb` (what the process grew by, ids included) and `points`: for each
        setting that is swept its `recall_at_10`, and of the time for one query `p50_ms` and `p95_ms`.
    """
    require_faiss().omp_set_num_threads(1)
    queries, nearest = vectors.asked(), np.load(exact)
    first = resident_mb()
    index = DemoIndex(vectors.dimension, kind=setup.kind, storage=setup.storage)  # type: ignore[arg-type]
    seconds = 0.0
    for block in _joined(vectors.blocks(size), _ADDED):
        ids = [str(len(index) + i) for i in range(len(block))]
        start = time.process_time()
        index.add(ids, block)
        seconds += time.process_time() - start
    del block
    memory = resident_mb() - first
    points = []
    for setting in SWEEPS.get(setup.kind, ({},)):
        for option, value in setting.items():
            setattr(index, option, value)
        points.append(setting | _ask(index, queries, nearest))
    return {"build_seconds": round(seconds, 1), "memory_mb": round(memory), "points": points}


def _ask(index: DemoIndex, queries: np.ndarray, nearest: np.ndarray) -> dict[str, float]:
    index.search(queries[:1], DEPTH)
    start = time.perf_counter()
    index.search(queries[:1], DEPTH)
    slow = time.perf_counter() - start > _SLOW
    if slow:
        queries, nearest = queries[:_FEW], nearest[:_FEW]
    seconds = np.full(len(queries), np.inf)
    found: list[list[str]] = []
    for _ in range(1 if slow else _ROUNDS):
        found = []
        for i in range(len(queries)):
            start = time.perf_counter()
            ids = index.search(queries[i : i + 1], DEPTH)[0]
            seconds[i] = min(seconds[i], time.perf_counter() - start)
            found += ids
    hits = [len({int(id) for id in ids} & set(rows)) for ids, rows in zip(found, nearest.tolist(), strict=True)]
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    recall = float(np.mean(hits)) / DEPTH
    return {"recall_at_10": round(recall, 5), "p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "asked": len(queries)}


def exact_neighbours(vectors: Vectors, size: int, cache: str | os.PathLike[str]) -> Path:
    """File of the rows nearest to each query, (queries, 10) int64, by float32 products; kept in the cache."""
    path = Path(cache, f"exact-{_digest([_rows(vectors), size])}.npy")
    if path.exists():
        return path
    queries = _unit(vectors.asked())
    scores = np.full((len(queries), 0), 0.0, np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    start = 0
    for block in vectors.blocks(size):
        new = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        scores = np.concatenate([scores, queries @ _unit(block).T], axis=1)
        rows = np.concatenate([rows, new], axis=1)
        best = np.argpartition(-scores, min(DEPTH, scores.shape[1]) - 1, axis=1)[:, :DEPTH]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        start += len(block)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        np.save(file, rows)
    os.replace(beside, path)
    return path


def best_point(row: dict[str, Any], recall: float = 0.99) -> dict[str, Any] | None:
    """The fastest point of a row that reaches a recall; None where none does."""
    enough = [point for point in row.get("points", []) if point["recall_at_10"] >= recall]
    return min(enough, key=lambda point: point["p50_ms"], default=None)


def _joined(blocks: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= rows:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _rows(vectors: Vectors) -> dict[str, Any]:
    """What the rows depend on: not on where they are kept, nor on how many follow."""
    fields = vars(vectors) | {"name": vectors.name}
    return {name: value for name, value in fields.items() if name not in ("cache", "count")}


def _defaults() -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(DemoIndex.__init__).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, (int, str))}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
