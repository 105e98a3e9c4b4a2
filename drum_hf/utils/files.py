"""Untrusted files are read within bounds, and files and folders are replaced whole.

Reading: links stay in their folder, JSON, parquet and YAML can't swell in memory. Writing: a reader, or a kill at any
moment, finds the old content or the new.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import SavedFileError
from .text import shown

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "check_extent",
    "check_name",
    "check_size",
    "checksum",
    "leads_outside",
    "most_content",
    "plain_schema",
    "read_batches",
    "read_folder",
    "read_json",
    "read_parquet",
    "read_yaml",
    "refuse_outside",
    "refuse_special",
    "replacing_file",
    "replacing_folder",
    "settled",
    "write_text",
    "writing",
]

Result = TypeVar("Result")

#: Rows read together: an image column's batch then stays far below Arrow's 2 GB an array.
_ROWS = 256
#: A parquet file may hold, in memory, so many times its own size, and so much in any case (bytes; our choice: tables
#: of ours take up to a dozen times their size, a column of one repeated text may take hundreds).
_SWELL, _FREE = 100, 256 << 20
#: In a whole YAML file; our choice, thousands of times what a configuration has.
_MOST_VALUES = 1_000_000
#: Bytes of a JSON file that describes something else; our choice, a hundred times what one has.
_MOST_JSON = 16 << 20
#: A save is written to a file or folder of this name and 16 hex digits, beside what it will replace.
_PARTIAL = ".saving-"
#: Names the folder that holds a complete save, from the moment it counts until it has been moved into place.
_MARKER = ".saved"
_LOCK = ".saving.lock"
#: Of the file beside the folder of a save, which is locked for as long as its writer lives.
_ALIVE = ".alive"
#: Seconds that a save waits for another that moves its files into the same folder, and how often a reader begins anew.
_PATIENCE, _ATTEMPTS = 60.0, 20


def leads_outside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path's links lead out of the folder.

    The Hub's cache is no way out: there a snapshot's files are links to the same repository's `blobs`.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return False
    at = next((i for i, part in reversed(list(enumerate(root.parts))) if part == "snapshots"), None)
    return at is None or not real.is_relative_to(Path(*root.parts[:at], "blobs"))


def refuse_outside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Raise SavedFileError where a file or folder found in `folder` is a link that leads out of it."""
    if leads_outside(path, folder):
        raise SavedFileError(
            f"{os.fspath(path)}: it is a link that leaves the folder; pass what it leads to, or copy that here"
        )


def checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """A file's columns as its rows hold them: a dictionary would hide how much its rows take, one by one.

    Views, which most readers don't know, are texts and lists.
    """
    import pyarrow as pa

    return pa.schema([f.with_type(_plain_type(f.type)) for f in schema], metadata=schema.metadata)


def _plain_type(type: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    is_a = pa.types
    views = {"string_view": pa.string, "binary_view": pa.binary}
    if is_a.is_dictionary(type):
        return _plain_type(type.value_type)
    if str(type) in views:
        return views[str(type)]()
    if is_a.is_struct(type):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in type])
    if is_a.is_large_list(type) or str(type).startswith("large_list_view<"):
        return pa.large_list(type.value_field.with_type(_plain_type(type.value_type)))
    if is_a.is_list(type) or str(type).startswith("list_view<"):
        return pa.list_(type.value_field.with_type(_plain_type(type.value_type)))
    return type


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise SavedFileError where a path is not UTF-8, which tokenizers, Arrow and SQLite can't name, or holds NUL."""
    name = os.fsdecode(path)
    if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise SavedFileError(f"expected a path in UTF-8 without NUL, got '{shown(name)}'; rename it, or give another")


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raise OSError where a pipe, a device or a folder stands for a file: reading it might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)} is no file")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file or folder in what goes wrong with the disk while it is written.

    Raises:
        SavedFileError: the disk is full, or the place can't be written.
    """
    from safetensors import SafetensorError

    check_name(path)
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(
            f"{os.fspath(path)}: writing it failed ({error}); free space on the disk, or give a place that can be "
            "written"
        ) from error


def read_json(file: str | os.PathLike[str], *, limit: int = _MOST_JSON) -> Any:
    """What a JSON file of at most `limit` bytes holds.

    Raises:
        OSError, ValueError: it can't be read, is too large or too deep; the message says which.
    """
    refuse_special(file)
    with open(file, "rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"expected at most {limit:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# Writing


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, of the same suffix; when the block ends well, the file replaces the one at `path` at once.

    A kill at any moment leaves the old file whole; what it leaves beside it goes with the next save in that folder.

    Raises:
        SavedFileError: the disk is full, or the place can't be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.json"
        >>> with replacing_file(path) as partial:
        ...     _ = partial.write_text("[1, 2]")
        >>> path.read_text()
        '[1, 2]'
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_files(path.parent)
        partial, descriptor = _claim(path.parent, path.suffix)
        try:
            yield partial
            os.fsync(descriptor)
            os.replace(partial, path)
        finally:
            _unlock(descriptor)
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, in place of an earlier one at once; see `replacing_file`.

    Half surrogate pairs, such as those of a file name that is not UTF-8, become "?".

    Raises:
        SavedFileError: the disk is full, or the place can't be written.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike[str], *, owns: Sequence[str]) -> Iterator[Path]:
    """An empty folder to write into; when the block ends well, its files replace an earlier save's, all at once.

    The new files are first written to a folder within `folder`. A marker file, written last, makes it the one that
    `read_folder` reads; then its files are moved into place and the marker is removed. A save that is killed before
    the marker is written leaves the old files, one that is killed later is read from its own folder; the next save
    removes what is left. Savers of one folder take turns to move their files, those of other processes too; the last
    one's stay.

    Args:
        folder: made where it is missing.
        owns: patterns for the names, at the top of the folder, that such a save may consist of. What an earlier save
            left under them and this one did not write is removed; all other files stay.

    Raises:
        SavedFileError: the disk is full, the place can't be written, or another process keeps on writing it.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            _clean_folders(folder)
            _clean_files(folder)
            held, alive = _claim(folder, _ALIVE)
            partial = held.with_suffix("")
            partial.mkdir()
        try:
            yield partial
            made = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            for inner in made:
                _flush(partial / inner)
            with _exclusive(folder):
                earlier = _marked(folder)
                for inner in made:
                    _refuse_obstacle(folder, inner)
                write_text(folder / _MARKER, partial.name)
                _move_into_place(partial, folder, made, owns)
                (folder / _MARKER).unlink()
                if earlier is not None:
                    shutil.rmtree(earlier, ignore_errors=True)
        finally:
            if _marked(folder) != partial:
                shutil.rmtree(partial, ignore_errors=True)
            held.unlink(missing_ok=True)
            _unlock(alive)


