"""The candidate table: which demonstrations were proposed for which query, what the LVLM thought of them, and when."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._files import read_parquet
from ..errors import ColumnError, MissingIdError, SavedFileError

if TYPE_CHECKING:
    import pyarrow as pa

    from ..retriever import DemoRetriever
    from ..types import Query

__all__ = ["FIRST_RANDOM_SHARE", "CandidateTable", "Sampling", "mine_candidates"]

Sampling = Literal["listwise", "contrastive"]

#: Share of the first round's candidates that is drawn at random; our choice.
FIRST_RANDOM_SHARE = 0.5

_COLUMNS = ("query_id", "candidate_id", "score", "place", "round")


@dataclasses.dataclass
class _Pool:
    """One query's candidates, in the order they were scored."""

    ids: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    rounds: list[int] = dataclasses.field(default_factory=list)

    def hard(self) -> np.ndarray:
        """Rows where retriever and LVLM disagree most: in the best third of one and the worst third of the other."""
        size = len(self.ids)
        third = size // 3
        liked = np.argsort(np.argsort(-np.asarray(self.scores), kind="stable"), kind="stable")
        retrieved = np.argsort(np.argsort(np.asarray(self.places), kind="stable"), kind="stable")
        over = (retrieved < third) & (liked >= size - third)
        under = (retrieved >= size - third) & (liked < third)
        return np.flatnonzero(over | under)


class CandidateTable:
    """Scored candidates of every training query; grows by a round at a time and never forgets a score.

    Args:
        query_ids: the training queries.

    Attributes:
        rounds: number of finished mining rounds.
    """

    def __init__(self, query_ids: Sequence[str]) -> None:
        self._pools: dict[str, _Pool] = {q: _Pool() for q in query_ids}
        self.rounds = 0

    @property
    def query_ids(self) -> list[str]:
        return list(self._pools)

    def __len__(self) -> int:
        """Number of scored pairs."""
        return sum(len(pool.ids) for pool in self._pools.values())

    def _pool(self, query_id: str) -> _Pool:
        try:
            return self._pools[query_id]
        except KeyError:
            raise MissingIdError(f"query id {query_id!r} is not in the candidate table") from None

    def candidates(self, query_id: str) -> dict[str, float]:
        """Candidate id -> LVLM score, in the order scored."""
        pool = self._pool(query_id)
        return dict(zip(pool.ids, pool.scores, strict=True))

    def extend(self, mined: Mapping[str, Sequence[tuple[str, int]]], scores: Sequence[float] | np.ndarray) -> None:
        """Add a round: per query its (candidate id, retriever's place) pairs; `scores` in the same flat order."""
        flat = iter(scores)
        for query_id, proposals in mined.items():
            pool = self._pool(query_id)
            for candidate, place in proposals:
                pool.ids.append(candidate)
                pool.places.append(place)
                pool.scores.append(float(next(flat)))
                pool.rounds.append(self.rounds)
        self.rounds += 1

    def sample(
        self, query_id: str, size: int, rng: np.random.Generator, *, sampling: Sampling = "listwise", ends: int = 5
    ) -> tuple[list[str], list[float]]:
        """Draw a training list from a query's pool.

        Args:
            size: at most so many candidates; fewer where the pool is smaller.
            sampling: "listwise": one of the `ends` best by the LVLM, one of the `ends` worst, the rest from between
                (UDR), and at least one hard candidate where the pool has one (our choice).
                "contrastive": one of the `ends` best first, then others of the `ends` worst (EPR).
            ends: UDR's and EPR's value 5; at most half of the pool.

        Returns:
            ids and scores, in one order.
        """
        pool = self._pool(query_id)
        count = len(pool.ids)
        size = min(size, count)
        ends = max(1, min(ends, count // 2))
        order = np.argsort(-np.asarray(pool.scores), kind="stable")
        if sampling == "contrastive":
            best = [int(rng.choice(order[:ends]))] if count else []
            worst = [int(r) for r in order[count - ends :] if r not in best]
            chosen = best + [int(r) for r in rng.permutation(worst)[: size - 1]]
        elif size < 2 or size == count:
            chosen = [int(r) for r in (order if size == count else rng.permutation(order)[:size])]
        else:
            first, last = int(rng.choice(order[:ends])), int(rng.choice(order[count - ends :]))
            between = [int(r) for r in rng.permutation(order) if r not in (first, last)][: size - 2]
            hard = pool.hard()
            if between and len(hard) and not {first, last, *between} & set(hard.tolist()):
                between[-1] = int(rng.choice(hard))
            chosen = [first, last, *between]
        return [pool.ids[r] for r in chosen], [pool.scores[r] for r in chosen]

    def rows(self) -> Iterator[tuple[str, str, float, int, int]]:
        """Every pair as (query id, candidate id, score, retriever's place, round)."""
        for query_id, pool in self._pools.items():
            for row in zip(pool.ids, pool.scores, pool.places, pool.rounds, strict=True):
                yield (query_id, *row)

    def save(self, path: str | Path) -> None:
        """Write a parquet file; the query ids and the number of rounds stand in its metadata."""
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(zip(*self.rows(), strict=True)) or [()] * len(_COLUMNS)
        table = pa.table([pa.array(c, t) for c, t in zip(columns, _schema().types, strict=True)], schema=_schema())
        state = json.dumps({"format_version": 1, "rounds": self.rounds, "query_ids": self.query_ids})
        part = Path(path).with_suffix(".part")
        pq.write_table(table.replace_schema_metadata({"drum_hf": state}), part)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> CandidateTable:
        """Read what `save` wrote.

        Raises:
            SavedFileError: the file is missing, truncated or not a candidate table.
        """
        import json

        import pyarrow as pa

        remedy = "resume from another checkpoint, or train anew: the scores are still in the score store"
        try:
            data = read_parquet(path)
            state = json.loads((data.schema.metadata or {})[b"drum_hf"])
            if state["format_version"] != 1 or not data.schema.equals(_schema()):
                raise ColumnError(f"expected format 1 with columns {_COLUMNS}; got {data.column_names}")
            table = cls(_checked_ids(state["query_ids"]))
            table.rounds = state["rounds"]
            if type(table.rounds) is not int or table.rounds < 0:
                raise ValueError(f"its number of rounds is {table.rounds!r}")
            pairs = set()
            for row in zip(*data.to_pydict().values(), strict=True):
                query_id, candidate, score, place, round_ = row
                if None in row or not math.isfinite(score) or place < 0 or not 0 <= round_ < table.rounds:
                    raise ValueError(f"no round can have left the row {row}")
                pairs.add((query_id, candidate))
                pool = table._pool(query_id)
                pool.ids.append(candidate)
                pool.scores.append(score)
                pool.places.append(place)
                pool.rounds.append(round_)
            if len(pairs) < len(table):
                raise ValueError("a pair stands there twice")
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, RecursionError) as error:
            raise SavedFileError(
                f"expected a candidate table at {path}; reading it failed ({error}); {remedy}"
            ) from error
        return table


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.float64(), pa.int32(), pa.int32())
    return pa.schema(list(zip(_COLUMNS, types, strict=True)))


