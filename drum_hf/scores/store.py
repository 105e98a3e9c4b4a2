"""Every LVLM score and generation ever paid for, and what each is made of, in one SQLite file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import NonFiniteScoreError
from ..lvlm.fingerprint import RequestKind, RequestParts
from ..types import ICLRequest
from .store_file import StoreFile, transaction
from .store_rows import (
    TABLES,
    Entry,
    Sweep,
    TableName,
    as_written,
    checked_name,
    checked_value,
    file_size,
    insert,
    look_up,
    numbers_in,
    read,
    register,
)

__all__ = ["Collected", "Entry", "Merged", "RequestParts", "ScoreStore", "request_key"]

#: Two scores of one key that differ by more (log-likelihood) were not computed alike.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Merged:
    """What came of `ScoreStore.merge`: entries written, entries known before, and how many of these differ."""

    new: int = 0
    known: int = 0
    conflicts: int = 0

    def __add__(self, other: Merged) -> Merged:
        return Merged(self.new + other.new, self.known + other.known, self.conflicts + other.conflicts)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What `ScoreStore.collect` removed, or would.

    Attributes:
        scores, texts: entries removed.
        kept: entries that remain.
        unknown: of these, how many it could not judge by their contents, since they were written without them.
        bytes: by how much the file shrank; in a dry run an estimate by the share of entries.
    """

    scores: int
    texts: int
    kept: int
    unknown: int
    bytes: int


def request_key(
    request: ICLRequest, fingerprint: str, *, kind: RequestKind = "score", max_new_tokens: int | None = None
) -> bytes:
    """What an answer of an LVLM depends on, as 16 bytes of sha256.

    The LVLM's fingerprint; the demonstrations' contents in order; the query's content; responses, weights and
    choices; for a generation its length limit `max_new_tokens`. Ids, groups and drafts are not in it: the LVLM does
    not see them.

    Raises:
        ValueError: an unknown kind, a generation without limit or a score with one.

    Example:
        >>> from drum_hf.types import Query
        >>> request = ICLRequest(Query(None, "2 + 2 ="), responses=("4",))
        >>> request_key(request, "model@1").hex()
        'ac508b839db16fd97a0ea972545ede74'
        >>> request_key(request, "model@1") == request_key(request, "model@2")
        False
    """
    if kind not in ("score", "generate"):
        raise ValueError(f"kind is 'score' or 'generate', got {kind!r}")
    if (kind == "generate") != (max_new_tokens is not None):
        raise ValueError(
            f"max_new_tokens belongs to kind 'generate', and only to it; got {max_new_tokens} with {kind!r}"
        )
    return RequestParts.of(request, max_new_tokens).key(fingerprint)


class ScoreStore(StoreFile):
    """Scores and generations by key (`request_key`), in one SQLite file.

    Several threads and processes of one machine may use a file at once. A batch is one transaction: it is there
    whole or not at all, whenever a process is killed. A key keeps the first value it was given. A file of an earlier
    format version is brought up to date when it is opened, and loses nothing.

    Args:
        path: the file, made where it is missing; ":memory:" for one that goes with the object.
        timeout: seconds to wait for other processes' writes.

    Raises:
        SavedFileError: the file is not SQLite, not a score store, damaged, of a later format version, or can't be
            opened; from the methods too, where it can't be read or written.

    Example:
        >>> with ScoreStore(":memory:") as store:
        ...     store.put_scores([b"one", b"two"], [-0.5, -1.0], fingerprint="model@1")
        ...     store.get_scores([b"two", b"three", b"one"])
        [-1.0, None, -0.5]
    """

    def __init__(self, path: str | os.PathLike[str] = ":memory:", *, timeout: float = 60.0) -> None:
        super().__init__(path, timeout)

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __bool__(self) -> bool:
        return True  # `store or ScoreStore(...)` must not replace a store that is still empty

    def __repr__(self) -> str:
        return f"ScoreStore({self.path!r})"

    # Scores and texts

    def get_scores(self, keys: Sequence[bytes]) -> list[float | None]:
        """Each key's score, or None where it is not known."""
        return self._get("scores", keys)

    def put_scores(
        self,
        keys: Sequence[bytes],
        values: Sequence[float] | np.ndarray,
        *,
        fingerprint: str,
        parts: Sequence[RequestParts] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Write scores in one transaction; a key that is there already keeps its value.

        Args:
            fingerprint: of the LVLM that gave them.
            parts: what each key is made of; scores without can be neither exported nor judged by their contents.
            identity: the LVLM's named parts, by which people tell it from others; kept once for a fingerprint.

        Raises:
            NonFiniteScoreError: a value is NaN or infinite; nothing is written.
            ValueError: as many values (and parts) as keys were expected.
        """
        scores = np.asarray(values, dtype=np.float64).reshape(-1).tolist()
        bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            raise NonFiniteScoreError(
                f"expected finite scores, but {len(bad)} of {len(scores)} are not, the first {scores[bad[0]]} at "
                f"position {bad[0]}; nothing of this batch was written. Leave them out, or run the LVLM in bfloat16 "
                "or float32"
            )
        self._put("score", keys, scores, fingerprint, parts, identity)

    def get_texts(self, keys: Sequence[bytes]) -> list[str | None]:
        """Each key's generation, or None where it is not known."""
        return self._get("texts", keys)

    def put_texts(
        self,
        keys: Sequence[bytes],
        values: Sequence[str],
        *,
        fingerprint: str,
        parts: Sequence[RequestParts] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Write generations in one transaction; a key that is there already keeps its value.

        Args:
            fingerprint, parts, identity: as in `put_scores`; parts carry `max_new_tokens`.

        Raises:
            ValueError: as many texts (and parts) as keys were expected.
            TypeError: a value is not a string; nothing is written.
        """
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"a generation is a string, got {value!r} of type {type(value).__name__}")
        self._put("generate", keys, list(values), fingerprint, parts, identity)

    def merge(
        self, entries: Sequence[Entry], identities: Mapping[str, Mapping[str, Any] | None] | None = None
    ) -> Merged:
        """Write entries of another store in one transaction; what is there already keeps its value.

        Args:
            entries: from `entries` of the other store; their keys are not checked here.
            identities: fingerprint -> named parts of the LVLMs, from `identities` of the other store.

        Returns:
            counts; a conflict is a known key whose score differs by more than 1e-3, or whose text differs.
        """
        counted = Merged()
        with self._use("writing to it") as connection, transaction(connection):
            for fingerprint, identity in (identities or {}).items():
                register(connection, fingerprint, identity)
            for kind, table in TABLES.items():
                chosen = [entry for entry in entries if entry.kind == kind]
                known = look_up(
                    connection, f"SELECT key, value FROM {table} WHERE key", [entry.key for entry in chosen]
                )
                differ = sum(entry.key in known and _differ(entry.value, known[entry.key]) for entry in chosen)
                fresh = len({entry.key for entry in chosen} - known.keys())
                counted += Merged(fresh, len(chosen) - fresh, differ)
                insert(connection, kind, chosen)
        return counted

    # What it holds

    def entries(
        self, *, fingerprints: Collection[str] | None = None, page_size: int = 20_000
    ) -> Iterator[list[Entry]]:
        """All entries, or those of some LVLMs, by key and a page at a time; what others write meanwhile may be in it.

        Raises:
            ValueError: the store has nothing of one of these fingerprints.
        """
        wanted = self._numbers_of(fingerprints).values()  # now, not when the first page is asked for
        return self._pages(None if fingerprints is None else ",".join(map(str, wanted)), page_size)

    def _pages(self, wanted: str | None, page_size: int) -> Iterator[list[Entry]]:
        own = "" if wanted is None else f"AND fingerprint IN ({wanted})"
        for kind in TABLES:
            last = b""
            while True:
                with self._use("reading it") as connection, transaction(connection, "DEFERRED"):
                    page = read(connection, kind, f"key > ? {own} ORDER BY key LIMIT {page_size:d}", (last,))
                if not page:
                    break
                last = page[-1].key
                yield page

    def identities(self) -> dict[str, dict[str, Any] | None]:
        """Fingerprint -> the LVLM's named parts (None where they were not recorded), for each LVLM it has seen."""
        with self._use("reading it") as connection:
            rows = connection.execute("SELECT name, details FROM fingerprints ORDER BY number").fetchall()
            with as_written():
                return {checked_name(name): dict(json.loads(details)) if details else None for name, details in rows}

    def stats(self) -> dict[str, Any]:
        """`scores` and `texts` (how many), `by_fingerprint` (both counts for each LVLM), `bytes` (of the file)."""
        by_fingerprint: dict[str, dict[str, int]] = {}
        with self._use("counting its entries") as connection, transaction(connection, "DEFERRED"), as_written():
            names = dict(connection.execute("SELECT number, name FROM fingerprints ORDER BY number"))
            for table in TABLES.values():
                for number, count in connection.execute(f"SELECT fingerprint, COUNT(*) FROM {table} GROUP BY 1"):
                    by_fingerprint.setdefault(names[number], {"scores": 0, "texts": 0})[table] = count
            size = file_size(connection)
        totals: dict[str, int] = {
            table: sum(counts[table] for counts in by_fingerprint.values()) for table in TABLES.values()
        }
        return {**totals, "by_fingerprint": by_fingerprint, "bytes": size}

    def __len__(self) -> int:
        """How many scores it holds; `stats` counts generations too."""
        with self._use("counting its scores") as connection:
            return connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def collect(
        self,
        *,
        keep: Collection[str] | None = None,
        drop: Collection[str] | None = None,
        contents: Collection[str] | None = None,
        dry_run: bool = False,
    ) -> Collected:
        """Remove what is no longer wanted, in one transaction, and give its room back to the disk.

        Args:
            keep: fingerprints; entries of every other LVLM go.
            drop: fingerprints; entries of these go. Not together with `keep`.
            contents: content keys of rows and queries (`TripletTable.keys` and `.query_keys`); an entry goes unless
                its query and all its demonstrations are among them. Entries that were written without their parts
                stay.
            dry_run: only count.

        Raises:
            ValueError: none of the three, `keep` with `drop`, or a fingerprint that the store has nothing of.
        """
        if not (keep or drop or contents):
            raise ValueError("expected what to keep or to drop, got nothing; nothing is removed without a criterion")
        if keep and drop:
            raise ValueError("expected fingerprints to keep or to drop, got both")
        named = set(self._numbers_of(keep or drop or ()).values())
        with self._use("collecting what is no longer wanted") as connection:
            with transaction(connection, "DEFERRED" if dry_run else "IMMEDIATE"):
                gone = named
                if keep:
                    gone = {number for (number,) in connection.execute("SELECT number FROM fingerprints")} - named
                here = None if not contents else numbers_in(connection, contents)
                before = file_size(connection)
                sweep = Sweep(connection, gone, here)
                if not dry_run:
                    sweep.remove()
            if not dry_run:
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            scores, texts = (len(sweep.doomed[table]) for table in TABLES.values())
            total = scores + texts + sweep.kept
            freed = before * (scores + texts) // max(1, total) if dry_run else before - file_size(connection)
        return Collected(scores, texts, sweep.kept, sweep.unknown, freed)

    def _numbers_of(self, fingerprints: Collection[str] | None) -> dict[str, int]:
        with self._use("reading it") as connection:
            known = dict(connection.execute("SELECT name, number FROM fingerprints ORDER BY number"))
        strangers = set(fingerprints or ()) - known.keys()
        if strangers:
            raise ValueError(
                f"{self.path} has nothing of the LVLM with fingerprint {min(strangers)!r}; it knows "
                f"{', '.join(known) or 'none yet'}"
            )
        return known if fingerprints is None else {name: known[name] for name in fingerprints}

    def _get(self, table: TableName, keys: Sequence[bytes]) -> list[Any]:
        with self._use("reading it") as connection:
            # In the order of the file, so that each page is read once.
            known = look_up(connection, f"SELECT key, value FROM {table} WHERE key", sorted(set(keys)))
            kind: RequestKind = "score" if table == "scores" else "generate"
            with as_written():
                values = {key: checked_value(kind, value) for key, value in known.items()}
        return [values.get(key) for key in keys]

    def _put(
        self,
        kind: RequestKind,
        keys: Sequence[bytes],
        values: Sequence[Any],
        fingerprint: str,
        parts: Sequence[RequestParts] | None,
        identity: Mapping[str, Any] | None,
    ) -> None:
        if len(keys) != len(values):
            raise ValueError(f"expected one value for each of {len(keys)} keys, got {len(values)}")
        if parts is not None and (len(parts) != len(keys) or any(part.kind != kind for part in parts)):
            raise ValueError(
                f"expected the parts of {len(keys)} keys of kind {kind!r}, got {len(parts)} or another kind"
            )
        if not len(keys):
            return
        described: Sequence[RequestParts | None] = parts if parts is not None else [None] * len(keys)
        entries = [
            Entry(kind, key, value, fingerprint, part)
            for key, value, part in zip(keys, values, described, strict=True)
        ]
        with self._use("writing to it") as connection, transaction(connection):
            register(connection, fingerprint, identity)
            insert(connection, kind, entries)


def _differ(one: float | str, other: float | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    return abs(one - other) > _TOLERANCE
