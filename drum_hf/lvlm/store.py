"""Every LVLM score and generation ever paid for, in one SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import NonFiniteScoreError, SavedFileError
from ..types import ICLRequest

__all__ = ["ScoreStore", "request_key"]

_Table = Literal["scores", "texts"]

_FORMAT_VERSION = "1"
#: Keys a query; SQLite builds before 3.32 take 999 variables.
_CHUNK = 900
#: Files up to this size (bytes) are checked from end to end when they are opened.
_CHECKED_SIZE = 64 << 20

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE fingerprints (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE scores (key BLOB PRIMARY KEY, value REAL NOT NULL, fingerprint INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE texts (key BLOB PRIMARY KEY, value TEXT NOT NULL, fingerprint INTEGER NOT NULL) WITHOUT ROWID;
"""

_REMEDIES = {
    sqlite3.SQLITE_NOTADB: "it is not a score store; give another path, or move the file away to start a new one",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a copy, or save what is readable with "
    "`sqlite3 FILE .recover | sqlite3 NEW`, or move it away to start a new one",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, or give another path",
    sqlite3.SQLITE_CANTOPEN: "give a path to a file, in a folder that can be written to",
    sqlite3.SQLITE_FULL: "free space on the disk and run again; what was written before is safe",
    sqlite3.SQLITE_IOERR: "check the disk and its free space and run again; what was written before is safe",
    sqlite3.SQLITE_BUSY: "another process has held the file for too long; run again, or raise `timeout`",
}