def read_folder(folder: str | os.PathLike[str], key: str, read: Callable[[Path], Result]) -> Result:
    """What `read` makes of the complete save in a folder that `replacing_folder` writes.

    It is called again where the folder was saved anew meanwhile, so that what it gives is all of one save.

    Args:
        key: a file that every save of this kind writes.
        read: is given the folder that holds the files; fails where they don't fit one another.

    Raises:
        SavedFileError: it was saved anew each time; or whatever `read` raises.
    """
    folder = Path(folder)
    for attempt in range(_ATTEMPTS):
        with contextlib.ExitStack() as stack:
            if attempt > 1:  # have the savers wait, where that is possible
                with contextlib.suppress(OSError):
                    stack.enter_context(_exclusive(folder))
            before = _state(folder, key)
            try:
                result = read(_marked(folder) or folder)
            except Exception:
                if _state(folder, key) == before:
                    raise
                continue
            if _state(folder, key) == before:
                return result
    raise SavedFileError(f"{folder}: it was saved anew each of the {_ATTEMPTS} times it was read; try again later")


def settled(folder: str | os.PathLike[str]) -> Path:
    """The folder with the files of the last save by `replacing_folder`: another one where that was killed late."""
    return _marked(Path(folder)) or Path(folder)


def _is_partial(name: str) -> bool:
    return re.fullmatch(re.escape(_PARTIAL) + r"[0-9a-f]{16}(\.\w+)?", name) is not None


def _marked(folder: Path) -> Path | None:
    """The folder of a save that is complete but not in place yet."""
    try:
        refuse_special(folder / _MARKER)
        with open(folder / _MARKER, encoding="utf-8", errors="replace") as file:
            name = file.read(64)
    except OSError:
        return None
    place = folder / name
    return place if _is_partial(name) and place.is_dir() and not place.is_symlink() else None


def _state(folder: Path, key: str) -> Any:
    """Changes with each save, when it begins to count and when it is in place."""
    try:
        about = os.stat(folder / key)
        found = about.st_ino, about.st_mtime_ns, about.st_size
    except (OSError, ValueError):
        found = None
    return _marked(folder), found


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _refuse_obstacle(folder: Path, name: Path) -> None:
    """Raise OSError where the file can't be put: before the save counts, rather than after."""
    for above in list(name.parents)[:-1]:
        place = folder / above
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise OSError(f"{place} is a link or a file, expected a folder")
    if (folder / name).is_dir() and not (folder / name).is_symlink():
        raise OSError(f"{folder / name} is a folder, expected a file")


def _move_into_place(partial: Path, folder: Path, made: Sequence[Path], owns: Sequence[str]) -> None:
    """Put the files of a complete save where they belong, in which it stays complete, and remove an earlier one's."""
    beside = partial / f"{_PARTIAL}{secrets.token_hex(8)}"
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(partial / name, beside)
        except OSError:  # a file system without links
            shutil.copy2(partial / name, beside)
        os.replace(beside, folder / name)
    for top in os.listdir(folder):
        if not any(fnmatch.fnmatchcase(top, pattern) for pattern in owns):
            continue
        if (folder / top).is_dir() and not (folder / top).is_symlink():
            for place, _, files in os.walk(folder / top, topdown=False):
                for file in files:
                    if Path(place, file).relative_to(folder) not in made:
                        Path(place, file).unlink()
                with contextlib.suppress(OSError):  # files of this save are in it
                    os.rmdir(place)
        elif Path(top) not in made:
            (folder / top).unlink()


