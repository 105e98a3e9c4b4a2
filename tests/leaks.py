"""Retrievals by the million, none of which may return the query itself or a row of its group.

`python -m tests.leaks --count 1000000` from the root of the repository; test_leaks.py runs a few tens of thousands.
Rows of a group lie closest together, and every query is a row's own vector, so that what is not excluded comes first.
A query is one retrieval, however many go into one call. Where nothing chooses fewer, a list must be full, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import drum_hf.index.faiss_kinds
from drum_hf.data import TripletTable
from drum_hf.evaluation.evaluator import ICLEvaluator
from drum_hf.evaluation.strategies import BM25, MMICES, Fixed, Random, Retrieved, SameAnswerOracle, ScoreOracle
from drum_hf.index.demo_index import DemoIndex
from drum_hf.index.faiss_kinds import KINDS, STORAGES
from drum_hf.index.sharded import ShardedIndex
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.feedback import Feedback
from drum_hf.selection import SELECTORS, get_selector
from drum_hf.training.mining import CandidateTable, mine_candidates, mine_set_level

DIMENSION, DEPTH, BATCH = 12, 5, 600
#: (rows, groups, share of rows without a group). The first leaves most queries fewer rows than they ask for.
SHAPES = ((40, 1, 0.1), (400, 3, 0.25), (1200, 150, 0.25))
#: Of all retrievals: where they are made.
SHARES = {
    "index": 0.65,
    "strategy": 0.14,
    "mining": 0.14,
    "evaluation": 0.05,
    "score oracle": 0.01,
    "retriever": 0.01,
}
Note = Callable[[str, int, int], None]  # name of the way, retrievals, leaks


class World:
    """Rows in groups, some without one; a group's vectors differ in the last digits."""

    def __init__(self, seed: int, rows: int = 1200, groups: int = 150, alone: float = 0.25) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.ids = [f"r{i}" for i in range(rows)]
        numbers = np.where(rng.random(rows) < alone, -1, rng.integers(0, groups, rows))
        self.groups = [f"g{g}" if g >= 0 else None for g in numbers]
        centres = rng.normal(size=(groups, DIMENSION))
        own = rng.normal(size=(rows, DIMENSION))
        self.vectors = np.where((numbers >= 0)[:, None], centres[numbers] + 1e-3 * own, own).astype(np.float32)
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
        groups = [{self.group_of[id]} - {None} for id in asked]
        return leaks(self.group_of, [{id} for id in asked], groups, found)

    def eligible(self, asked: Sequence[str]) -> list[int]:
        """How many rows may demonstrate each query."""
        sizes = collections.Counter(self.groups)
        return [len(self.ids) - (sizes[g] if (g := self.group_of[id]) else 1) for id in asked]


def leaks(
    group_of: Mapping[str, str | None],
    ids: Sequence[Any],
    groups: Sequence[Any],
    found: Sequence[Sequence[str]],
) -> int:
    """How many results are among the ids, or in the groups, that their query must not be shown."""
    return sum(
        id in out or group_of[id] in apart
        for out, apart, shown in zip(ids, groups, found, strict=True)
        for id in shown
    )


# ---- indexes ----