def request_key(
    request: ICLRequest,
    fingerprint: str,
    *,
    kind: Literal["score", "generate"] = "score",
    max_new_tokens: int | None = None,
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
    asked = (kind, str(max_new_tokens), fingerprint, request.query.key)
    shown = [demonstration.key for demonstration in request.demonstrations]
    digest = hashlib.sha256()
    for texts in (asked, shown, request.responses, request.choices):
        digest.update(struct.pack("<q", len(texts)))
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(struct.pack("<q", len(data)))
            digest.update(data)
    digest.update(struct.pack(f"<q{len(request.weights)}d", len(request.weights), *request.weights))
    return digest.digest()[:16]


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
        self.path = os.fspath(path)
        self.timeout = timeout
        self._lock = threading.RLock()
        self._inherited: list[sqlite3.Connection] = []
        self._connection: sqlite3.Connection | None = self._open()
        self._process = os.getpid()

    # Scores and texts

    def get_scores(self, keys: Sequence[bytes]) -> list[float | None]:
        """Each key's score, or None where it is not known."""
        return self._get("scores", keys)

    def put_scores(self, keys: Sequence[bytes], values: Sequence[float] | np.ndarray, *, fingerprint: str) -> None:
        """Write scores in one transaction; a key that is there already keeps its value.

        Raises:
            NonFiniteScoreError: a value is NaN or infinite; nothing is written.
            ValueError: as many values as keys were expected.
        """
        scores = np.asarray(values, dtype=np.float64).reshape(-1).tolist()
        bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            raise NonFiniteScoreError(
                f"expected finite scores, but {len(bad)} of {len(scores)} are not, the first {scores[bad[0]]} at "
                f"position {bad[0]}; nothing of this batch was written. Leave them out, or run the LVLM in bfloat16 "
                "or float32"
            )
        self._put("scores", keys, scores, fingerprint)

    def get_texts(self, keys: Sequence[bytes]) -> list[str | None]:
        """Each key's generation, or None where it is not known."""
        return self._get("texts", keys)

    def put_texts(self, keys: Sequence[bytes], values: Sequence[str], *, fingerprint: str) -> None:
        """Write generations in one transaction; a key that is there already keeps its value.

        Raises:
            ValueError: as many texts as keys were expected.
            TypeError: a value is not a string; nothing is written.
        """
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"a generation is a string, got {value!r} of type {type(value).__name__}")
        self._put("texts", keys, list(values), fingerprint)

    def stats(self) -> dict[str, Any]:
        """`scores` and `texts` (how many), `by_fingerprint` (both counts for each LVLM), `bytes` (of the file)."""
        by_fingerprint: dict[str, dict[str, int]] = {}
        with self._use("counting its entries") as connection:
            names = dict(connection.execute("SELECT number, name FROM fingerprints ORDER BY number"))
            for table in ("scores", "texts"):
                for number, count in connection.execute(f"SELECT fingerprint, COUNT(*) FROM {table} GROUP BY 1"):
                    by_fingerprint.setdefault(names[number], {"scores": 0, "texts": 0})[table] = count
            pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        totals = {table: sum(counts[table] for counts in by_fingerprint.values()) for table in ("scores", "texts")}
        return {**totals, "by_fingerprint": by_fingerprint, "bytes": pages * size}

    def __len__(self) -> int:
        """How many scores it holds; `stats` counts generations too."""
        with self._use("counting its scores") as connection:
            return connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def __bool__(self) -> bool:
        return True  # `store or ScoreStore(...)` must not replace a store that is still empty

    def __repr__(self) -> str:
        return f"ScoreStore({self.path!r})"

    # Opening and closing

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            with self._named("making its folder"):
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with self._named("opening it"):
            connection = sqlite3.connect(
                self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check the file before anything is changed in it, and make the tables where it is new."""
        if not _tables(connection):
            with _transaction(connection):
                if not _tables(connection):  # no other process was faster
                    for statement in _SCHEMA.strip().split(";\n"):
                        connection.execute(statement)
                    connection.execute("INSERT INTO meta VALUES ('format_version', ?)", (_FORMAT_VERSION,))
        if not {"meta", "fingerprints", "scores", "texts"} <= _tables(connection):
            raise SavedFileError(
                f"{self.path}: this SQLite file is not a score store (it has the tables "
                f"{', '.join(sorted(_tables(connection)))}); give another path"
            )
        version = connection.execute("SELECT value FROM meta WHERE name = 'format_version'").fetchone()
        if version != (_FORMAT_VERSION,):
            raise SavedFileError(
                f"{self.path}: expected format version {_FORMAT_VERSION}, got {version[0] if version else None}; "
                "update drum-hf, or give another path"
            )
        if self.path != ":memory:" and os.path.getsize(self.path) <= _CHECKED_SIZE:
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise SavedFileError(f"{self.path}: {' '.join(fault.split())}; {_REMEDIES[sqlite3.SQLITE_CORRUPT]}")
        mode = self._write_ahead(connection)
        # With a write-ahead log, NORMAL can lose the last batches to a power cut, never to a kill, and stays sound.
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")

    def _write_ahead(self, connection: sqlite3.Connection) -> str:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:  # this one statement does not wait for other processes by itself
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _use(self, action: str) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time."""
        with self._lock:
            if self._connection is None:
                raise ValueError(f"{self.path}: the store was closed; open a new ScoreStore")
            if self._process != os.getpid() and self.path != ":memory:":
                # A connection must not cross a fork; nor be closed by the child, which would drop the parent's locks.
                self._inherited.append(self._connection)
                self._connection = self._open()
                self._process = os.getpid()
            with self._named(action):
                yield self._connection

    @contextlib.contextmanager
    def _named(self, action: str) -> Iterator[None]:
        """Faults of the file, with its name and what to do."""
        try:
            yield
        except (SavedFileError, sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # named already, or a fault of the call rather than of the file
        except (sqlite3.DatabaseError, OSError) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CANTOPEN) & 0xFF
            remedy = _REMEDIES.get(code, "check the file, or move it away to start a new one")
            raise SavedFileError(f"{self.path}: {action} failed: {error}; {remedy}") from error

    def _get(self, table: _Table, keys: Sequence[bytes]) -> list[Any]:
        known: dict[bytes, Any] = {}
        with self._use("reading it") as connection:
            for start in range(0, len(keys), _CHUNK):
                chunk = list(keys[start : start + _CHUNK])
                marks = ",".join("?" * len(chunk))
                known.update(connection.execute(f"SELECT key, value FROM {table} WHERE key IN ({marks})", chunk))
        return [known.get(key) for key in keys]

    def _put(self, table: _Table, keys: Sequence[bytes], values: Sequence[Any], fingerprint: str) -> None:
        if len(keys) != len(values):
            raise ValueError(f"expected one value for each of {len(keys)} keys, got {len(values)}")
        if not len(keys):
            return
        with self._use("writing to it") as connection, _transaction(connection):
            connection.execute("INSERT OR IGNORE INTO fingerprints (name) VALUES (?)", (fingerprint,))
            (number,) = connection.execute("SELECT number FROM fingerprints WHERE name = ?", (fingerprint,)).fetchone()
            rows = ((key, value, number) for key, value in zip(keys, values, strict=True))
            connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING", rows)


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE takes the write lock at once: a lock taken half-way can't be waited for.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise
