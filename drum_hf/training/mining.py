"""The candidate table: which demonstrations were proposed for which query, what the LVLM thought of them, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ColumnError, MissingIdError, SavedFileError

if TYPE_CHECKING:
    from ..retriever import DemoRetriever
    from ..types import Query

__all__ = ["COMPANY_WEIGHT", "FIRST_RANDOM_SHARE", "CandidateTable", "Sampling", "mine_candidates", "mine_company"]

Sampling = Literal["listwise", "contrastive"]

#: Share of the first round's candidates that is drawn at random; our choice.
FIRST_RANDOM_SHARE = 0.5

#: Weight of a demonstration's score in company beside the one alone; our choice.
COMPANY_WEIGHT = 0.25

#: Format 1 had no scores in company.
_FORMAT = 2
_COLUMNS = ("query_id", "candidate_id", "score", "place", "round", "company")


@dataclasses.dataclass
class _Pool:
    """One query's candidates, in the order they were scored."""

    ids: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    rounds: list[int] = dataclasses.field(default_factory=list)
    company: list[float] = dataclasses.field(default_factory=list)  # NaN where it was not asked for

    def worth(self, company_weight: float) -> np.ndarray:
        """What each is worth, alone and in company; see `CandidateTable.candidates`."""
        scores, company = np.asarray(self.scores), np.asarray(self.company)
        asked = ~np.isnan(company)
        if not asked.any():
            return scores
        alone, usual = np.exp(scores), np.exp(company[asked]).mean()
        beside = np.where(asked, np.exp(company), usual)
        companion = int(np.argmax(scores))
        if not asked[companion]:
            beside[companion] = max(usual, alone[companion])
        mean = (1 - company_weight) * alone + company_weight * beside
        return np.log(np.maximum(mean, np.finfo(np.float64).tiny))

    def hard(self, worth: np.ndarray) -> np.ndarray:
        """Rows where retriever and LVLM disagree most: in the best third of one and the worst third of the other."""
        size = len(self.ids)
        third = size // 3
        liked = np.argsort(np.argsort(-worth, kind="stable"), kind="stable")
        retrieved = np.argsort(np.argsort(np.asarray(self.places), kind="stable"), kind="stable")
        over = (retrieved < third) & (liked >= size - third)
        under = (retrieved >= size - third) & (liked < third)
        return np.flatnonzero(over | under)


class CandidateTable:
    """Scored candidates of every training query; grows by a round at a time and never forgets a score.

    Args:
        query_ids: the training queries.
        company_weight: of what a demonstration is worth in company, beside what it is worth alone; our choice.

    Attributes:
        bought: scores bought in all, after each finished mining round.
    """

    def __init__(self, query_ids: Sequence[str], *, company_weight: float = COMPANY_WEIGHT) -> None:
        self.company_weight = company_weight
        self._pools: dict[str, _Pool] = {q: _Pool() for q in query_ids}
        self.bought: list[int] = []

    @property
    def rounds(self) -> int:
        """Number of finished mining rounds."""
        return len(self.bought)

    @property
    def query_ids(self) -> list[str]:
        return list(self._pools)

    def __len__(self) -> int:
        """Number of scores bought, alone and in company."""
        return sum(len(p.ids) + len(p.company) - int(np.isnan(p.company).sum()) for p in self._pools.values())

    def _pool(self, query_id: str) -> _Pool:
        try:
            return self._pools[query_id]
        except KeyError:
            raise MissingIdError(f"query id {query_id!r} is not in the candidate table") from None

    def candidates(self, query_id: str) -> dict[str, float]:
        """Candidate id -> what it is worth to the LVLM, a log-probability, in the order scored.

        That is the LVLM's score, until the query has scores in company. From then on it is the logarithm of a weighted
        mean of two probabilities: the gold response's after the demonstration alone, and after it and the companion.
        Candidates that were not asked for in company count there as the query's others do on average, and so does the
        companion, unless it does better alone (our choice).
        """
        pool = self._pool(query_id)
        return dict(zip(pool.ids, pool.worth(self.company_weight).tolist(), strict=True))

    def companion(self, query_id: str) -> str | None:
        """The candidate that the LVLM liked best alone; None where there is none."""
        pool = self._pool(query_id)
        return pool.ids[int(np.argmax(pool.scores))] if pool.ids else None

    def alone(self, query_id: str) -> list[str]:
        """Candidates that were not scored in company, the companion left out, in the order scored."""
        pool, companion = self._pool(query_id), self.companion(query_id)
        return [i for i, score in zip(pool.ids, pool.company, strict=True) if np.isnan(score) and i != companion]

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
                pool.company.append(np.nan)
        self.bought.append(len(self))

    def extend_company(self, asked: Mapping[str, Sequence[str]], scores: Sequence[float] | np.ndarray) -> None:
        """Add a round of scores in company of candidates that are there; `scores` in the same flat order."""
        flat = iter(scores)
        for query_id, candidates in asked.items():
            pool = self._pool(query_id)
            for candidate in candidates:
                pool.company[pool.ids.index(candidate)] = float(next(flat))
        self.bought.append(len(self))

    def sample(
        self,
        query_id: str,
        size: int,
        rng: np.random.Generator,
        *,
        sampling: Sampling = "listwise",
        ends: int = 5,
        hard: bool = True,
    ) -> tuple[list[str], list[float]]:
        """Draw a training list from a query's pool.

        Args:
            size: at most so many candidates; fewer where the pool is smaller.
            sampling: "listwise": one of the `ends` best by the LVLM, one of the `ends` worst, the rest from between
                (UDR), and at least one hard candidate where the pool has one (our choice; see `hard`).
                "contrastive": one of the `ends` best first, then others of the `ends` worst (EPR).
            ends: UDR's and EPR's value 5; at most half of the pool.
            hard: False leaves the hard candidate to chance, as UDR does.

        Returns:
            ids and scores, in one order.
        """
        pool = self._pool(query_id)
        count = len(pool.ids)
        size = min(size, count)
        ends = max(1, min(ends, count // 2))
        worth = pool.worth(self.company_weight)
        order = np.argsort(-worth, kind="stable")
        if sampling == "contrastive":
            best = [int(rng.choice(order[:ends]))] if count else []
            worst = [int(r) for r in order[count - ends :] if r not in best]
            chosen = best + [int(r) for r in rng.permutation(worst)[: size - 1]]
        elif size < 2 or size == count:
            chosen = [int(r) for r in (order if size == count else rng.permutation(order)[:size])]
        else:
            first, last = int(rng.choice(order[:ends])), int(rng.choice(order[count - ends :]))
            between = [int(r) for r in rng.permutation(order) if r not in (first, last)][: size - 2]
            wanted = pool.hard(worth) if hard else np.empty(0, np.int64)
            if between and len(wanted) and not {first, last, *between} & set(wanted.tolist()):
                between[-1] = int(rng.choice(wanted))
            chosen = [first, last, *between]
        return [pool.ids[r] for r in chosen], [float(worth[r]) for r in chosen]

    def rows(self) -> Iterator[tuple[str, str, float, int, int, float | None]]:
        """Every pair as (query id, candidate id, score, retriever's place, round, score in company or None)."""
        for query_id, pool in self._pools.items():
            for *row, company in zip(pool.ids, pool.scores, pool.places, pool.rounds, pool.company, strict=True):
                yield (query_id, *row, None if np.isnan(company) else company)  # type: ignore[misc]

    def save(self, path: str | Path) -> None:
        """Write a parquet file; the query ids and the number of rounds stand in its metadata."""
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(zip(*self.rows(), strict=True)) or [()] * len(_COLUMNS)
        types = (pa.string(), pa.string(), pa.float64(), pa.int32(), pa.int32(), pa.float64())
        table = pa.table({n: pa.array(c, t) for n, c, t in zip(_COLUMNS, columns, types, strict=True)})
        state = json.dumps({"format_version": _FORMAT, "bought": self.bought, "query_ids": self.query_ids})
        part = Path(path).with_suffix(".part")
        pq.write_table(table.replace_schema_metadata({"drum_hf": state}), part)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, *, company_weight: float = COMPANY_WEIGHT) -> CandidateTable:
        """Read what `save` wrote.

        Raises:
            SavedFileError: the file is missing, truncated or not a candidate table.
        """
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        remedy = "resume from another checkpoint, or train anew: the scores are still in the score store"
        try:
            data = pq.read_table(path)
            state = json.loads((data.schema.metadata or {})[b"drum_hf"])
            if state["format_version"] == 1 and data.column_names == list(_COLUMNS[:-1]):
                data = data.append_column(_COLUMNS[-1], pa.nulls(len(data), pa.float64()))
            elif state["format_version"] != _FORMAT or data.column_names != list(_COLUMNS):
                raise ColumnError(f"expected format {_FORMAT} with columns {_COLUMNS}; got {data.column_names}")
            table = cls(state["query_ids"], company_weight=company_weight)
            for query_id, candidate, score, place, round_, company in zip(*data.to_pydict().values(), strict=True):
                pool = table._pool(query_id)
                pool.ids.append(candidate)
                pool.scores.append(score)
                pool.places.append(place)
                pool.rounds.append(round_)
                pool.company.append(np.nan if company is None else company)
            if state.get("bought") is not None:
                table.bought = [int(count) for count in state["bought"]]
            else:
                table.bought = [sum(r <= done for r in data["round"].to_pylist()) for done in range(state["rounds"])]
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise SavedFileError(
                f"expected a candidate table at {path}; reading it failed ({error}); {remedy}"
            ) from error
        return table


def mine_company(
    retriever: DemoRetriever,
    table: CandidateTable,
    make_query: Callable[[str], Query],
    *,
    count: int,
    batch_size: int = 512,
) -> dict[str, list[str]]:
    """Choose up to `count` candidates of every query to be scored again, in the company of the one that served best.

    Those that the retriever ranks highest, since these are what a prompt will show together: of demonstrations that
    are worth nothing alone, some leave the answer as it is and others spoil it. Our choice, beyond the paper.

    Args:
        make_query: query id -> `Query` with draft, id and group.

    Returns:
        query id -> candidate ids, best-ranked first; none twice, and never the companion.
    """
    asked: dict[str, list[str]] = {}
    ids = table.query_ids
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        vectors = retriever.encode_queries([make_query(q) for q in chunk])
        for query_id, vector in zip(chunk, vectors, strict=True):
            names = table.alone(query_id)
            places = np.argsort(-(retriever.index.vectors(names) @ vector), kind="stable")[:count] if names else ()
            asked[query_id] = [names[place] for place in places]
    return asked


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
