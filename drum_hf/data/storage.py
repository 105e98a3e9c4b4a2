"""A table's parquet file: what is in it, and how it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, SavedFileError
from ..utils.files import replacing_file
from .columns import COLUMNS
from .images import CHUNK
from .records import Record, Records

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

#: 2 has names of image files in place of their bytes; it is written only where that was asked for.
FORMAT_VERSION, BY_REFERENCE = 1, 2
_FILE_NAME = "triplets.parquet"


def table_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".parquet" else file / _FILE_NAME


def write_table(
    file: Path,
    records: Records,
    images: datasets.Dataset,
    *,
    fingerprint: str,
    references: Sequence[str | None] | None = None,
) -> None:
    """Write a table; with `references`, the images' names relative to a folder in place of their bytes."""
    import pyarrow.parquet as pq

    schema = saved_schema(fingerprint, by_reference=references is not None)
    with replacing_file(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(records), CHUNK):
            chunk = slice(start, start + CHUNK)
            if references is None:
                stored = map(_whole_image, records[chunk], images[chunk]["image"])
            else:
                stored = (name and {"bytes": None, "path": name} for name in references[chunk])  # type: ignore
            writer.write_table(_arrow(records[chunk], stored, schema))


def image_references(
    records: Records, images: datasets.Dataset, image_root: str | os.PathLike[str] | None
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
    named = [Path(path).relative_to(root).as_posix() if path and is_in(path, root) else None for path in paths]
    for record, path, name in zip(records, paths, named, strict=True):
        if path and name is None:
            raise ImageError(f"id {record.id!r}, column 'image': {path} is not in image_root {root}; give its folder")
    return named


def is_in(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


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


def saved_schema(fingerprint: str = "", *, by_reference: bool = False) -> pa.Schema:
    import datasets

    text = datasets.Value("string")
    features: dict[str, Any] = dict.fromkeys((*COLUMNS, *map(stored_name, Record._fields)), text)
    features |= {"image": datasets.Image(), "references": datasets.List(text)}
    schema = datasets.Features(features).arrow_schema
    about: dict[str, Any] = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint}
    if by_reference:  # a reader of version 1 would take the rows for altered
        about |= {"format_version": BY_REFERENCE, "images": "reference"}
    return schema.with_metadata({**schema.metadata, b"drum_hf": json.dumps(about).encode()})


def stored_name(field: str) -> str:
    # Underscored: the hashes are the table's own, not columns for its readers.
    return f"_{field}" if field.endswith("key") else field


def _arrow(records: Iterable[Record], images: Iterable[dict[str, Any] | None], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    rows = []
    for record, image in zip(records, images, strict=True):
        row = {stored_name(field): value for field, value in record._asdict().items()}
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
