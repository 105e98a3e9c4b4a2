"""The SQLite file under a `ScoreStore`: opened and checked, for several threads and processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import SavedFileError
from ..utils.files import check_name, refuse_special
from ..utils.text import shown

__all__ = ["SQLiteFile"]

_FORMAT_VERSION = "3"
# What an answer is made of stands by number: contents and lists repeat a thousandfold.
_MADE_OF = "query INTEGER, shown BLOB, responses INTEGER, weights INTEGER, choices INTEGER"
_TABLES = {
    "meta": "name TEXT PRIMARY KEY, value TEXT NOT NULL",
    "fingerprints": "number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, details TEXT",
    "contents": "number INTEGER PRIMARY KEY, value TEXT NOT NULL UNIQUE",
    "lists": "number INTEGER PRIMARY KEY, value TEXT NOT NULL UNIQUE",
    "scores": f"key BLOB PRIMARY KEY, value REAL NOT NULL, fingerprint INTEGER NOT NULL, {_MADE_OF}",
    "texts": f"key BLOB PRIMARY KEY, value TEXT NOT NULL, fingerprint INTEGER NOT NULL, {_MADE_OF}, "
    "max_new_tokens INTEGER",
}
#: Tables that are looked up by a key that is no row number.
_BY_KEY = ("meta", "scores", "texts")
#: Files up to this size (bytes) are checked from end to end when they are opened.
_CHECKED_SIZE = 64 << 20
#: Longest text or blob that is read (bytes); the longest of ours are answers.
_LONGEST = 64 << 20

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


class SQLiteFile:
    """One connection to the file, for one thread at a time, opened anew after a fork.

    Raises:
        SavedFileError: the file is not SQLite, not a score store, damaged, of another format version, or can't be
            opened; from the methods too, where it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        check_name(self.path)
        self._lock = threading.RLock()
        self._inherited: list[sqlite3.Connection] = []
        self.connection: sqlite3.Connection | None = self._open()
        self._process = os.getpid()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        with self._lock:
            if self.connection is not None and self._process == os.getpid():
                self.connection.close()
            self.connection = None

    def reading(self, action: str) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """The connection, for several reads of one state."""
        return self._use(action, "DEFERRED")

    def writing(self, action: str) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """The connection, for one transaction: all of it is written, or nothing."""
        # IMMEDIATE takes the write lock at once: a lock taken half-way can't be waited for.
        return self._use(action, "IMMEDIATE")

    def size(self, connection: sqlite3.Connection) -> int:
        """Bytes of the file."""
        pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        return pages * size

    def shrink(self, action: str) -> int:
        """Give the room of removed rows back to the disk; bytes of the file after that."""
        with self._use(action, None) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return self.size(connection)

    def _open(self) -> sqlite3.Connection:
        with self._named("opening it"):
            if self.path != ":memory:":
                with self._named("making its folder"):
                    Path(self.path).parent.mkdir(parents=True, exist_ok=True)
                refuse_special(self.path)
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
        """Check the file before anything is changed in it; make its tables where it is new."""
        # An untrusted file may come with SQL of its own, which reading or writing its tables would run.
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        with _transaction(connection, "DEFERRED"):  # another process may be making the tables
            new = not self._checked(connection)
        if self.path != ":memory:" and os.path.getsize(self.path) <= _CHECKED_SIZE:
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise SavedFileError(f"{self.path}: {shown(fault)}; {_REMEDIES[sqlite3.SQLITE_CORRUPT]}")
        if new:
            with _transaction(connection, "IMMEDIATE"):
                if not self._checked(connection):  # another process may have been faster
                    _make_tables(connection)
        mode = self._write_ahead(connection)
        # With a write-ahead log, NORMAL can lose the last batches to a power cut, never to a kill, and stays sound.
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")

    def _checked(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has a store's tables, and nothing else; False while it is empty."""
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return False
        if not {"meta", "fingerprints", "scores", "texts"} <= tables:
            raise SavedFileError(
                f"{self.path}: this SQLite file is not a score store (it has the tables "
                f"{shown(', '.join(sorted(tables)))}); give another path"
            )
        found = connection.execute("SELECT value FROM meta WHERE name = 'format_version'").fetchone()
        if found != (_FORMAT_VERSION,):
            raise SavedFileError(
                f"{self.path}: expected format version {_FORMAT_VERSION}, got {shown(found[0] if found else None)}; "
                "use the version of drum-hf that wrote it, or give another path"
            )
        strange = connection.execute(
            "SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR (type = 'index' AND "
            "sql IS NOT NULL) OR sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
        ).fetchone()
        with contextlib.closing(sqlite3.connect(":memory:")) as sound:
            _make_tables(sound)
            for table in _TABLES:
                columns = f"PRAGMA table_xinfo({table})"
                if strange is None and connection.execute(columns).fetchall() != sound.execute(columns).fetchall():
                    strange = ("table", table)
        if strange is not None:
            raise SavedFileError(
                f"{self.path}: its {strange[0]} {shown(strange[1])!r} is none that drum-hf made; do not use this "
                "file, or export its scores where it comes from and import them"
            )
        return True

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
    def _use(self, action: str, mode: str | None) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time, in a transaction of a mode."""
        with self._lock:
            if self.connection is None:
                raise ValueError(f"{self.path}: the store was closed; open a new ScoreStore")
            if self._process != os.getpid() and self.path != ":memory:":
                # A connection must not cross a fork; nor be closed by the child, which would drop the parent's locks.
                self._inherited.append(self.connection)
                self.connection = self._open()
                self._process = os.getpid()
            with (
                self._named(action),
                _transaction(self.connection, mode) if mode is not None else contextlib.nullcontext(),
            ):
                yield self.connection

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
            raise SavedFileError(f"{shown(self.path)}: {action} failed: {shown(error)}; {remedy}") from error


def _make_tables(connection: sqlite3.Connection) -> None:
    for table, columns in _TABLES.items():
        connection.execute(f"CREATE TABLE {table} ({columns}){' WITHOUT ROWID' if table in _BY_KEY else ''}")
    connection.execute("INSERT INTO meta (name, value) VALUES ('format_version', ?)", (_FORMAT_VERSION,))


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, mode: str) -> Iterator[None]:
    connection.execute(f"BEGIN {mode}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise
