"""The candidate table: which demonstrations were proposed for which query, what the LVLM thought of them, and when."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ColumnError, MissingIdError, SavedFileError
from ..utils.files import read_parquet, replacing_file

if TYPE_CHECKING:
    import pyarrow as pa

    from ..retriever.retriever import DemoRetriever
    from ..types import Query

__all__ = [
    "FIRST_RANDOM_SHARE",
    "SET_LEVEL_WEIGHT",
    "CandidateTable",
    "Sampling",
    "doubts",
    "mine_candidates",
    "mine_set_level",
]

#: How a query's list is drawn; see `CandidateTable.sample`.
Sampling = Literal["listwise", "contrastive"]

#: Share of the first round's candidates that is drawn at random; our choice.
FIRST_RANDOM_SHARE = 0.5

#: Weight of a demonstration's set-level score beside the one alone; our choice.
SET_LEVEL_WEIGHT = 0.25

_FORMAT = 2
_COLUMNS = ("query_id", "candidate_id", "score", "place", "round", "set_level")
#: A gold answer's median probability below which nothing helps, the least difference that a demonstration should make
#: to it, and the fewest queries a label should have; our choice.
_HOPELESS, _SAME, _FEW_QUERIES = 0.01, 0.01, 5
#: Up to so many rows a random draw permutes them all; from more it picks, that many at a time.
_FEW_ROWS, _PICKED = 4096, 64
#: More rounds than any training has.
_MOST_ROUNDS = 1 << 16
#: Queries whose pairs are written to a file at once.
_BLOCK = 1 << 15


@dataclasses.dataclass(frozen=True)
class _Round:
    """What one round added, query after query in the table's order: 28 bytes a pair, whatever ids look like."""

    offsets: np.ndarray  # int64 (queries + 1,)
    candidates: np.ndarray  # int64 (pairs,), numbers of ids
    scores: np.ndarray  # float64
    places: np.ndarray  # int32
    set_level: np.ndarray  # float64, NaN where it was not asked for; filled in by a later round


@dataclasses.dataclass(frozen=True)
class _Pool:
    """One query's candidates, in the order they were scored."""

    candidates: np.ndarray
    scores: np.ndarray
    places: np.ndarray
    set_level: np.ndarray
    rounds: np.ndarray

    def companion(self) -> int | None:
        """Row of the candidate that the LVLM liked best alone."""
        return int(np.argmax(self.scores)) if len(self.scores) else None

    def worth(self, set_level_weight: float) -> np.ndarray:
        """What each is worth, alone and at set level; see `CandidateTable.candidates`."""
        asked = ~np.isnan(self.set_level)
        if not asked.any():
            return self.scores
        alone, usual = np.exp(self.scores), np.exp(self.set_level[asked]).mean()
        beside = np.where(asked, np.exp(self.set_level), usual)
        companion = self.companion()
        if not asked[companion]:
            beside[companion] = max(usual, alone[companion])
        mean = (1 - set_level_weight) * alone + set_level_weight * beside
        return np.log(np.maximum(mean, np.finfo(np.float64).tiny))

    def hard(self, worth: np.ndarray) -> np.ndarray:
        """Rows where retriever and LVLM disagree most: in the best third of one and the worst third of the other."""
        size = len(self.candidates)
        third = size // 3
        liked = np.argsort(np.argsort(-worth, kind="stable"), kind="stable")
        retrieved = np.argsort(np.argsort(self.places, kind="stable"), kind="stable")
        over = (retrieved < third) & (liked >= size - third)
        under = (retrieved >= size - third) & (liked < third)
        return np.flatnonzero(over | under)


class CandidateTable:
    """Scored candidates of every training query; grows by a round at a time and never forgets a score.

    Args:
        query_ids: the training queries.
        set_level_weight: of what a demonstration is worth at set level, beside what it is worth alone; our choice.

    Attributes:
        bought: scores bought in all, after each finished mining round.
    """

    def __init__(self, query_ids: Sequence[str], *, set_level_weight: float = SET_LEVEL_WEIGHT) -> None:
        self.set_level_weight = set_level_weight
        self._rows = {query_id: row for row, query_id in enumerate(query_ids)}
        self._rounds: dict[int, _Round] = {}
        self._names: list[str] = []  # of candidates, by number
        self._numbers: dict[str, int] = {}
        self.bought: list[int] = []

    @property
    def rounds(self) -> int:
        """Number of finished mining rounds."""
        return len(self.bought)

    @property
    def query_ids(self) -> list[str]:
        return list(self._rows)

    def __len__(self) -> int:
        """Number of scores bought, alone and at set level."""
        return sum(2 * len(r.set_level) - int(np.isnan(r.set_level).sum()) for r in self._rounds.values())

    def _row(self, query_id: str) -> int:
        try:
            return self._rows[query_id]
        except KeyError:
            raise MissingIdError(f"query id {query_id!r} is not in the candidate table") from None

    def _pool(self, query_id: str) -> _Pool:
        row = self._row(query_id)
        parts = [(number, added, slice(*added.offsets[row : row + 2])) for number, added in self._rounds.items()]
        if not parts:
            return _Pool(*(np.zeros(0, kind) for kind in (np.int64, np.float64, np.int32, np.float64, np.int64)))
        return _Pool(
            np.concatenate([added.candidates[own] for _, added, own in parts]),
            np.concatenate([added.scores[own] for _, added, own in parts]),
            np.concatenate([added.places[own] for _, added, own in parts]),
            np.concatenate([added.set_level[own] for _, added, own in parts]),
            np.concatenate([np.full(own.stop - own.start, number) for number, _, own in parts]),
        )

    def _number(self, candidate: str) -> int:
        number = self._numbers.setdefault(candidate, len(self._names))
        if number == len(self._names):
            self._names.append(candidate)
        return number

    def _add(
        self,
        round_: int,
        rows: np.ndarray,
        candidates: np.ndarray,
        scores: np.ndarray,
        places: np.ndarray,
        set_level: np.ndarray,
    ) -> None:
        """Add a round's pairs, in any order of queries."""
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(self._rows)))]).astype(np.int64)
        self._rounds[round_] = _Round(
            offsets,
            candidates[order],
            scores[order].astype(np.float64),
            places[order].astype(np.int32),
            set_level[order].astype(np.float64),
        )

    def candidates(self, query_id: str) -> dict[str, float]:
        """Candidate id -> what it is worth to the LVLM, a log-probability, in the order scored.

        That is the LVLM's score, until the query has set-level scores. From then on it is the logarithm of a weighted
        mean of two probabilities: the gold response's after the demonstration alone, and after it and the companion.
        Candidates without a set-level score count there as the query's others do on average, and so does the
        companion, unless it does better alone (our choice).
        """
        pool = self._pool(query_id)
        worth = pool.worth(self.set_level_weight)
        return {self._names[c]: value for c, value in zip(pool.candidates.tolist(), worth.tolist(), strict=True)}

    def companion(self, query_id: str) -> str | None:
        """The candidate that the LVLM liked best alone; None where there is none."""
        pool = self._pool(query_id)
        row = pool.companion()
        return None if row is None else self._names[pool.candidates[row]]

    def alone(self, query_id: str) -> list[str]:
        """Candidates that were not scored at set level, the companion left out, in the order scored."""
        pool = self._pool(query_id)
        companion = pool.companion()
        rows = [row for row in np.flatnonzero(np.isnan(pool.set_level)).tolist() if row != companion]
        return [self._names[c] for c in pool.candidates[rows].tolist()]

    def scored(self, query_id: str) -> list[str]:
        """Candidates in the order scored; `candidates` also says what each is worth, which takes longer."""
        row, names = self._row(query_id), self._names
        return [
            names[c]
            for added in self._rounds.values()
            for c in added.candidates[added.offsets[row] : added.offsets[row + 1]].tolist()
        ]

    def extend(self, mined: Mapping[str, Sequence[tuple[str, int]]], scores: Sequence[float] | np.ndarray) -> None:
        """Add a round: per query its (candidate id, retriever's place) pairs; `scores` in the same flat order.

        Candidates whose score is NaN (requests that a `CachedLVLM` skipped) are left out.

        Raises:
            MissingIdError: a query is not in the table.
            ValueError: there are not as many scores as pairs.
        """
        count = sum(map(len, mined.values()))
        if len(scores) != count:
            raise ValueError(f"expected a score for each of {count} pairs, got {len(scores)}")
        rows = np.repeat(
            np.fromiter((self._row(query_id) for query_id in mined), np.int64, len(mined)),
            np.fromiter(map(len, mined.values()), np.int64, len(mined)),
        )
        candidates = np.fromiter((self._number(c) for found in mined.values() for c, _ in found), np.int64, count)
        places = np.fromiter((place for found in mined.values() for _, place in found), np.int32, count)
        known = ~np.isnan(np.asarray(scores, np.float64))
        self._add(
            self.rounds,
            rows[known],
            candidates[known],
            np.asarray(scores, np.float64)[known],
            places[known],
            np.full(int(known.sum()), np.nan, np.float64),
        )
        self.bought.append(len(self))

    def extend_set_level(self, asked: Mapping[str, Sequence[str]], scores: Sequence[float] | np.ndarray) -> None:
        """Add a round of set-level scores of candidates that are there; `scores` in the same flat order.

        Raises:
            MissingIdError: a query is not in the table, or a candidate not in its pool.
            ValueError: there are not as many scores as candidates.
        """
        count = sum(map(len, asked.values()))
        if len(scores) != count:
            raise ValueError(f"expected a score for each of {count} candidates, got {len(scores)}")
        flat = iter(np.asarray(scores, np.float64).tolist())
        for query_id, candidates in asked.items():
            row = self._row(query_id)
            for candidate in candidates:
                number, score = self._numbers.get(candidate, -1), next(flat)
                for added in self._rounds.values():
                    start, stop = added.offsets[row : row + 2].tolist()
                    found = np.flatnonzero(added.candidates[start:stop] == number).tolist()
                    if found:
                        added.set_level[start + found[0]] = score
                        break
                else:
                    raise MissingIdError(f"candidate {candidate!r} of query {query_id!r} was not scored alone before")
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
        ends_once: bool = False,
        negatives: int | None = None,
    ) -> tuple[list[str], list[float]]:
        """Draw a training list from a query's pool.

        Args:
            size: at most so many candidates; fewer where the pool is smaller.
            sampling: "listwise": one of the `ends` best by the LVLM, one of the `ends` worst, the rest from all
                others, and at least one hard candidate where the pool has one (our choice; see `hard`).
                "contrastive": one of the `ends` best first, then others of the `ends` worst.
            ends: UDR's and EPR's value 5; at most half of the pool.
            hard: False leaves the hard candidate to chance, as UDR does.
            ends_once: the rest comes from between the best and the worst, as in UDR, so that a list holds exactly one
                of each. A small pool has fewer than `ends` of them, so that enough is left between.
            negatives: of a contrastive list, at most so many of the worst; EPR and MSIER take 1. None fills the list.

        Returns:
            ids and scores, in one order.
        """
        pool = self._pool(query_id)
        count = len(pool.candidates)
        size = min(size, count)
        ends = max(1, min(ends, count // 2))
        worth = pool.worth(self.set_level_weight)
        order = np.argsort(-worth, kind="stable")
        if sampling == "contrastive":
            negatives = size - 1 if negatives is None else min(size - 1, negatives)
            best = [int(rng.choice(order[:ends]))] if count else []
            worst = [int(r) for r in order[count - ends :] if r not in best]
            chosen = best + [int(r) for r in rng.permutation(worst)[:negatives]]
        elif size < 2 or size == count:
            chosen = [int(r) for r in (order if size == count else rng.permutation(order)[:size])]
        else:
            if ends_once:
                ends = max(1, min(ends, (count - size + 2) // 2))
            first, last = int(rng.choice(order[:ends])), int(rng.choice(order[count - ends :]))
            rest = order[ends : count - ends] if ends_once else order
            between = [int(r) for r in rng.permutation(rest) if r not in (first, last)][: size - 2]
            wanted = pool.hard(worth) if hard else np.empty(0, np.int64)
            if between and len(wanted) and not {first, last, *between} & set(wanted.tolist()):
                between[-1] = int(rng.choice(wanted))
            chosen = [first, last, *between]
        return [self._names[c] for c in pool.candidates[chosen].tolist()], worth[chosen].tolist()

    def rows(self) -> Iterator[tuple[str, str, float, int, int, float | None]]:
        """Every pair as (query id, candidate id, score, retriever's place, round, set-level score or None)."""
        for query_id in self._rows:
            pool = self._pool(query_id)
            names = [self._names[c] for c in pool.candidates.tolist()]
            columns = (
                names,
                pool.scores.tolist(),
                pool.places.tolist(),
                pool.rounds.tolist(),
                pool.set_level.tolist(),
            )
            for candidate, score, place, round_, set_level in zip(*columns, strict=True):
                yield query_id, candidate, score, place, round_, None if np.isnan(set_level) else set_level

    def _columns(self, start: int, stop: int) -> list[np.ndarray]:
        """Of the queries in rows `start` to `stop`: row and then the table's columns, in the order of `rows`."""
        parts = []
        for number, added in self._rounds.items():
            own = slice(added.offsets[start], added.offsets[stop])
            rows = np.repeat(np.arange(start, stop), np.diff(added.offsets[start : stop + 1]))
            parts.append(
                (
                    rows,
                    added.candidates[own],
                    added.scores[own],
                    added.places[own],
                    np.full(len(rows), number),
                    added.set_level[own],
                )
            )
        if not parts:
            return [np.zeros(0, kind) for kind in (np.int64, np.int64, np.float64, np.int32, np.int64, np.float64)]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return [column[order] for column in columns]

    def summary(self) -> list[dict[str, float | int | None]]:
        """What each finished round bought, a row for each, as the model card shows it.

        `scored pairs` so far; and of rounds of new pairs, in the mean, the gold response's probability (a token's, or
        that of the label) after one of the round's demonstrations, and after the best one so far of each query.
        Set-level rounds have None there.
        """
        best = np.full(len(self._rows), -np.inf)
        rows: list[dict[str, float | int | None]] = []
        for number, bought in enumerate(self.bought):
            added, proposed, reached = self._rounds.get(number), None, None
            if added is not None and len(added.scores):
                owners = np.repeat(np.arange(len(self._rows)), np.diff(added.offsets))
                np.maximum.at(best, owners, added.scores)
                proposed, reached = float(np.exp(added.scores).mean()), float(np.exp(best).mean())
            told = {"gold probability": proposed, "after the best so far": reached}
            rows.append({"round": number + 1, "scored pairs": bought, **told})
        return rows

    def save(self, path: str | Path) -> None:
        """Write a parquet file; the query ids and the number of rounds stand in its metadata.

        Raises:
            SavedFileError: the disk is full, or the folder can't be written.
        """
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        state = json.dumps({"format_version": _FORMAT, "bought": self.bought, "query_ids": self.query_ids})
        schema = _schema().with_metadata({"drum_hf": state})
        queries, names = pa.array(self.query_ids, pa.string()), pa.array(self._names, pa.string())
        with replacing_file(path) as part, pq.ParquetWriter(part, schema) as writer:
            for start in range(0, len(self._rows), _BLOCK):
                rows, candidates, *rest = self._columns(start, min(start + _BLOCK, len(self._rows)))
                columns = (queries.take(pa.array(rows)), names.take(pa.array(candidates)), *rest)
                # a missing set-level score is NaN here and null in the file
                arrays = [pa.array(c, t, from_pandas=True) for c, t in zip(columns, schema.types, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))

    @classmethod
    def load(cls, path: str | Path, *, set_level_weight: float = SET_LEVEL_WEIGHT) -> CandidateTable:
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
            if state["format_version"] != _FORMAT or not data.schema.equals(_schema()):
                raise ColumnError(f"expected format {_FORMAT} with columns {_COLUMNS}; got {data.column_names}")
            if any(data[name].null_count for name in _COLUMNS[:-1]):
                raise ValueError("a value is missing")
            table = cls(_checked_ids(state["query_ids"]), set_level_weight=set_level_weight)
            asked, proposed = (data[name].dictionary_encode().combine_chunks() for name in _COLUMNS[:2])
            known = np.array([table._row(query_id) for query_id in asked.dictionary.to_pylist()], np.int64)
            rows = known[asked.indices.to_numpy()]
            numbers = np.array([table._number(c) for c in proposed.dictionary.to_pylist()], np.int64)
            candidates = numbers[proposed.indices.to_numpy()]
            scores, places, rounds, set_level = (data[name].to_numpy() for name in _COLUMNS[2:])
            table.bought = _checked_rounds(state["bought"], rounds)
            _check_pairs(rows * (1 + len(numbers)) + candidates, scores, places, set_level)
            for number in np.unique(rounds).tolist():
                own = rounds == number
                table._add(number, rows[own], candidates[own], scores[own], places[own], set_level[own])
            if table.bought and table.bought[-1] != len(table):
                raise ValueError(f"expected the {table.bought[-1]} scores that were bought, got {len(table)}")
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, RecursionError) as error:
            raise SavedFileError(
                f"expected a candidate table at {path}; reading it failed ({error}); {remedy}"
            ) from error
        return table


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.float64(), pa.int32(), pa.int32(), pa.float64())
    return pa.schema(list(zip(_COLUMNS, types, strict=True)))


def _checked_ids(ids: object) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids) or len(set(ids)) < len(ids):
        raise ValueError("its query ids are no list of different texts")
    return ids


def _checked_rounds(bought: object, rounds: np.ndarray) -> list[int]:
    """Scores bought after each round, from a file's notes and each pair's round."""
    if (
        not isinstance(bought, list)
        or not all(type(n) is int for n in bought)
        or bought != sorted(bought)
        or len(bought) > _MOST_ROUNDS
    ):
        raise ValueError(f"expected growing counts of scores, one for each round; got {bought!r:.80}")
    if len(rounds) and not 0 <= rounds.min() <= rounds.max() < len(bought):
        raise ValueError(f"expected pairs of its {len(bought)} rounds; got one of round {rounds.max()}")
    pairs, grown = np.bincount(rounds, minlength=len(bought)), np.diff([0, *bought])
    if ((pairs > 0) & (pairs != grown)).any():  # a round without pairs bought scores at set level
        raise ValueError(f"expected {pairs.tolist()} scores bought by its rounds; got {grown.tolist()}")
    return bought


def _check_pairs(pairs: np.ndarray, scores: np.ndarray, places: np.ndarray, set_level: np.ndarray) -> None:
    """Refuse what no round can have left: a pair twice, a score that is not finite, a place before the first."""
    if len(np.unique(pairs)) < len(pairs):
        raise ValueError("expected each pair once; one is there twice")
    if not np.isfinite(scores).all() or np.isinf(set_level).any() or (places < 0).any():
        raise ValueError("expected finite scores and places of at least 0")


def doubts(table: CandidateTable, labels: Sequence[str] = ()) -> list[str]:
    """Why training on this table may not help, each reason a sentence with what to do; none where all seems well.

    Args:
        table: of the training queries.
        labels: the gold label of each query, in classification.
    """
    found = []
    count = len(table.query_ids)
    rows, _, scores, *_ = table._columns(0, count)
    best, worst = np.full(count, -np.inf), np.full(count, np.inf)
    np.maximum.at(best, rows, scores)
    np.minimum.at(worst, rows, scores)
    several = best > -np.inf
    if several.any():
        gap = float(np.median(np.exp(best[several]) - np.exp(worst[several])))
        likely = float(np.median(np.exp(best[several])))
        if likely < _HOPELESS:
            found.append(
                f"The LVLM finds the gold answers nearly impossible even after a query's best demonstration (median "
                f"probability {likely:.2g}): write responses as the LVLM would answer, short and without markup, "
                "check the task, or use another LVLM."
            )
        elif gap < _SAME:
            found.append(
                "The LVLM's answers hardly depend on the demonstration (a query's best and worst one differ by "
                f"{gap:.2g} in the gold answer's median probability), so no choice of demonstrations can help much: "
                "check that demonstrations and queries are of one kind, or use an LVLM that learns in context."
            )
    counts = Counter(labels)
    rare = sorted(label for label, number in counts.items() if number < _FEW_QUERIES)
    if rare:
        found.append(
            f"{len(rare)} of {len(counts)} labels have fewer than {_FEW_QUERIES} training queries (such as "
            f"{rare[0]!r}), too few to learn from: add rows of these labels."
        )
    return found


def mine_set_level(
    retriever: DemoRetriever,
    table: CandidateTable,
    make_query: Callable[[str], Query],
    *,
    count: int,
    batch_size: int = 512,
) -> dict[str, list[str]]:
    """Choose up to `count` candidates of every query to be scored again, next to the one that served best.

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
        pools = [table.alone(query_id) for query_id in chunk]
        shown = list(dict.fromkeys(name for names in pools for name in names))
        row_of = {name: row for row, name in enumerate(shown)}
        stored = retriever.index.vectors(shown) if shown else None
        for query_id, vector, names in zip(chunk, vectors, pools, strict=True):
            similarities = np.zeros(0) if stored is None else stored[[row_of[name] for name in names]] @ vector
            asked[query_id] = [names[place] for place in np.argsort(-similarities, kind="stable")[:count].tolist()]
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
    support_ids, support_groups = support.ids, support.groups
    total, drawn = len(support), round(count * random_share)
    mined: dict[str, list[tuple[str, int]]] = {}
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        known = [set(table.scored(q)) for q in chunk]
        queries = [make_query(q) for q in chunk]
        depth = max(1, min(total, count - drawn + max(map(len, known))))
        found, _ = retriever.retrieve_ids(queries, depth)
        for query, scored, ranking in zip(queries, known, found, strict=True):
            fresh = [(candidate, place) for place, candidate in enumerate(ranking) if candidate not in scored]
            kept = fresh[: count - drawn]
            taken = {query.id, *scored, *(candidate for candidate, _ in kept)}
            if drawn:
                for row in _random_rows(total, rng):
                    candidate, group = support_ids[row], support_groups[row]
                    if candidate not in taken and (group is None or group != query.group):
                        kept.append((candidate, total))
                    if len(kept) == count:
                        break
            mined[query.id or ""] = kept
    return mined


def _random_rows(total: int, rng: np.random.Generator) -> Iterator[int]:
    """All rows in random order; made as they are asked for where there are many."""
    seen: set[int] = set()
    while total > _FEW_ROWS and len(seen) < total // 2:
        for row in rng.integers(total, size=_PICKED).tolist():
            if row not in seen:
                seen.add(row)
                yield row
    for row in rng.permutation(total).tolist():
        if row not in seen:
            yield row
