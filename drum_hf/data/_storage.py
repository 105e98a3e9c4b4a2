"""A table's parquet file: written whole, checked against its hashes when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import read_parquet
from ..errors import ImageError, SavedFileError
from ..types import content_key
from ._columns import COLUMNS
from ._images import CHUNK, image_dataset
from ._rows import Record

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_FORMAT_VERSION = 1
_FILE_NAME = "triplets.parquet"


def table_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".parquet" else file / _FILE_NAME


def write_table(file: Path, records: Sequence[Record], images: datasets.Dataset, *, fingerprint: str) -> None:
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    schema = _schema(fingerprint)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(records), CHUNK):
                chunk = slice(start, start + CHUNK)
                writer.write_table(_arrow(records[chunk], images[chunk]["image"], schema))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_table(file: Path) -> tuple[list[Record], datasets.Dataset, str | None]:
    """Records, undecoded images, and the fingerprint that `write_table` was given."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not file.is_file():
        raise altered(file, "found no such file")
    try:
        table = read_parquet(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise altered(file, f"found one that parquet can't read, cut short perhaps ({error})") from error
    about = saved_about(table.schema)
    if about.get("format_version") != _FORMAT_VERSION:
        raise altered(file, f"format version {_FORMAT_VERSION}, found {about.get('format_version', 'none')}")
    expected = _schema()
    if [(f.name, f.type) for f in table.schema] != [(f.name, f.type) for f in expected]:
        columns = ", ".join(expected.names)
        raise altered(file, f"with the columns {columns}, found {', '.join(table.schema.names)}")
    has_bytes = [
        valid for chunk in table["image"].chunks for valid in pc.struct_field(chunk, "bytes").is_valid().to_pylist()
    ]
    records = []
    for row, values in enumerate(table.drop_columns(["image"]).to_pylist()):
        record = _saved_record(values)
        if record is None or has_bytes[row] != bool(record.image_key):
            raise altered(file, f"found row {row} (id {values['id']!r}) altered: its hash is of other content")
        records.append(record)
    if len({record.id for record in records}) < len(records):
        raise altered(file, "found an id twice")
    images = image_dataset(table["image"], fingerprint=content_key(*(record.key for record in records)))
    return records, images, about.get("fingerprint")


def altered(file: Path, problem: str) -> SavedFileError:
    return SavedFileError(
        f"{file}: expected a table written by TripletTable.save, {problem}; save the table again, or read your own "
        "file with drum_hf.data.load_table"
    )


def saved_about(schema: pa.Schema) -> dict[str, Any]:
    """What `write_table` noted in the file's metadata; {} in a file that it didn't write."""
    try:
        about = json.loads((schema.metadata or {})[b"drum_hf"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _schema(fingerprint: str = "") -> pa.Schema:
    import datasets

    text = datasets.Value("string")
    features: dict[str, Any] = dict.fromkeys((*COLUMNS, *map(_stored_name, Record._fields)), text)
    features |= {"image": datasets.Image(), "references": datasets.List(text)}
    schema = datasets.Features(features).arrow_schema
    about = json.dumps({"format_version": _FORMAT_VERSION, "fingerprint": fingerprint})
    return schema.with_metadata({**schema.metadata, b"drum_hf": about.encode()})


def _stored_name(field: str) -> str:
    # Underscored: the hashes are the table's own, not columns for its readers.
    return f"_{field}" if field.endswith("key") else field


def _arrow(records: Iterable[Record], sources: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    rows = []
    for record, source in zip(records, sources, strict=True):
        row = {_stored_name(field): value for field, value in record._asdict().items()}
        rows.append(row | {"image": _whole_image(record, source)})
    return pa.Table.from_pylist(rows, schema=schema)


def _whole_image(record: Record, source: dict[str, Any]) -> dict[str, Any] | None:
    """The image's bytes, read from its file where the table holds a path."""
    if not record.image_key:
        return None
    data, name = source["bytes"], source["path"]
    if data is None:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise ImageError(
                f"id {record.id!r}, column 'image': {name} was readable when the table was made and no longer is "
                f"({error.strerror}); put it back, or drop the row with .without([id])"
            ) from error
    # The name alone: folders of the machine that saved are nobody else's business.
    return {"bytes": data, "path": os.path.basename(name) if name else None}


def _saved_record(values: dict[str, Any]) -> Record | None:
    """The row's record; None where a cell is empty, or texts and hashes disagree."""
    try:
        cells = {field: values[_stored_name(field)] for field in Record._fields}
        record = Record(**cells | {"references": tuple(values["references"])})
        same = record.key == content_key(record.image_key, record.prompt, record.response)
        same = same and record.query_key == content_key(record.image_key, record.prompt)
    except (AttributeError, TypeError):  # None where a text or a list should be
        return None
    return record if same and record.id else None
