"""How a `ScoreStore` writes and reads its entries: what repeats is kept once, and referred to by its number."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..lvlm.fingerprint import RequestKind, RequestParts

__all__ = [
    "REQUEST_COLUMNS",
    "TABLES",
    "Entry",
    "Sweep",
    "TableName",
    "as_written",
    "checked_name",
    "checked_value",
    "file_size",
    "insert",
    "look_up",
    "numbers_in",
    "read",
    "register",
]

TableName = Literal["scores", "texts"]
TABLES: dict[RequestKind, TableName] = {"score": "scores", "generate": "texts"}
REQUEST_COLUMNS = ("query", "shown", "responses", "weights", "choices")

#: Values a query; SQLite builds before 3.32 take 999 variables.
_CHUNK = 900


class Entry(NamedTuple):
    """One answer: `value` is a float (kind "score") or a text ("generate"); `parts` is None where not known."""

    kind: RequestKind
    key: bytes
    value: float | str
    fingerprint: str
    parts: RequestParts | None


# ---- writing ----


def register(connection: sqlite3.Connection, fingerprint: str, identity: Mapping[str, Any] | None) -> None:
    details = None if identity is None else json.dumps(dict(identity))
    connection.execute(
        "INSERT INTO fingerprints (name, details) VALUES (?, ?) ON CONFLICT (name) DO UPDATE "
        "SET details = excluded.details WHERE details IS NULL AND excluded.details IS NOT NULL",
        (fingerprint, details),
    )


def insert(connection: sqlite3.Connection, kind: RequestKind, entries: Sequence[Entry]) -> None:
    """Write entries; one that is there without its parts is given them."""
    names = list(dict.fromkeys(entry.fingerprint for entry in entries))
    connection.executemany("INSERT OR IGNORE INTO fingerprints (name) VALUES (?)", zip(names, strict=True))
    numbers = look_up(connection, "SELECT name, number FROM fingerprints WHERE name", names)
    described = [entry.parts for entry in entries if entry.parts is not None]
    contents = _interned(
        connection,
        "contents",
        (key for parts in described for key in (parts.query, *parts.demonstrations)),
        _shortened,
    )
    lists = _interned(connection, "lists", (each for parts in described for each in parts[2:5]), json.dumps)
    limits = ["max_new_tokens"] * (kind == "generate")

    def row(entry: Entry) -> tuple[Any, ...]:
        fixed = (entry.key, entry.value, numbers[entry.fingerprint])
        parts = entry.parts
        if parts is None:
            return fixed + (None,) * (len(REQUEST_COLUMNS) + len(limits))
        shown = struct.pack(f"<{len(parts.demonstrations)}I", *(contents[key] for key in parts.demonstrations))
        made_of = (contents[parts.query], shown, *(lists[each] for each in parts[2:5]))
        return fixed + made_of + (parts.max_new_tokens,) * len(limits)

    columns = (*REQUEST_COLUMNS, *limits)
    connection.executemany(
        f"INSERT INTO {TABLES[kind]} (key, value, fingerprint, {', '.join(columns)}) "
        f"VALUES ({', '.join('?' * (3 + len(columns)))}) ON CONFLICT (key) DO UPDATE "
        f"SET {', '.join(f'{column} = excluded.{column}' for column in columns)} "
        "WHERE query IS NULL AND excluded.query IS NOT NULL",
        map(row, entries),
    )


def _interned(
    connection: sqlite3.Connection, table: str, items: Iterable[Any], write: Callable[[Any], Any]
) -> dict[Any, int]:
    """Number of each item in a side table; what is not there is added."""
    stored = {item: write(item) for item in dict.fromkeys(items)}
    known = look_up(connection, f"SELECT value, number FROM {table} WHERE value", list(stored.values()))
    for value in stored.values():
        if value not in known:
            known[value] = connection.execute(f"INSERT INTO {table} (value) VALUES (?)", (value,)).lastrowid
    return {item: known[value] for item, value in stored.items()}


# ---- reading ----


def look_up(connection: sqlite3.Connection, select: str, items: Sequence[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        found.update(connection.execute(f"{select} IN ({','.join('?' * len(chunk))})", chunk))
    return found


def read(connection: sqlite3.Connection, kind: RequestKind, condition: str, values: Sequence[Any]) -> list[Entry]:
    """Entries of one kind under a condition; to be used within one transaction.

    Raises:
        sqlite3.DatabaseError: an entry is not what `insert` wrote.
    """
    with as_written():
        return _read(connection, kind, condition, values)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """What is read must be as `insert` wrote it.

    Raises:
        sqlite3.DatabaseError: it is not.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise sqlite3.DatabaseError(f"an entry is not what drum-hf wrote ({error!r:.200})") from error


def _read(connection: sqlite3.Connection, kind: RequestKind, condition: str, values: Sequence[Any]) -> list[Entry]:
    limit = ["max_new_tokens"] * (kind == "generate")
    columns = ", ".join(("key", "value", "fingerprint", *REQUEST_COLUMNS, *limit))
    rows = connection.execute(f"SELECT {columns} FROM {TABLES[kind]} WHERE {condition}", values).fetchall()
    names = look_up(connection, "SELECT number, name FROM fingerprints WHERE number", list({row[2] for row in rows}))
    described = [row for row in rows if row[3] is not None]
    numbers = {number for row in described for number in (row[3], *_unpack_shown(row[4]))}
    contents = look_up(connection, "SELECT number, value FROM contents WHERE number", list(numbers))
    numbers = {number for row in described for number in row[5:8]}
    lists = look_up(connection, "SELECT number, value FROM lists WHERE number", list(numbers))
    keys = {number: _lengthened(value) for number, value in contents.items()}
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
        Entry(kind, checked_key(key), checked_value(kind, value), checked_name(names[number]), parts(*made_of))
        for key, value, number, *made_of in rows
    ]


def checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the fingerprint {name!r:.80}")
    return name


def checked_key(key: Any) -> bytes:
    if not isinstance(key, bytes):
        raise ValueError(f"the key {key!r:.80}")
    return key


def checked_value(kind: RequestKind, value: Any) -> Any:
    """A score or text as it was read: SQLite keeps any value in any column.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) if kind == "generate" else isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"{value!r:.80} for a {kind}")


def _unpack_shown(shown: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(shown) // 4}I", shown)


def file_size(connection: sqlite3.Connection) -> int:
    pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return pages * size


# ---- removing ----


def numbers_in(connection: sqlite3.Connection, contents: Collection[str]) -> set[int]:
    wanted = contents if isinstance(contents, (set, frozenset)) else set(contents)
    rows = connection.execute("SELECT number, value FROM contents")
    with as_written():
        return {number for number, value in rows if _lengthened(value) in wanted}


class Sweep:
    """Which entries go, and what the others are made of; to be used within one transaction."""

    def __init__(self, connection: sqlite3.Connection, gone: set[int], here: set[int] | None) -> None:
        self.connection, self.gone, self.here = connection, gone, here
        self.doomed: dict[str, list[bytes]] = {table: [] for table in TABLES.values()}
        self.kept = self.unknown = 0
        self.contents: set[int] = set()
        self.lists: set[int] = set()
        with as_written():
            self._look()

    def _look(self) -> None:
        here = self.here
        for table, doomed in self.doomed.items():
            rows = self.connection.execute(f"SELECT key, fingerprint, {', '.join(REQUEST_COLUMNS)} FROM {table}")
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


def _shortened(key: str) -> bytes | str:
    """A content key as it is kept: 16 bytes where it is 32 hex digits, and JSON otherwise."""
    if len(key) == 32:
        try:
            data = bytes.fromhex(key)
        except ValueError:
            data = b""
        if data.hex() == key:
            return data
    return json.dumps(key)


def _lengthened(value: bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else json.loads(value)
