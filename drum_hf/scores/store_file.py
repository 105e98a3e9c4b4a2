"""The SQLite file under a `ScoreStore`: opened, checked and brought up to date, for several threads and processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import SavedFileError
from ..utils.files import refuse_special

__all__ = ["StoreFile", "transaction"]

#: What brings a file from each format version to the next; a new file goes through all of them.
_STEPS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE fingerprints (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE scores (key BLOB PRIMARY KEY, value REAL NOT NULL, fingerprint INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE texts (key BLOB PRIMARY KEY, value TEXT NOT NULL, fingerprint INTEGER NOT NULL) WITHOUT ROWID
    """,
    # What an answer is made of, by numbers: contents and lists repeat a thousandfold. Rows from before have none.
    """
    CREATE TABLE contents (number INTEGER PRIMARY KEY, value NOT NULL UNIQUE);
    CREATE TABLE lists (number INTEGER PRIMARY KEY, value TEXT NOT NULL UNIQUE);
    ALTER TABLE fingerprints ADD COLUMN details TEXT;
    ALTER TABLE scores ADD COLUMN query INTEGER;
    ALTER TABLE scores ADD COLUMN shown BLOB;
    ALTER TABLE scores ADD COLUMN responses INTEGER;
    ALTER TABLE scores ADD COLUMN weights INTEGER;
    ALTER TABLE scores ADD COLUMN choices INTEGER;
    ALTER TABLE texts ADD COLUMN query INTEGER;
    ALTER TABLE texts ADD COLUMN shown BLOB;
    ALTER TABLE texts ADD COLUMN responses INTEGER;
    ALTER TABLE texts ADD COLUMN weights INTEGER;
    ALTER TABLE texts ADD COLUMN choices INTEGER;
    ALTER TABLE texts ADD COLUMN max_new_tokens INTEGER
    """,
)
_FORMAT_VERSION = len(_STEPS)
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


class StoreFile:
    """One connection to the file, for one thread at a time, opened anew after a fork.

    Raises:
        SavedFileError: the file is not SQLite, not a score store, damaged, of a later format version, or can't be
            opened; from the methods too, where it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self._lock = threading.RLock()
        self._inherited: list[sqlite3.Connection] = []
        self._connection: sqlite3.Connection | None = self._open()
        self._process = os.getpid()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            with self._named("making its folder"):
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with self._named("opening it"):
            if self.path != ":memory:":
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
        """Check the file before anything is changed in it; make its tables, or bring them up to date."""
        # A stranger's file may come with SQL of its own, which reading or writing its tables would run.
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        with transaction(connection, "DEFERRED"):  # another process may be bringing the file up to date
            old = self._version(connection)
            if old:
                self._check_tables(connection, old)
        if self.path != ":memory:" and os.path.getsize(self.path) <= _CHECKED_SIZE:
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise SavedFileError(f"{self.path}: {' '.join(fault.split())}; {_REMEDIES[sqlite3.SQLITE_CORRUPT]}")
        if old < _FORMAT_VERSION:
            with transaction(connection):
                _upgrade(
                    connection, self._version(connection), _FORMAT_VERSION
                )  # another process may have been faster
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('format_version', ?)", (str(_FORMAT_VERSION),))
        mode = self._write_ahead(connection)
        # With a write-ahead log, NORMAL can lose the last batches to a power cut, never to a kill, and stays sound.
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")

    def _version(self, connection: sqlite3.Connection) -> int:
        """Format version of the file; 0 while it is empty."""
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return 0
        if not {"meta", "fingerprints", "scores", "texts"} <= tables:
            raise SavedFileError(
                f"{self.path}: this SQLite file is not a score store (it has the tables {', '.join(sorted(tables))}); "
                "give another path"
            )
        found = connection.execute("SELECT value FROM meta WHERE name = 'format_version'").fetchone()
        for version in range(1, _FORMAT_VERSION + 1):
            if found == (str(version),):
                return version
        raise SavedFileError(
            f"{self.path}: expected a format version of at most {_FORMAT_VERSION}, got {found[0] if found else None}; "
            "update drum-hf, or give another path"
        )

    def _check_tables(self, connection: sqlite3.Connection, version: int) -> None:
        own = connection.execute(
            "SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR (type = 'index' AND "
            "sql IS NOT NULL) OR sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
        ).fetchone()
        with contextlib.closing(sqlite3.connect(":memory:")) as sound:
            _upgrade(sound, 0, version)
            for table in ("meta", "fingerprints", "scores", "texts", "contents", "lists"):
                columns = f"PRAGMA table_xinfo({table})"
                if own is None and connection.execute(columns).fetchall() != sound.execute(columns).fetchall():
                    own = ("table", table)
        if own is not None:
            raise SavedFileError(
                f"{self.path}: its {own[0]} {own[1]!r} is none that drum-hf made; do not use this file, or export its "
                "scores where it comes from and import them"
            )

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


def _upgrade(connection: sqlite3.Connection, old: int, new: int) -> None:
    for step in _STEPS[old:new]:
        for statement in step.strip().split(";\n"):
            connection.execute(statement)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """All of it or nothing; "IMMEDIATE" to write, "DEFERRED" for several reads of one state."""
    # IMMEDIATE takes the write lock at once: a lock taken half-way can't be waited for.
    connection.execute(f"BEGIN {mode}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise
