"""A table's own parquet file: written whole, read with each row compared with its hashes, and mapped where asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ImageError, SavedFileError
from ..types import content_key
from ..utils.files import checksum, plain_schema, read_batches, replacing_file, writing
from .images import CHUNK, decode_as, image_column, image_dataset
from .rows import COLUMNS, MappedRecords, Record, Records, arrow_rows, fingerprint_of, ids_of

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["SavedTable", "map_table", "read_saved_table", "write_table"]

FORMAT_VERSION = 1
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
    max_pixels: int,
    files: Sequence[Path] = (),
) -> None:
    """Write a table; with `references`, the images' names relative to a folder in place of their bytes.

    Args:
        max_pixels: of the pictures, which are compared with their hashes where they may have changed since the rows
            were checked: they are files, or come from saved tables.
        files: these saved tables.

    Raises:
        ImageError: a picture is gone, or another than its hash says.
    """
    import pyarrow.parquet as pq

    compared: set[tuple[str, bytes]] = set()  # a picture with twenty questions is decoded once

    def whole(record: Record, source: dict[str, Any]) -> dict[str, Any] | None:
        image = _whole_image(record, source)
        if image is not None and (files or source["bytes"] is None):
            seen = record.image_key, hashlib.sha256(image["bytes"]).digest()
            if seen not in compared:
                where = source["path"] if source["bytes"] is None else ", ".join(map(str, files))
                decode_as(image, record.image_key, id=record.id, max_pixels=max_pixels, where=where)
                compared.add(seen)
        return image

    schema = saved_schema(fingerprint, by_reference=references is not None)
    with (
        replacing_file(file) as partial,
        pq.ParquetWriter(partial, schema) as writer,
        ThreadPoolExecutor(4) as decoders,
    ):
        for start in range(0, len(records), CHUNK):
            chunk = slice(start, start + CHUNK)
            stored = list(decoders.map(whole, records[chunk], images[chunk]["image"]))
            if references is not None:
                stored = [name and {"bytes": None, "path": name} for name in references[chunk]]  # type: ignore
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
    images = "reference" if by_reference else "embedded"
    about = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "images": images}
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


# Reading


class SavedTable(NamedTuple):
    """A table as it was saved.

    Attributes:
        images: of the same rows, undecoded.
        fingerprint: of the records.
        by_reference: images are files beside the table.
    """

    records: Records
    images: datasets.Dataset
    fingerprint: str
    by_reference: bool


def read_saved_table(file: Path, image_root: str | os.PathLike[str] | None = None) -> SavedTable:
    """Read a table into memory; errors as of `TripletTable.load`."""
    import pyarrow as pa

    records: list[Record] = []
    chunks: list[pa.Array] = []
    with _opened(file) as saved:
        for some, images in saved.batches(image_root):
            records += some
            chunks.append(images)
        column = pa.chunked_array(chunks, type=saved.schema.field("image").type)
    saved.refuse_other_rows(records)
    images = image_dataset(column, fingerprint=content_key(*(record.key for record in records)))
    return SavedTable(records, images, saved.about["fingerprint"], saved.by_reference)


def map_table(
    file: Path, image_root: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> SavedTable:
    """Copy a table, row by row, to an Arrow file that can be mapped, and map it.

    Args:
        cache_dir: where the Arrow file is looked for, and left for the next time; None: where `datasets` has its own.

    Raises:
        SavedFileError: as of `TripletTable.load`; or the Arrow file can't be written.
    """
    import datasets
    import pyarrow as pa

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "drum_hf")
    with _opened(file) as saved:
        name = checksum(file)
        if saved.by_reference:  # the Arrow file says where on this machine the pictures are
            name += f"-{content_key(os.path.realpath(image_root or '.'))[:16]}"
        copy = folder / f"{name}.arrow"
        with contextlib.suppress(OSError, pa.ArrowException, ValueError, KeyError):  # there is none, or a broken one
            return _mapped(copy)
        with replacing_file(copy) as partial:
            _copy(saved, image_root, partial)
            saved.refuse_other_rows(_mapped(partial).records)
    return _mapped(copy)


def _copy(saved: _Saved, image_root: str | os.PathLike[str] | None, file: Path) -> None:
    import datasets
    import pyarrow as pa
    from tqdm.auto import tqdm

    texts = MappedRecords.features()
    schema = datasets.Features(texts | {"image": datasets.Image(decode=False)}).arrow_schema
    about = {"fingerprint": saved.about.get("fingerprint"), "by_reference": saved.by_reference}
    schema = schema.with_metadata({**schema.metadata, b"drum_hf": json.dumps(about).encode()})
    bar = tqdm(total=saved.parquet.metadata.num_rows, desc="copying rows to be mapped", unit="row", delay=2)
    with bar, writing(file), pa.OSFile(os.fspath(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for records, images in saved.batches(image_root):
            rows = arrow_rows(records, texts.arrow_schema).append_column(schema.field("image"), images)
            writer.write_table(rows)
            bar.update(len(records))


def _mapped(copy: Path) -> SavedTable:
    import datasets
    import pyarrow as pa

    with pa.OSFile(os.fspath(copy)) as file, pa.ipc.open_stream(file) as stream:
        about = saved_about(stream.schema)
    rows = datasets.Dataset.from_file(os.fspath(copy))
    return SavedTable(MappedRecords(rows), rows.select_columns(["image"]), about["fingerprint"], about["by_reference"])


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[_Saved]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise altered(file, "found no such file")
    with contextlib.ExitStack() as stack:
        try:
            parquet = stack.enter_context(pq.ParquetFile(os.fspath(file)))
            schema = plain_schema(parquet.schema_arrow)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(file, error) from error
        yield _Saved(file, parquet, schema)


class _Saved:
    """A table's file, opened: its columns are a table's, its rows are yet to be looked at."""

    def __init__(self, file: Path, parquet: pq.ParquetFile, schema: pa.Schema) -> None:
        self.file, self.parquet, self.schema, self.about = file, parquet, schema, saved_about(schema)
        version = self.about.get("format_version")
        if version != FORMAT_VERSION:
            raise altered(file, f"format version {FORMAT_VERSION}, found {version or 'none'}")
        expected = saved_schema()
        if [(f.name, f.type) for f in schema] != [(f.name, f.type) for f in expected]:
            raise altered(file, f"with the columns {', '.join(expected.names)}, found {', '.join(schema.names)}")
        self.by_reference = self.about.get("images") == "reference"

    def batches(self, image_root: str | os.PathLike[str] | None) -> Iterator[tuple[list[Record], pa.Array]]:
        """Some records at a time, and their undecoded images; each is what was saved."""
        import pyarrow.compute as pc

        texts = [name for name in self.schema.names if name != "image"]
        row = 0
        for batch in self._read():
            images = batch.column("image")
            has_image = pc.struct_field(images, "path" if self.by_reference else "bytes").is_valid().to_pylist()
            records = []
            for values, pictured in zip(batch.select(texts).to_pylist(), has_image, strict=True):
                record = _saved_record(values)
                if record is None or pictured != bool(record.image_key):
                    raise altered(
                        self.file, f"found row {row} (id {values['id']!r}) altered: its hash is of other content"
                    )
                records.append(record)
                row += 1
            if self.by_reference:
                images = image_column(_referred(self.file, images, image_root)).combine_chunks()
            yield records, images

    def _read(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        batches = read_batches(self.file, self.parquet)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _unreadable(self.file, error) from error
            yield batch

    def refuse_other_rows(self, records: Records) -> None:
        """Refuse rows that are each as they were saved, but not the same ones in the same order."""
        if len(set(ids_of(records))) < len(records):
            raise altered(self.file, "found an id twice")
        if self.about.get("fingerprint") != fingerprint_of(records):
            raise altered(self.file, "found rows or groups added, removed or moved since")


def _referred(file: Path, images: pa.Array, image_root: str | os.PathLike[str] | None) -> list[dict[str, Any] | None]:
    """Images as paths on this machine, each of which is a file in `image_root`."""
    names: Sequence[str | None] = [image and image["path"] for image in images.to_pylist()]
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
        if path and not is_in(path, root):
            raise altered(file, f"found an image reference that leaves image_root: {name!r}")
        if path and not os.path.isfile(path):
            raise SavedFileError(
                f"{file}: it refers to the image {name!r}, and there is no such file in {root}; pass image_root= with "
                "the folder that holds it"
            )
        found.append({"bytes": None, "path": path} if path else None)
    return found


def _saved_record(values: dict[str, Any]) -> Record | None:
    """The row's record; None where a cell is empty, or texts and hashes disagree."""
    try:
        cells = {field: values[stored_name(field)] for field in Record._fields}
        record = Record(**cells | {"references": tuple(values["references"])})
        same = record.key == content_key(record.image_key, record.prompt, record.response)
        same = same and record.query_key == content_key(record.image_key, record.prompt)
    except (AttributeError, TypeError):  # None where a text or a list should be
        return None
    return record if same and record.id else None


def _unreadable(file: Path, error: Exception) -> SavedFileError:
    return altered(file, f"found one that parquet can't read, cut short perhaps ({error})")
