"""Files that a stranger may have made: links stay in their folder, parquet and YAML can't swell in memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SavedFileError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "check_extent",
    "check_size",
    "checksum",
    "leads_outside",
    "most_content",
    "plain_schema",
    "read_batches",
    "read_parquet",
    "read_yaml",
    "refuse_special",
    "writing",
]

#: Rows read together: an image column's batch then stays far below Arrow's 2 GB an array.
_ROWS = 256
#: A parquet file may hold, in memory, so many times its own size, and so much in any case (bytes; our choice: tables
#: of ours take up to a dozen times their size, a column of one repeated text may take hundreds).
_SWELL, _FREE = 100, 256 << 20
#: In a whole YAML file; our choice, thousands of times what a configuration has.
_MOST_VALUES = 1_000_000


def leads_outside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path's links lead out of the folder.

    The Hub's cache is no way out: there a snapshot's files are links to the same repository's `blobs`.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return False
    at = next((i for i, part in reversed(list(enumerate(root.parts))) if part == "snapshots"), None)
    return at is None or not real.is_relative_to(Path(*root.parts[:at], "blobs"))


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

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(
            f"{os.fspath(path)}: writing it failed ({error}); free space on the disk, or give a place that can be "
            "written"
        ) from error


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
