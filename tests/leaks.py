"""Retrievals by the million, none of which may return the query itself or a row of its group.

`python -m tests.leaks --count 1000000` from the root of the repository; test_leaks.py runs a few tens of thousands.
Rows of a group lie closest together, and every query is a row's own vector, so that what is not excluded comes first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import drum_hf._index_faiss
from drum_hf._index_faiss import KINDS, STORAGES
from drum_hf.data import TripletTable
from drum_hf.evaluation.evaluator import ICLEvaluator
from drum_hf.evaluation.strategies import BM25, Fixed, Random, Retrieved, SameAnswerOracle, ScoreOracle
from drum_hf.index import DemoIndex
from drum_hf.lvlm.feedback import Feedback
from drum_hf.retriever import DemoRetriever
from drum_hf.selection import DPP, MMR, Coverage
from drum_hf.sharded_index import ShardedIndex
from drum_hf.training.mining import CandidateTable, mine_candidates

ROWS, DIMENSION, GROUPS, DEPTH, BATCH = 1200, 12, 150, 5, 600


class World:
    """Rows in groups, some without one; a group's vectors differ in the last digits."""

    def __init__(self, seed: int, rows: int = ROWS) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.ids = [f"r{i}" for i in range(rows)]
        numbers = rng.integers(-GROUPS // 3, GROUPS, rows)
        self.groups = [f"g{g}" if g >= 0 else None for g in numbers]
        centres = rng.normal(size=(GROUPS, DIMENSION))
        alone = rng.normal(size=(rows, DIMENSION))
        self.vectors = np.where((numbers >= 0)[:, None], centres[numbers] + 1e-3 * alone, alone).astype(np.float32)
        self.group_of = dict(zip(self.ids, self.groups, strict=True))
        self.row = {id: i for i, id in enumerate(self.ids)}

    def table(self) -> TripletTable:
        words = ("bako", "delu", "fimo", "gusa")
        rows = [
            {"id": id, "prompt": f"group {group} asks", "response": words[i % 4], "group": group or ""}
            for i, (id, group) in enumerate(zip(self.ids, self.groups, strict=True))
        ]
        return TripletTable.from_dataset(rows)

    def leaks(self, asked: Sequence[str], found: Sequence[Sequence[str]]) -> int:
        """How many results show a query itself or a row of its group."""
        count = 0
        for query, ids in zip(asked, found, strict=True):
            group = self.group_of[query]
            count += sum(id == query or (group is not None and self.group_of[id] == group) for id in ids)
        return count


def in_indexes(world: World, folder: Path) -> dict[str, Any]:
    """Every index: kinds, storages, in shards, with its vectors in a file."""
    indexes: dict[str, Any] = {}
    for kind in KINDS:
        for storage in STORAGES:
            indexes[f"{kind} {storage}"] = DemoIndex(DIMENSION, kind=kind, storage=storage)
    indexes["flat in shards"] = ShardedIndex(DIMENSION, shard_rows=500)
    indexes["ivfpq in shards"] = ShardedIndex(DIMENSION, shard_rows=500, kind="ivfpq", storage="float16")
    for index in indexes.values():
        index.add(world.ids, world.vectors, world.groups)
    for kind in ("flat", "ivfpq"):
        indexes[f"{kind} int8"].save(folder / kind)
        indexes[f"{kind} mapped"] = DemoIndex.load(folder / kind, mmap=True)
    return indexes


def search_rounds(world: World, index: Any, count: int) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Batches of queries by id and group, between which rows go and come back."""
    done, gone, batch = 0, [], max(BATCH, count // 30)
    while done < count:
        rows = world.rng.integers(len(world.ids), size=min(batch, count - done))
        asked = [world.ids[row] for row in rows]
        found, _ = index.search(
            world.vectors[rows], DEPTH, exclude_ids=asked, exclude_groups=[world.group_of[id] for id in asked]
        )
        assert all(len(ids) == DEPTH for ids in found), "a list came back short"
        assert not set(gone) & {id for ids in found for id in ids}, "a removed row came back"
        yield asked, found
        done += len(rows)
        if gone and not getattr(index, "mapped", False):
            back = [world.row[id] for id in gone]
            index.add(gone, world.vectors[back], [world.groups[row] for row in back])
        if not gone or not getattr(index, "mapped", False):
            gone = [world.ids[row] for row in world.rng.permutation(len(world.ids))[:200]]
            index.remove(gone)


class Ranker:
    """What mining and `Retrieved` need of a retriever, over an index of planted vectors."""

    def __init__(self, world: World, table: TripletTable, index: Any) -> None:
        self.world, self.support, self.index = world, table, index

    def __len__(self) -> int:
        return len(self.support)

    retrieve_ids = DemoRetriever.retrieve_ids
    _select = DemoRetriever._select
    batch_size, weights, top_k = BATCH, {"text": 1.0}, DEPTH

    @property
    def _support(self) -> TripletTable:
        return self.support

    @property
    def _lock(self) -> Any:
        return contextlib.nullcontext()

    def _encode_queries(self, queries: Any, note: Callable[[Any], None]) -> np.ndarray:
        rows = []
        for query in queries:
            note(query)
            rows.append(self.world.row[query.id])
        return self.world.vectors[rows]


class Constant:
    """An LVLM that says the same of everything."""

    fingerprint = "constant"

    def score(self, requests: Sequence[Any]) -> np.ndarray:
        return np.full(len(requests), -1.0)

    def generate(self, requests: Sequence[Any], *, max_new_tokens: int = 32) -> list[str]:
        return ["bako"] * len(requests)


def in_strategies(world: World, count: int) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Every strategy and every selector, through the evaluator."""
    table = world.table()
    index = DemoIndex(DIMENSION)
    index.add(world.ids, world.vectors, world.groups)
    ranker: Any = Ranker(world, table, index)
    feedback = Feedback(Constant(), table, table)
    strategies: list[Any] = [Random(table), Fixed(table), BM25(table), SameAnswerOracle(table, table)]
    strategies += [Retrieved("st", ranker)]
    strategies += [Retrieved(type(s).__name__, ranker, selector=s) for s in (MMR(), DPP(), Coverage(of="answers"))]
    few = max(1, count // len(strategies))
    for strategy in strategies:
        for start in range(0, few, BATCH):
            asked = [world.ids[row] for row in world.rng.integers(len(table), size=min(BATCH, few - start))]
            yield strategy.name, asked, strategy.select([table.query(id) for id in asked], DEPTH)
    asked = table.ids[:10]
    yield "score oracle", asked, ScoreOracle(feedback).select([table.query(id) for id in asked], DEPTH)
    queries = table.select(table.ids[:BATCH])
    evaluator = ICLEvaluator(Constant(), table, queries, on_leak="ignore")  # the queries are rows of the support set
    for strategy in strategies[:5]:
        yield f"evaluation, {strategy.name}", queries.ids, evaluator.evaluate(strategy, DEPTH).ids


def in_mining(world: World, count: int) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Rounds of mining over every row, half of the first one drawn at random."""
    table = world.table()
    index = DemoIndex(DIMENSION, kind="hnsw", storage="float16")
    index.add(world.ids, world.vectors, world.groups)
    done = 0
    while done < count:
        pairs = CandidateTable(world.ids)
        for round_ in range(3):
            mined = mine_candidates(
                Ranker(world, table, index),  # type: ignore[arg-type]
                pairs,
                table.query,
                count=DEPTH,
                random_share=0.5 if round_ == 0 else 0.0,
                rng=world.rng,
                batch_size=BATCH,
            )
            yield list(mined), [[candidate for candidate, _ in found] for found in mined.values()]
            pairs.extend(mined, np.zeros(sum(map(len, mined.values()))))
            done += len(mined)


def run(count: int, *, seed: int = 0, tell: Callable[[str], None] = lambda line: None) -> dict[str, tuple[int, int]]:
    """About `count` retrievals: (how many, leaks) of each way."""
    results: dict[str, tuple[int, int]] = {}

    def note(name: str, asked: Sequence[str], found: Sequence[Sequence[str]]) -> None:
        before = results.get(name, (0, 0))
        results[name] = (before[0] + len(asked), before[1] + world.leaks(asked, found))

    drum_hf._index_faiss._LEAST, before = 300, drum_hf._index_faiss._LEAST  # learn lists and codes from few rows
    try:
        with tempfile.TemporaryDirectory() as folder:
            world = World(seed)
            indexes = in_indexes(world, Path(folder))
            for name, index in indexes.items():
                for asked, found in search_rounds(world, index, int(0.8 * count / len(indexes))):
                    note(name, asked, found)
                tell(name)
        for name, asked, found in in_strategies(world, int(0.1 * count)):
            note(name, asked, found)
        tell("strategies")
        for asked, found in in_mining(world, int(0.1 * count)):
            note("mining", asked, found)
    finally:
        drum_hf._index_faiss._LEAST = before
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="retrievals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    results = run(args.count, seed=args.seed, tell=lambda name: sys.stdout.write(f"{name}\n") and sys.stdout.flush())
    for name, (asked, leaks) in results.items():
        sys.stdout.write(f"{name:28} {asked:9,} retrievals  {leaks} leaks\n")
    total, leaks = (sum(column) for column in zip(*results.values(), strict=True))
    sys.stdout.write(f"{total:,} retrievals, {leaks} leaks, {time.perf_counter() - began:.0f} s\n")
    return int(leaks > 0)


if __name__ == "__main__":
    sys.exit(main())