def _checked_ids(ids: object) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids) or len(set(ids)) < len(ids):
        raise ValueError("its query ids are no list of different texts")
    return ids


def mine_candidates(
    retriever: DemoRetriever,
    table: CandidateTable,
    make_query: Callable[[str], Query],
    *,
    count: int,
    random_share: float,
    rng: np.random.Generator,
    batch_size: int = 512,
) -> dict[str, list[tuple[str, int]]]:
    """Propose `count` new candidates for every query: the best-ranked ones that were never scored for it.

    Args:
        make_query: query id -> `Query` with draft, id and group.
        count: pairs to buy for each query, so that every method spends the same on a round.
        random_share: this share of them is drawn at random from the rest of the support set instead, so that a first
            pool is not all alike (our choice).

    Returns:
        query id -> list of (candidate id, place in the retriever's ranking; the support set's size for random ones).
        Fewer than `count` where a query's eligible support set is used up. Never the query itself nor its group.
    """
    ids, support = table.query_ids, retriever.support
    total, drawn = len(support), round(count * random_share)
    mined: dict[str, list[tuple[str, int]]] = {}
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        known = [table.candidates(q) for q in chunk]
        queries = [make_query(q) for q in chunk]
        depth = max(1, min(total, count - drawn + max(map(len, known))))
        found, _ = retriever.retrieve_ids(queries, depth)
        for query, scored, ranking in zip(queries, known, found, strict=True):
            fresh = [(candidate, place) for place, candidate in enumerate(ranking) if candidate not in scored]
            kept = fresh[: count - drawn]
            taken = {query.id, *scored, *(candidate for candidate, _ in kept)}
            if drawn:
                for row in rng.permutation(total):
                    candidate, group = support.ids[row], support.groups[row]
                    if candidate not in taken and (group is None or group != query.group):
                        kept.append((candidate, total))
                    if len(kept) == count:
                        break
            mined[query.id or ""] = kept
    return mined
