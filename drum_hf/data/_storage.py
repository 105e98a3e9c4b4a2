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
from ._images import CHUNK, image_column, image_dataset
from ._rows import Record

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

#: 2 has names of image files in place of their bytes; it is written only where that was asked for.
_FORMAT_VERSION, _BY_REFERENCE = 1, 2
_FILE_NAME = "triplets.parquet"


def table_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".parquet" else file / _FILE_NAME


def write_table(
    file: Path,
    records: Sequence[Record],
    images: datasets.Dataset,
    *,
    fingerprint: str,
    references: Sequence[str | None] | None = None,
) -> None:
    """Write a table; with `references`, the images' names relative to a folder in place of their bytes."""
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    schema = _schema(fingerprint, by_reference=references is not None)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(records), CHUNK):
                chunk = slice(start, start + CHUNK)
                if references is None:
                    stored = map(_whole_image, records[chunk], images[chunk]["image"])
                else:
                    stored = (name and {"bytes": None, "path": name} for name in references[chunk])  # type: ignore
                writer.write_table(_arrow(records[chunk], stored, schema))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_table(
    file: Path, image_root: str | os.PathLike[str] | None = None
) -> tuple[list[Record], datasets.Dataset, str | None, bool]:
    """Records, undecoded images, the fingerprint that `write_table` was given, and whether images are references."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not file.is_file():
        raise altered(file, "found no such file")
    try:
        table = read_parquet(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise altered(file, f"found one that parquet can't read, cut short perhaps ({error})") from error
    about = saved_about(table.schema)
    if about.get("format_version") not in (_FORMAT_VERSION, _BY_REFERENCE):
        raise altered(
            file, f"format version {_FORMAT_VERSION} or {_BY_REFERENCE}, found {about.get('format_version', 'none')}"
        )
    expected = _schema()
    if [(f.name, f.type) for f in table.schema] != [(f.name, f.type) for f in expected]:
        columns = ", ".join(expected.names)
        raise altered(file, f"with the columns {columns}, found {', '.join(table.schema.names)}")
    by_reference = about["format_version"] == _BY_REFERENCE
    kept = "path" if by_reference else "bytes"
    has_image = [
        valid for chunk in table["image"].chunks for valid in pc.struct_field(chunk, kept).is_valid().to_pylist()
    ]
    records = []
    for row, values in enumerate(table.drop_columns(["image"]).to_pylist()):
        record = _saved_record(values)
        if record is None or has_image[row] != bool(record.image_key):
            raise altered(file, f"found row {row} (id {values['id']!r}) altered: its hash is of other content")
        records.append(record)
    if len({record.id for record in records}) < len(records):
        raise altered(file, "found an id twice")
    column = table["image"]
    if by_reference:
        column = image_column(_referred(file, column, image_root))
    images = image_dataset(column, fingerprint=content_key(*(record.key for record in records)))
    return records, images, about.get("fingerprint"), by_reference


def image_references(
    records: Sequence[Record], images: datasets.Dataset, image_root: str | os.PathLike[str] | None
) -> list[str | None]:
    """Each row's image as a name relative to `image_root`, or to the innermost folder that holds them all.

    Raises:
        ImageError: an image is not a file, or lies outside the folder.
    """
    paths: list[str | None] = []
    for record, source in zip(records, images["image"], strict=True):
        found = source["path"] if record.image_key and source["bytes"] is None else None
        if record.image_key and not found:
            raise ImageError(
                f"id {record.id!r}, column 'image': expected an image file to refer to, the table holds the picture "
                "itself; save with images='embedded', or make the table from paths"
            )
        paths.append(os.path.abspath(found) if found else None)
    folders = {os.path.dirname(path) for path in paths if path}
    root = os.path.abspath(image_root) if image_root is not None else os.path.commonpath(folders) if folders else ""
    named = [Path(path).relative_to(root).as_posix() if path and _is_in(path, root) else None for path in paths]
    for record, path, name in zip(records, paths, named, strict=True):
        if path and name is None:
            raise ImageError(f"id {record.id!r}, column 'image': {path} is not in image_root {root}; give its folder")
    return named


def _is_in(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _referred(
    file: Path, column: pa.ChunkedArray, image_root: str | os.PathLike[str] | None
) -> list[dict[str, Any] | None]:
    """The images as paths on this machine, each of which is a file in `image_root`."""
    names = [image and image["path"] for image in column.to_pylist()]
    first = next((name for name in names if name), None)
    if first is not None and image_root is None:
        raise SavedFileError(
            f"{file}: its images are referred to, such as {first!r}, and not in it; pass image_root= with the folder "
            "that holds them"
        )
    root = os.path.realpath(image_root or ".")
    found: list[dict[str, Any] | None] = []
    for name in names:
        if name and "\0" in name:
            raise altered(file, f"found an image reference that is no path: {name!r}")
        path = os.path.realpath(os.path.join(root, name)) if name else None
        if path and not _is_in(path, root):
            raise altered(file, f"found an image reference that leaves image_root: {name!r}")
        if path and not os.path.isfile(path):
            raise SavedFileError(
                f"{file}: it refers to the image {name!r}, and there is no such file in {root}; pass image_root= with "
                "the folder that holds it"
            )
        found.append({"bytes": None, "path": path} if path else None)
    return found


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


def _schema(fingerprint: str = "", *, by_reference: bool = False) -> pa.Schema:
    import datasets

    text = datasets.Value("string")
    features: dict[str, Any] = dict.fromkeys((*COLUMNS, *map(_stored_name, Record._fields)), text)
    features |= {"image": datasets.Image(), "references": datasets.List(text)}
    schema = datasets.Features(features).arrow_schema
    about: dict[str, Any] = {"format_version": _FORMAT_VERSION, "fingerprint": fingerprint}
    if by_reference:  # a reader of version 1 would take the rows for altered
        about |= {"format_version": _BY_REFERENCE, "images": "reference"}
    return schema.with_metadata({**schema.metadata, b"drum_hf": json.dumps(about).encode()})


def _stored_name(field: str) -> str:
    # Underscored: the hashes are the table's own, not columns for its readers.
    return f"_{field}" if field.endswith("key") else field


def _arrow(records: Iterable[Record], images: Iterable[dict[str, Any] | None], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    rows = []
    for record, image in zip(records, images, strict=True):
        row = {_stored_name(field): value for field, value in record._asdict().items()}
        rows.append(row | {"image": image})
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