def in_indexes(world: World, folder: Path) -> dict[str, Any]:
    """Every index: kinds, storages, in shards, with its vectors in a file."""
    made: dict[str, Any] = {}
    for kind, storage in itertools.product(KINDS, STORAGES):
        made[f"{kind} {storage}"] = DemoIndex(DIMENSION, kind=kind, storage=storage)
    height = max(10, 5 * len(world.ids) // 12)
    made["flat in shards"] = ShardedIndex(DIMENSION, shard_rows=height)
    made["ivfpq in shards"] = ShardedIndex(DIMENSION, shard_rows=height, kind="ivfpq", storage="float16")
    for index in made.values():
        index.add(world.ids, world.vectors, world.groups)
    for kind in ("flat", "ivfpq"):
        made[f"{kind} int8"].save(folder / kind)
        made[f"{kind} mapped"] = DemoIndex.load(folder / kind, mmap=True)
    return made


def questions(world: World, asked: Sequence[str], group_of: Mapping[str, str | None]) -> tuple[list, list]:
    """Ids and groups that each query must not be shown: its own; its group's alone; or several of both."""
    ids: list[Any] = []
    groups: list[Any] = []
    others = world.rng.integers(len(world.ids), size=len(asked)).tolist()
    for number, (id, other) in enumerate(zip(asked, others, strict=True)):
        group, more = group_of[id], world.ids[other]
        match number % 3:
            case 1 if group is not None:  # another question about the same picture
                ids.append(None)
                groups.append(group)
            case 2:
                ids.append({id, more})
                groups.append({group, group_of[more]} - {None})
            case _:
                ids.append(id)
                groups.append(group)
    return ids, groups


def _sets(values: Sequence[Any]) -> list[set[str]]:
    return [value if isinstance(value, set) else {value} - {None} for value in values]


def search_rounds(world: World, index: Any, count: int, place: Path) -> Iterator[tuple[int, int]]:
    """(retrievals, leaks) of batches between which rows go, come back in other groups, and the index is saved."""
    group_of, gone = dict(world.group_of), []
    mapped = getattr(index, "mapped", False)
    rounds = max(3, min(12, count // 300))
    for number in range(rounds):
        rows = world.rng.integers(len(world.ids), size=max(1, count // rounds))
        asked = [world.ids[row] for row in rows]
        ids, groups = questions(world, asked, group_of)
        found, _ = index.search(world.vectors[rows], DEPTH, exclude_ids=ids, exclude_groups=groups)
        ids, groups = _sets(ids), _sets(groups)
        living = {id: group for id, group in group_of.items() if id not in gone}
        sizes = collections.Counter(living.values())
        for shown, out, apart in zip(found, ids, groups, strict=True):
            excluded = sum(sizes[g] for g in apart) + sum(id in living and living[id] not in apart for id in out)
            assert len(shown) == min(DEPTH, len(living) - excluded), "a list is not full"
            assert living.keys() >= set(shown), "a removed row came back"
        yield len(asked), leaks(group_of, ids, groups, found)
        if gone:  # half of them elsewhere than before; what is mapped takes no rows, and is read again
            if mapped:
                index, gone = DemoIndex.load(place, mmap=True), set()
                continue
            back = sorted(gone)
            group_of |= {id: world.groups[world.rng.integers(len(back))] for id in back[::2]}
            index.add(back, world.vectors[[world.row[id] for id in back]], [group_of[id] for id in back])
        if not mapped and number % 4 == 3:
            index.save(place)
            index = type(index).load(place)
        gone = {world.ids[row] for row in world.rng.permutation(len(world.ids))[: len(world.ids) // 6]}
        index.remove(sorted(gone))


def through_indexes(seed: int, count: int, note: Note) -> None:
    for number, shape in enumerate(SHAPES):
        world = World(100 * seed + number, *shape)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            indexes = in_indexes(world, folder)
            for name, index in indexes.items():
                place = folder / name.split()[0] if name.endswith("mapped") else folder / "saved" / name
                for asked, found in search_rounds(world, index, count // len(indexes) // len(SHAPES), place):
                    note(f"index {name}", asked, found)


# ---- what chooses ----


class Ranker:
    """What mining and `Retrieved` need of a retriever, over an index of planted vectors."""

    def __init__(self, world: World, table: TripletTable, **kind: Any) -> None:
        self.world, self.support = world, table
        self.index = DemoIndex(DIMENSION, **kind)
        self.index.add(world.ids, world.vectors, world.groups)

    def __len__(self) -> int:
        return len(self.support)

    retrieve_ids = DemoRetriever.retrieve_ids
    encode_queries = DemoRetriever.encode_queries
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


_OPTIONS: dict[str, dict[str, Any]] = {
    "budget": {"tokens": 45, "reserve": 5, "count": lambda requests: [10 * len(r.demonstrations) for r in requests]},
    "adaptive": {"calibration": lambda scores: scores},
}


def strategies_of(world: World, table: TripletTable, kind: str) -> list[Any]:
    """Every strategy of one step, and what is retrieved through every selector."""
    ranker: Any = Ranker(world, table, kind=kind)
    made: list[Any] = [Random(table), Fixed(table), BM25(table), SameAnswerOracle(table, table)]
    made += [Retrieved("retrieved", ranker), MMICES(ranker, ranker)]
    return made + [Retrieved(n, ranker, selector=get_selector(n, **_OPTIONS.get(n, {}))) for n in SELECTORS]


_FULL = {"random", "fixed", "bm25", "retrieved", "mmices", "top", "mmr", "dpp"}


def worlds(seed: int) -> Iterator[tuple[World, TripletTable, str]]:
    """Worlds of every shape and kind of index, without end."""
    for number in itertools.count():
        world = World(1000 * (seed + 1) + number, *SHAPES[number % len(SHAPES)])
        yield world, world.table(), KINDS[number // len(SHAPES) % len(KINDS)]


def through_strategies(seed: int, count: int, note: Note) -> None:
    done = 0
    for world, table, kind in worlds(seed):
        for strategy in strategies_of(world, table, kind):
            for start in range(0, len(table), BATCH):
                asked = table.ids[start : start + BATCH]
                found = strategy.select([table.query(id) for id in asked], DEPTH)
                if strategy.name in _FULL:
                    lengths = [min(DEPTH, most) for most in world.eligible(asked)]
                    assert [len(ids) for ids in found] == lengths, f"{strategy.name}: a list is not full"
                note(f"strategy {strategy.name}", len(asked), world.leaks(asked, found))
                done += len(asked)
        if done >= count:
            return


def through_score_oracle(seed: int, count: int, note: Note) -> None:
    done = 0
    for number in itertools.count():
        world = World(2000 * (seed + 1) + number, 60, 6)
        table = world.table()
        found = ScoreOracle(Feedback(Constant(), table, table)).select([table.query(id) for id in table.ids], DEPTH)
        note("strategy oracle-score", len(table), world.leaks(table.ids, found))
        done += len(table)
        if done >= count:
            return


def through_evaluation(seed: int, count: int, note: Note) -> None:
    done = 0
    for world, table, kind in worlds(seed + 1):
        queries = table.select(table.ids[:BATCH])
        evaluator = ICLEvaluator(Constant(), table, queries, on_leak="ignore")  # rows of the support set are asked
        for strategy in strategies_of(world, table, kind):
            found = evaluator.evaluate(strategy, DEPTH, progress=False).ids
            note("evaluation", len(queries), world.leaks(queries.ids, found))
            done += len(queries)
        if done >= count:
            return


def through_mining(seed: int, count: int, note: Note) -> None:
    """Rounds over every row, half of the first one drawn at random, and the candidates of the last at set level."""
    done = 0
    for world, table, kind in worlds(seed + 2):
        ranker: Any = Ranker(world, table, kind=kind, storage="float16")
        pairs = CandidateTable(world.ids)
        for number in range(3):
            share = 0.5 if number == 0 else 0.0
            mined = mine_candidates(
                ranker, pairs, table.query, count=DEPTH, random_share=share, rng=world.rng, batch_size=BATCH
            )
            found = [[candidate for candidate, _ in proposed] for proposed in mined.values()]
            note("mining, proposed", len(mined), world.leaks(list(mined), found))
            pairs.extend(mined, world.rng.normal(size=sum(map(len, mined.values()))))
            done += len(mined)
        set_level = mine_set_level(ranker, pairs, table.query, count=DEPTH, batch_size=BATCH)
        note("mining, at set level", len(set_level), world.leaks(list(set_level), list(set_level.values())))
        done += len(set_level)
        if done >= count:
            return


def through_retriever(seed: int, count: int, note: Note) -> None:
    """A `DemoRetriever` with its own encoder and table: called, while rows go and come back in other groups."""
    world = World(seed, 120, 12)
    rows = {d["id"]: dict(d) for d in _plain(world.table())}
    retriever = DemoRetriever.from_encoder("playground/clip", support=list(rows.values()), device="cpu")
    done = 0
    while done < count:
        asked = [rows[id] for id in rows]
        found = [retrieval.ids for retrieval in retriever(asked, k=DEPTH)]
        group_of = {id: row["group"] or None for id, row in rows.items()}
        groups = [{group_of[row["id"]]} - {None} for row in asked]
        note("retriever, called", len(asked), leaks(group_of, [{row["id"]} for row in asked], groups, found))
        done += len(asked)
        gone = [world.ids[row] for row in world.rng.permutation(len(world.ids))[:20]]
        retriever.remove(gone)
        for id in gone:
            rows[id]["group"] = world.groups[world.rng.integers(len(world.ids))] or ""
        retriever.add([rows[id] for id in gone])


def _plain(table: TripletTable) -> list[dict[str, Any]]:
    return [{"id": d.id, "prompt": d.prompt, "response": d.response, "group": d.group or ""} for d in table]


WAYS: dict[str, Callable[[int, int, Note], None]] = {
    "index": through_indexes,
    "strategy": through_strategies,
    "mining": through_mining,
    "evaluation": through_evaluation,
    "score oracle": through_score_oracle,
    "retriever": through_retriever,
}


def run(count: int, *, seed: int = 0, tell: Callable[[str], None] = lambda line: None) -> dict[str, tuple[int, int]]:
    """About `count` retrievals: (how many, leaks) of each way."""
    results: dict[str, tuple[int, int]] = {}

    def note(name: str, asked: int, found: int) -> None:
        before = results.get(name, (0, 0))
        results[name] = (before[0] + asked, before[1] + found)

    drum_hf.index.faiss_kinds._LEAST, before = (
        300,
        drum_hf.index.faiss_kinds._LEAST,
    )  # learn lists and codes from few rows
    try:
        for name, way in WAYS.items():
            began = time.perf_counter()
            way(seed, int(SHARES[name] * count), note)
            tell(f"{name} ({SHARES[name]:.0%}): {time.perf_counter() - began:.0f} s")
    finally:
        drum_hf.index.faiss_kinds._LEAST = before
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="retrievals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    results = run(args.count, seed=args.seed, tell=lambda line: sys.stdout.write(f"{line}\n") and sys.stdout.flush())
    total, leaks = (sum(column) for column in zip(*results.values(), strict=True))
    for name, (asked, found) in results.items():
        sys.stdout.write(f"{name:26} {asked:9,} retrievals {asked / total:6.1%}  {found} leaks\n")
    sys.stdout.write(f"{total:,} retrievals, {leaks} leaks, {time.perf_counter() - began:.0f} s\n")
    return int(leaks > 0)


if __name__ == "__main__":
    sys.exit(main())
