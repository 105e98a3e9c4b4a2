"""Every LVLM score and generation ever paid for, and what each is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ..errors import NonFiniteScoreError, SavedFileError
from ..lvlm.fingerprint import RequestKind, RequestParts
from ..types import ICLRequest
from ..utils.text import shown as printable
from ..utils.text import well_formed
from .sqlite import SQLiteFile

__all__ = ["Collected", "Entry", "Merged", "RequestParts", "ScoreStore", "request_key"]

TableName = Literal["scores", "texts"]
_TABLES: dict[RequestKind, TableName] = {"score": "scores", "generate": "texts"}
_REQUEST_COLUMNS = ("query", "shown", "responses", "weights", "choices")
#: Values a query; SQLite builds before 3.32 take 999 variables.
_CHUNK = 900
#: Longest named parts of an LVLM (characters of JSON), and longest fingerprint; ours take hundreds.
_LONGEST_IDENTITY, _LONGEST_NAME = 100_000, 1000
#: Two scores of one key that differ by more (log-likelihood) were not computed alike.
_TOLERANCE = 1e-3


class Connection(Protocol):
    """What the store needs of a database: SQL with `?` for values."""

    def execute(self, statement: str, values: Sequence[Any] = ..., /) -> Any: ...

    def executemany(self, statement: str, rows: Iterable[Any], /) -> Any: ...


class Backend(Protocol):
    """Where a store keeps its tables. `SQLiteFile` is one; another takes the same SQL."""

    path: str

    def reading(self, action: str) -> AbstractContextManager[Connection]: ...

    def writing(self, action: str) -> AbstractContextManager[Connection]: ...

    def size(self, connection: Any) -> int: ...

    def shrink(self, action: str) -> int: ...

    def close(self) -> None: ...


class Entry(NamedTuple):
    """One answer: `value` is a float (kind "score") or a text ("generate"); `parts` is None where not known."""

    kind: RequestKind
    key: bytes
    value: float | str
    fingerprint: str
    parts: RequestParts | None


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


class ScoreStore:
    """Scores and generations by key (`request_key`), in one SQLite file.

    Several threads and processes of one machine may use a file at once. A batch is one transaction: it is there
    whole or not at all, whenever a process is killed. A key keeps the first value it was given.

    Args:
        path: the file, made where it is missing; ":memory:" for one that goes with the object.
        timeout: seconds to wait for other processes' writes.

    Raises:
        SavedFileError: the file is not SQLite, not a score store, damaged, of another format version, or can't be
            opened; from the methods too, where it can't be read or written.

    Example:
        >>> with ScoreStore(":memory:") as store:
        ...     store.put_scores([b"one", b"two"], [-0.5, -1.0], fingerprint="model@1")
        ...     store.get_scores([b"two", b"three", b"one"])
        [-1.0, None, -0.5]
    """

    def __init__(self, path: str | os.PathLike[str] = ":memory:", *, timeout: float = 60.0) -> None:
        self._backend: Backend = SQLiteFile(path, timeout)
        self.path = self._backend.path

    def close(self) -> None:
        """Close it; closing twice does nothing."""
        self._backend.close()

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

        Every text is kept `well_formed`: half a surrogate pair and NUL as U+FFFD, at most a million characters.

        Args:
            fingerprint, parts, identity: as in `put_scores`; parts carry `max_new_tokens`.

        Raises:
            ValueError: as many texts (and parts) as keys were expected.
            TypeError: a value is not a string; nothing is written.
        """
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"a generation is a string, got {value!r} of type {type(value).__name__}")
        self._put("generate", keys, [well_formed(value) for value in values], fingerprint, parts, identity)

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
        with self._backend.writing("writing to it") as connection:
            for fingerprint, identity in (identities or {}).items():
                _register(connection, fingerprint, identity)
            for kind, table in _TABLES.items():
                chosen = [entry for entry in entries if entry.kind == kind]
                known = _look_up(
                    connection, f"SELECT key, value FROM {table} WHERE key", [entry.key for entry in chosen]
                )
                differ = sum(entry.key in known and _differ(entry.value, known[entry.key]) for entry in chosen)
                fresh = len({entry.key for entry in chosen} - known.keys())
                counted += Merged(fresh, len(chosen) - fresh, differ)
                _insert(connection, kind, chosen)
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
        for kind in _TABLES:
            last = b""
            while True:
                with self._backend.reading("reading it") as connection, self._as_written():
                    page = _read(connection, kind, f"key > ? {own} ORDER BY key LIMIT {page_size:d}", (last,))
                if not page:
                    break
                last = page[-1].key
                yield page

    def identities(self) -> dict[str, dict[str, Any] | None]:
        """Fingerprint -> the LVLM's named parts (None where they were not recorded), for each LVLM it has seen."""
        with self._backend.reading("reading it") as connection:
            rows = connection.execute("SELECT name, details FROM fingerprints ORDER BY number").fetchall()
            with self._as_written():
                return {_checked_name(name): _checked_identity(details) for name, details in rows}

    def stats(self) -> dict[str, Any]:
        """`scores` and `texts` (how many), `by_fingerprint` (both counts for each LVLM), `bytes` (of the file)."""
        by_fingerprint: dict[str, dict[str, int]] = {}
        with self._backend.reading("counting its entries") as connection, self._as_written():
            names = dict(connection.execute("SELECT number, name FROM fingerprints ORDER BY number"))
            for table in _TABLES.values():
                for number, count in connection.execute(f"SELECT fingerprint, COUNT(*) FROM {table} GROUP BY 1"):
                    by_fingerprint.setdefault(names[number], {"scores": 0, "texts": 0})[table] = count
            size = self._backend.size(connection)
        totals: dict[str, int] = {
            table: sum(counts[table] for counts in by_fingerprint.values()) for table in _TABLES.values()
        }
        return {**totals, "by_fingerprint": by_fingerprint, "bytes": size}

    def __len__(self) -> int:
        """How many scores it holds; `stats` counts generations too."""
        with self._backend.reading("counting its scores") as connection:
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
        action = "collecting what is no longer wanted"
        with (self._backend.reading if dry_run else self._backend.writing)(action) as connection:
            with self._as_written():
                gone = named
                if keep:
                    gone = {number for (number,) in connection.execute("SELECT number FROM fingerprints")} - named
                here = None if not contents else _numbers_in(connection, contents)
                before = self._backend.size(connection)
                sweep = _Sweep(connection, gone, here)
            if not dry_run:
                sweep.remove()
        scores, texts = (len(sweep.doomed[table]) for table in _TABLES.values())
        total = scores + texts + sweep.kept
        freed = before * (scores + texts) // max(1, total) if dry_run else before - self._backend.shrink(action)
        return Collected(scores, texts, sweep.kept, sweep.unknown, freed)

    def check_writable(self, fingerprint: str) -> None:
        """Take the lock for writing and give it back: before answers are paid for that could not be kept.

        Args:
            fingerprint: of the LVLM that will give them.

        Raises:
            ValueError: the fingerprint can't be kept.
            SavedFileError: the store can't be written to.
        """
        if not isinstance(fingerprint, str) or well_formed(fingerprint, most=_LONGEST_NAME) != fingerprint:
            raise ValueError(
                f"expected a fingerprint of at most {_LONGEST_NAME} characters that is valid Unicode, got "
                f"{printable(repr(fingerprint), most=80)}; use a hash"
            )
        with self._backend.writing("writing to it"):
            pass

    @contextlib.contextmanager
    def _as_written(self) -> Iterator[None]:
        """What is read must be as it was written here.

        Raises:
            SavedFileError: it is not.
        """
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
            raise SavedFileError(
                f"{printable(self.path)}: an entry is not what drum-hf wrote ({printable(repr(error))}); restore a "
                "copy, or move the file away to start a new one"
            ) from error

    def _numbers_of(self, fingerprints: Collection[str] | None) -> dict[str, int]:
        with self._backend.reading("reading it") as connection:
            known = dict(connection.execute("SELECT name, number FROM fingerprints ORDER BY number"))
        strangers = set(fingerprints or ()) - known.keys()
        if strangers:
            raise ValueError(
                f"{self.path} has nothing of the LVLM with fingerprint {min(strangers)!r}; it knows "
                f"{printable(', '.join(known)) or 'none yet'}"
            )
        return known if fingerprints is None else {name: known[name] for name in fingerprints}

    def _get(self, table: TableName, keys: Sequence[bytes]) -> list[Any]:
        with self._backend.reading("reading it") as connection:
            # In the order of the file, so that each page is read once.
            known = _look_up(connection, f"SELECT key, value FROM {table} WHERE key", sorted(set(keys)))
            kind: RequestKind = "score" if table == "scores" else "generate"
            with self._as_written():
                values = {key: _checked_value(kind, value) for key, value in known.items()}
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
        with self._backend.writing("writing to it") as connection:
            _register(connection, fingerprint, identity)
            _insert(connection, kind, entries)


def _differ(one: float | str, other: float | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    return abs(one - other) > _TOLERANCE


# ---- writing ----


def _register(connection: Connection, fingerprint: str, identity: Mapping[str, Any] | None) -> None:
    details = None if identity is None else json.dumps(dict(identity), default=str)
    if len(details or "") > _LONGEST_IDENTITY:
        details = None  # what was paid for is kept all the same
    connection.execute(
        "INSERT INTO fingerprints (name, details) VALUES (?, ?) ON CONFLICT (name) DO UPDATE "
        "SET details = excluded.details WHERE details IS NULL AND excluded.details IS NOT NULL",
        (fingerprint, details),
    )


def _insert(connection: Connection, kind: RequestKind, entries: Sequence[Entry]) -> None:
    """Write entries; one that is there without its parts is given them."""
    names = list(dict.fromkeys(entry.fingerprint for entry in entries))
    connection.executemany(
        "INSERT INTO fingerprints (name) VALUES (?) ON CONFLICT DO NOTHING", zip(names, strict=True)
    )
    numbers = _look_up(connection, "SELECT name, number FROM fingerprints WHERE name", names)
    described = [entry.parts for entry in entries if entry.parts is not None]
    contents = _interned(
        connection,
        "contents",
        (key for parts in described for key in (parts.query, *parts.demonstrations)),
    )
    lists = _interned(connection, "lists", (each for parts in described for each in parts[2:5]))
    limits = ["max_new_tokens"] * (kind == "generate")

    def row(entry: Entry) -> tuple[Any, ...]:
        fixed = (entry.key, entry.value, numbers[entry.fingerprint])
        parts = entry.parts
        if parts is None:
            return fixed + (None,) * (len(_REQUEST_COLUMNS) + len(limits))
        shown = struct.pack(f"<{len(parts.demonstrations)}I", *(contents[key] for key in parts.demonstrations))
        made_of = (contents[parts.query], shown, *(lists[each] for each in parts[2:5]))
        return fixed + made_of + (parts.max_new_tokens,) * len(limits)

    columns = (*_REQUEST_COLUMNS, *limits)
    connection.executemany(
        f"INSERT INTO {_TABLES[kind]} (key, value, fingerprint, {', '.join(columns)}) "
        f"VALUES ({', '.join('?' * (3 + len(columns)))}) ON CONFLICT (key) DO UPDATE "
        f"SET {', '.join(f'{column} = excluded.{column}' for column in columns)} "
        "WHERE query IS NULL AND excluded.query IS NOT NULL",
        map(row, entries),
    )


def _interned(connection: Connection, table: str, items: Iterable[Any]) -> dict[Any, int]:
    """Number of each item in a side table; what is not there is added."""
    stored = {item: json.dumps(item) for item in dict.fromkeys(items)}
    known = _look_up(connection, f"SELECT value, number FROM {table} WHERE value", list(stored.values()))
    for value in stored.values():
        if value not in known:
            inserted = connection.execute(f"INSERT INTO {table} (value) VALUES (?) RETURNING number", (value,))
            known[value] = inserted.fetchone()[0]
    return {item: known[value] for item, value in stored.items()}


# ---- reading ----


def _look_up(connection: Connection, select: str, items: Sequence[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        found.update(connection.execute(f"{select} IN ({','.join('?' * len(chunk))})", chunk))
    return found


def _read(connection: Connection, kind: RequestKind, condition: str, values: Sequence[Any]) -> list[Entry]:
    """Entries of one kind under a condition; to be used within one transaction."""
    limit = ["max_new_tokens"] * (kind == "generate")
    columns = ", ".join(("key", "value", "fingerprint", *_REQUEST_COLUMNS, *limit))
    rows = connection.execute(f"SELECT {columns} FROM {_TABLES[kind]} WHERE {condition}", values).fetchall()
    names = _look_up(connection, "SELECT number, name FROM fingerprints WHERE number", list({row[2] for row in rows}))
    described = [row for row in rows if row[3] is not None]
    numbers = {number for row in described for number in (row[3], *_unpack_shown(row[4]))}
    contents = _look_up(connection, "SELECT number, value FROM contents WHERE number", list(numbers))
    numbers = {number for row in described for number in row[5:8]}
    lists = _look_up(connection, "SELECT number, value FROM lists WHERE number", list(numbers))
    keys = {number: json.loads(value) for number, value in contents.items()}
    tuples = {number: tuple(json.loads(value)) for number, value in lists.items()}

    def parts(query: int | None, shown: bytes, *others: Any) -> RequestParts | None:
        if query is None:
            return None
        responses, weights, choices = (tuples[number] for number in others[:3])
        demonstrations = tuple([keys[number] for number in _unpack_shown(shown)])
        made_of = RequestParts(keys[query], demonstrations, responses, weights, choices, *others[3:])
        texts = (made_of.query, *demonstrations, *responses, *choices)
        if not all(isinstance(each, str) for each in texts) or not all(isinstance(w, (int, float)) for w in weights):
            raise ValueError("parts of other types")
        limit = made_of.max_new_tokens
        if limit is not None and not (isinstance(limit, int) and 0 <= limit < 1 << 31):
            raise ValueError(f"a limit of {limit!r:.80} tokens")
        return made_of

    return [
        Entry(kind, _checked_key(key), _checked_value(kind, value), _checked_name(names[number]), parts(*made_of))
        for key, value, number, *made_of in rows
    ]


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the fingerprint {name!r:.80}")
    return name


def _checked_identity(details: Any) -> dict[str, Any] | None:
    if details is None:
        return None
    if not isinstance(details, str) or len(details) > _LONGEST_IDENTITY:
        raise ValueError("named parts of an LVLM that are too long")
    return dict(json.loads(details))


def _checked_key(key: Any) -> bytes:
    if not isinstance(key, bytes):
        raise ValueError(f"the key {key!r:.80}")
    return key


def _checked_value(kind: RequestKind, value: Any) -> Any:
    """A score or text as it was read: SQLite keeps any value in any column.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) if kind == "generate" else isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"{value!r:.80} for a {kind}")


def _unpack_shown(shown: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(shown) // 4}I", shown)


# ---- removing ----


def _numbers_in(connection: Connection, contents: Collection[str]) -> set[int]:
    wanted = contents if isinstance(contents, (set, frozenset)) else set(contents)
    rows = connection.execute("SELECT number, value FROM contents")
    return {number for number, value in rows if json.loads(value) in wanted}


class _Sweep:
    """Which entries go, and what the others are made of; to be used within one transaction."""

    def __init__(self, connection: Connection, gone: set[int], here: set[int] | None) -> None:
        self.connection, self.gone, self.here = connection, gone, here
        self.doomed: dict[str, list[bytes]] = {table: [] for table in _TABLES.values()}
        self.kept = self.unknown = 0
        self.contents: set[int] = set()
        self.lists: set[int] = set()
        self._look()

    def _look(self) -> None:
        here = self.here
        for table, doomed in self.doomed.items():
            rows = self.connection.execute(f"SELECT key, fingerprint, {', '.join(_REQUEST_COLUMNS)} FROM {table}")
            for key, fingerprint, query, shown, *lists in rows:
                made_of = () if query is None else (query, *_unpack_shown(shown))
                if fingerprint in self.gone or (here is not None and not here.issuperset(made_of)):
                    doomed.append(key)
                    continue
                self.kept += 1
                self.contents.update(made_of)
                if query is None:
                    self.unknown += here is not None
                else:
                    self.lists.update(lists)

    def remove(self) -> None:
        for table, doomed in self.doomed.items():
            self.connection.executemany(f"DELETE FROM {table} WHERE key = ?", ((key,) for key in doomed))
        for table, used in (("contents", self.contents), ("lists", self.lists)):
            rows = self.connection.execute(f"SELECT number FROM {table}").fetchall()
            unused = [row for row in rows if row[0] not in used]
            self.connection.executemany(f"DELETE FROM {table} WHERE number = ?", unused)
        numbers = [(number,) for number in self.gone]
        self.connection.executemany("DELETE FROM fingerprints WHERE number = ?", numbers)
