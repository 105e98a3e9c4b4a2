"""`drum-hf bench mine`: where a round of mining spends its time; and what several threads make of an index."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...data import TripletTable
from ...index.demo_index import DemoIndex
from .encode import shaped_encoder

__all__ = ["measure_mining", "measure_threads"]


def measure_mining(
    shape: str,
    table: TripletTable,
    *,
    queries: int = 1000,
    candidates: int = 10,
    known: int = 10,
    kind: str = "flat",
    device: str | None = None,
) -> dict[str, Any]:
    """Time a round of mining, split into reading, encoder, index and Python.

    Args:
        shape: one of `encode.SHAPES`.
        table: the support set.
        queries: rows that candidates are mined for, among the support set's.
        candidates: new pairs for each query.
        known: pairs that each has from a round before, drawn at random.
        kind: of the index.

    Returns:
        Seconds of `reading` (queries and their images, from the table), `encoder` (preprocessing and embedding them;
        queries only, since the support set's embedding is no part of mining's loop), `index` (searching) and `python`
        (all the rest), their shares, and `queries_per_second`.
    """
    from ...retriever.retriever import DemoRetriever
    from ...training.mining import CandidateTable, mine_candidates

    with contextlib.ExitStack() as stack:
        encoder = shaped_encoder(shape, device, stack)
        retriever = DemoRetriever(encoder, table, index_kind=kind)
        retriever.refresh()
        asked = table.ids[:queries]
        pairs, rng = CandidateTable(asked), np.random.default_rng(0)
        spent = {"reading": 0.0, "encoder": 0.0, "index": 0.0}
        how: dict[str, Any] = {"count": known, "random_share": 1.0, "rng": rng}
        if known:
            first = mine_candidates(retriever, pairs, table.query, **how)
            pairs.extend(first, np.zeros(sum(map(len, first.values()))))
        with (
            _timed(table, "query", spent, "reading"),
            _timed(retriever, "_encode_queries", spent, "encoder"),
            _timed(retriever.index, "search", spent, "index"),
        ):
            began = time.perf_counter()
            mined = mine_candidates(
                retriever,
                pairs,
                lambda id: table.query(id, draft="a draft"),
                count=candidates,
                random_share=0.0,
                rng=rng,
            )
            pairs.extend(mined, np.zeros(sum(map(len, mined.values()))))
            seconds = time.perf_counter() - began
    spent["python"] = seconds - sum(spent.values())
    return {
        "shape": shape, "queries": len(asked), "support": len(table), "kind": kind, "candidates": candidates,
        "known": known, "seconds": round(seconds, 3), **{name: round(value, 3) for name, value in spent.items()},
        **{f"{name}_share": round(value / seconds, 3) for name, value in spent.items()},
        "queries_per_second": round(len(asked) / seconds, 1),
    }  # fmt: skip


@contextlib.contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float], part: str) -> Iterator[None]:
    """Adds up what an object's method takes."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def measure_threads(
    index: DemoIndex, queries: np.ndarray, *, threads: int = 16, k: int = 10, rounds: int = 3
) -> dict[str, Any]:
    """Ask an index one query at a time, from one thread and from several.

    Returns:
        `one_by_one` and `threaded` (queries a second, the best of some rounds), their `ratio` (above 1: threads are
        faster) and whether the ids were the `same`.
    """

    def ask(rows: range) -> list[list[str]]:
        return [index.search(queries[row : row + 1], k)[0][0] for row in rows]

    def clocked(work: Callable[[], list[list[list[str]]]]) -> tuple[float, list[list[list[str]]]]:
        began = time.perf_counter()
        found = work()
        return time.perf_counter() - began, found

    shares = [range(number, len(queries), threads) for number in range(threads)]
    ask(range(min(len(queries), 10)))
    with ThreadPoolExecutor(threads) as pool:
        alone = [clocked(lambda: [ask(share) for share in shares]) for _ in range(rounds)]
        several = [clocked(lambda: list(pool.map(ask, shares))) for _ in range(rounds)]
    first, second = (len(queries) / min(seconds for seconds, _ in found) for found in (alone, several))
    same = all(found == alone[0][1] for _, found in [*alone, *several])
    return {
        "kind": index.kind, "storage": index.storage, "rows": len(index), "dimension": index.dimension,
        "threads": threads, "one_by_one": round(first, 1), "threaded": round(second, 1),
        "ratio": round(second / first, 3), "same": same,
    }  # fmt: skip