def _claim(folder: Path, suffix: str) -> tuple[Path, int]:
    """A new partial file, and its descriptor with the lock that tells others that its writer lives."""
    while True:
        path = folder / f"{_PARTIAL}{secrets.token_hex(8)}{suffix}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _try_lock(descriptor) and path.exists():  # nobody took it for left over meanwhile
            return path, descriptor
        _unlock(descriptor)


def _clean_folders(folder: Path) -> None:
    """Remove what savers that have gone left, unless it is a complete save that has not been moved into place."""
    complete = _marked(folder)
    for name in os.listdir(folder):
        place = folder / name
        if not _is_partial(name) or place == complete or not place.is_dir() or place.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(f"{place}{_ALIVE}", os.O_RDWR)
            gone = _try_lock(descriptor)
            _unlock(descriptor)
            if not gone:
                continue
        shutil.rmtree(place, ignore_errors=True)


def _clean_files(folder: Path) -> None:
    """Remove partial files whose writers have gone."""
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if _is_partial(entry.name) and entry.is_file(follow_symlinks=False)]
    for path in left:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _try_lock(descriptor):
                    os.unlink(path)
            finally:
                _unlock(descriptor)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process and thread at a time; the lock of one that was killed is free.

    Raises:
        SavedFileError: another has held it for too long.
        OSError: the folder can't be written.
    """
    path, end = folder / _LOCK, time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            mine = _try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:  # the one before removed it
            mine = False
        if mine:
            break
        _unlock(descriptor)
        if time.monotonic() > end:
            raise SavedFileError(
                f"{folder}: another process has been saving there for {_PATIENCE:.0f} seconds; end it, or try again "
                "later"
            )
        time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _unlock(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether nobody else holds the file's lock; it is then held here until `_unlock`."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # or there are no locks at all
    return True


def _unlock(descriptor: int) -> None:
    """Close the file; its lock goes with it, also where a forked process holds the file open."""
    with contextlib.suppress(OSError):
        if os.name != "nt":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


# Parquet and YAML


def check_size(file: str | os.PathLike[str], parquet: pq.ParquetFile) -> int:
    """How many bytes the file's content may take in memory.

    Raises:
        ValueError: by its own account it takes more.
    """
    most = most_content(file)
    meta = parquet.metadata
    stated = sum(meta.row_group(number).total_byte_size for number in range(meta.num_row_groups))
    if stated > most:
        raise _swells(file, most)
    return most


def read_batches(
    file: str | os.PathLike[str], parquet: pq.ParquetFile, *, group: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows, or those of one row group, some at a time.

    Raises:
        ValueError: they take far more memory than the file's size lets expect.
    """
    most, meta = check_size(file, parquet), parquet.metadata
    groups = list(range(meta.num_row_groups)) if group is None else [group]
    sizes = [
        meta.row_group(number).column(column).total_uncompressed_size
        for number in groups
        for column in range(meta.num_columns)
    ]
    # One value may stand, compressed to nearly nothing, in every row of a batch.
    rows = max(1, min(_ROWS, most // max([1, *sizes])))
    read = 0
    schema = plain_schema(parquet.schema_arrow)
    for batch in parquet.iter_batches(batch_size=rows, row_groups=groups):
        batch = batch.cast(schema)
        read += batch.nbytes
        if read > most:
            raise _swells(file, most)
        yield batch


def read_parquet(file: str | os.PathLike[str]) -> pa.Table:
    """A parquet file in memory, with the metadata of its schema.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: it can't be read, or takes far more memory than its size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    refuse_special(file)
    with pq.ParquetFile(os.fspath(file)) as parquet:
        table = pa.Table.from_batches(read_batches(file, parquet), schema=plain_schema(parquet.schema_arrow))
    table.validate(full=True)
    return table


def read_yaml(file: str | os.PathLike[str]) -> Any:
    """What a YAML file of plain values holds.

    Raises:
        OSError, ValueError: it can't be read, or takes far more memory than its size.
    """
    import yaml

    refuse_special(file)
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    # A value that is not what its tag says makes the parser raise nearly anything.
    except (yaml.YAMLError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    check_extent(content)
    return content


def check_extent(content: Any) -> None:
    """Raise ValueError for too many values: a few lines of YAML can stand for lists of lists that fill the memory."""
    waiting, seen = [content], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise ValueError(f"expected at most {_MOST_VALUES:,} values, aliases written out; got more")
        waiting += (
            [*one.values(), *one] if isinstance(one, Mapping) else one if isinstance(one, (list, tuple, set)) else []
        )


def most_content(file: str | os.PathLike[str]) -> int:
    """How many bytes a packed file may hold, unpacked."""
    return _FREE + _SWELL * os.path.getsize(file)


def _swells(file: str | os.PathLike[str], most: int) -> ValueError:
    return ValueError(f"{os.fspath(file)} takes more than {most / 1e6:,.0f} MB of memory once it is read")
