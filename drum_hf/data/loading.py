"""Finding and reading tables: files, folders, archives, data sets of the Hub, and objects that hold rows."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..errors import ColumnError, EmptySupportError, SavedFileError
from ..types import content_key
from ..utils.files import (
    check_name,
    checksum,
    most_content,
    plain_schema,
    read_json,
    read_parquet,
    refuse_outside,
    refuse_special,
    writing,
)
from ..utils.images import FORMATS
from .rows import shorten

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from .rows import ImageRoot

    Rows: TypeAlias = Sequence[Any] | datasets.Dataset

logger = logging.getLogger(__name__)

_TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_TEXTS, ".parquet", ".arrow")
_SHOWN = ".csv, .tsv, .jsonl, .json, .parquet, .arrow, or one of the text formats as .gz"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_ID = 200
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_MOST_FILES = 1_000_000  # in an archive (our choice)


class Found(NamedTuple):
    """A table found and read, but not checked.

    Attributes:
        kind: what was found, in words.
        rows: its rows; none where it is one of our own, in the file `saved`.
        root: where image paths may lead.
        saved: the file of one of our own.
        image_root: as the user gave it.
        notes: what was left out, in words.
    """

    kind: str
    rows: Rows
    root: ImageRoot = None
    saved: Path | None = None
    image_root: Any = None
    notes: tuple[str, ...] = ()


def find_table(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_root: Any = None,
    load_options: dict[str, Any] | None = None,
    faults: list[str] | None = None,
) -> Found:
    """Find and read what `load_table` takes as a path.

    Lines of a CSV or JSONL file that can't be read raise, or are told in `faults` and left out.
    """
    local = Path(path)
    if not _exists(local):
        return _from_hub(os.fspath(path), split, image_root, load_options or {})
    check_name(path)
    if load_options:
        raise ValueError(
            f"{', '.join(load_options)}: expected only with a Hub id, but {local} is on this machine; "
            "drop the option, or rename the folder if you mean the Hub's data set"
        )
    if local.suffix.lower() == ".zip" and not local.is_dir():
        local = _unpacked(local)
    if local.is_dir() and (local / "dataset_dict.json").is_file():
        local = split_folder(local, split)
    elif split is not None:
        local = _split_path(local, split)
    folder = local
    if local.is_dir() and not is_saved_dataset(local):
        local = _table_in(local) or local
    if local.suffix == ".parquet" and _is_triplet_file(local):
        return Found("table saved by drum-hf", [], saved=local, image_root=image_root)
    notes: list[str] = []
    if local.is_dir() and not is_saved_dataset(local):
        kind: str = "folder of class folders"
        rows: Rows = read_class_folders(local, notes)
    else:
        kind, rows = _read(local, faults)
    for note in notes:
        logger.warning("%s: %s", path, note)
    if not len(rows):
        raise EmptySupportError(f"{path}: expected at least one row, got an empty table; add rows")
    root = image_root or (local if local.is_dir() else folder if folder.is_dir() else local.parent)
    return Found(kind, rows, root, image_root=image_root, notes=tuple(notes))


def find_object(data: Any, *, split: str | None = None, image_root: Any = None) -> Found:
    """The rows of an object: a Dataset of any kind, a frame, an Arrow table, a list of dicts.

    Raises:
        ColumnError: it is none of these.
        ValueError: a DatasetDict has no split of that name, or one is needed.
    """
    import datasets

    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split is None and len(data) == 1:
            split = next(iter(data))
        if split is None:
            raise ColumnError(
                f"expected one table, got a DatasetDict; pass one of its splits: {', '.join(map(str, data))}, or "
                "split= with its name"
            )
        if split not in data:
            raise which_split("DatasetDict", split, list(data))
        data = data[split]
    elif split is not None:
        raise ValueError(f"split={split!r}: expected only with a DatasetDict or a path, got {type(data).__name__}")
    if isinstance(data, datasets.Dataset):
        return Found("Dataset", data, image_root or _cache_roots(data))
    if isinstance(data, datasets.IterableDataset):
        # What load_dataset streams may be anybody's.
        root: ImageRoot = image_root or (None if data.info.builder_name is None else ())
        return Found("IterableDataset", list(_undecoded_stream(data)), root)
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return Found("list of rows", data, image_root)
    module = type(data).__module__.partition(".")[0]
    if module == "polars":
        frame = data.collect() if hasattr(data, "collect") else data
        return Found("polars frame", frame.to_dicts(), image_root)
    if module == "pandas" and hasattr(data, "columns"):
        return Found("pandas frame", _pandas_rows(data), image_root)
    if module == "pyarrow" and hasattr(data, "to_reader"):
        return Found("Arrow table", _of_arrow(data), image_root)
    raise ColumnError(
        "expected a datasets.Dataset, a list of dicts, a pandas or polars frame, a pyarrow Table or a TripletTable, "
        f"got {type(data).__name__}; read files and Hub data sets with drum_hf.data.load_table"
    )


def _undecoded_stream(data: datasets.IterableDataset) -> Iterator[Any]:
    import datasets

    features = data.features or data._resolve_features().features or {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    classes = {name: f.names for name, f in features.items() if isinstance(f, datasets.ClassLabel)}
    for row in data:
        named = {
            name: None if row[name] is None or row[name] < 0 else names[row[name]] for name, names in classes.items()
        }
        yield {**row, **named}


def _pandas_rows(frame: Any) -> list[dict[str, Any]]:
    """Rows of a frame, missing cells of any kind as None; whole numbers beside them, which are floats, as whole."""
    import math

    if not frame.columns.is_unique:
        raise ColumnError(f"expected each column once, got {', '.join(map(repr, frame.columns))}; rename the copies")

    def is_whole(column: Any) -> bool:
        present = column.dropna()
        return column.dtype.kind == "f" and 0 < len(present) < len(column) and bool((present % 1 == 0).all())

    def cell(name: Any, value: Any) -> Any:
        absent = isinstance(value, float) and math.isnan(value)
        if absent or type(value).__name__ in ("NAType", "NaTType"):
            return None
        return int(value) if name in whole else value

    whole = {name for name in frame.columns if is_whole(frame[name])}
    rows = frame.to_dict("records")
    return [{str(name): cell(name, value) for name, value in row.items()} for row in rows]


def _of_arrow(table: pa.Table, fingerprint: str | None = None) -> datasets.Dataset:
    """An Arrow table of any types of text and list as a Dataset."""
    import datasets
    import pyarrow as pa

    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise ColumnError(f"expected each column once, got {twice[0]!r} twice: the column {twice[0]!r} is in it twice")
    table = table.cast(plain_schema(table.schema))
    for place, field in enumerate(table.schema):
        if pa.types.is_floating(field.type) and 0 < table[place].null_count < len(table):
            with contextlib.suppress(pa.ArrowInvalid):  # whole numbers that were floats for a missing one's sake
                table = table.set_column(place, field.name, table[place].cast(pa.int64()))
    return datasets.Dataset(table, fingerprint=fingerprint)


# Where the table is


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # longer than a name may be
        return False


def _from_hub(path: str, split: str | None, image_root: Any, options: dict[str, Any]) -> Found:
    is_id = len(path) <= _LONGEST_ID and _HUB_ID.fullmatch(path)
    if not is_id or path.lower().endswith((*_SUFFIXES, ".gz", ".zip")):
        shown = path if len(path) <= 200 and path.isprintable() else f"{path[:200]!r}"
        raise SavedFileError(f"{shown}: expected a file, a folder or a Hub data set id, found none; check the path")
    import datasets

    data = ask_hub(path, split=split, **options)
    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if len(data) != 1:
            raise which_split(path, split, list(data))
        data = next(iter(data.values()))
    rows: Rows = data if isinstance(data, datasets.Dataset) else list(_undecoded_stream(data))
    if not len(rows):
        raise EmptySupportError(f"{path}: expected at least one row, got an empty table; add rows")
    return Found("Hub data set", rows, image_root or hub_folders(path), image_root=image_root)


def hub_folders(repo: str) -> tuple[str, ...]:
    """Where the image files of a data set of the Hub may be: what was fetched of it, and what archives held."""
    import datasets
    from huggingface_hub import constants

    fetched = os.path.join(constants.HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}")
    return (os.path.abspath(fetched), os.path.abspath(datasets.config.EXTRACTED_DATASETS_PATH))


def _cache_roots(data: datasets.Dataset) -> tuple[str, ...] | None:
    """Where images may be of a Dataset that `load_dataset` fetched from the Hub; None for the user's own."""
    for file in data.cache_files:
        owned = next((part for part in Path(file["filename"]).parts if "___" in part), None)
        if owned is not None:  # the folder that datasets names after owner and repository
            return hub_folders(owned.replace("___", "/", 1))
    return None


def ask_hub(path: str, **options: Any) -> Any:
    """What `datasets.load_dataset` gives.

    Raises:
        SavedFileError: there is no such data set or no such file in it, or the Hub can't be reached.
    """
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        return datasets.load_dataset(path, **options)
    except (DatasetNotFoundError, DataFilesNotFoundError, ConnectionError) as error:
        raise SavedFileError(
            f"{path}: expected a file or folder here, or a data set of the Hub, found neither ({error}); "
            "check the name, log in if it is private, or give a local path"
        ) from error


def which_split(path: Any, split: str | None, found: Sequence[str]) -> ValueError:
    got = "none was given" if split is None else f"got {split!r}"
    return ValueError(f"{path}: expected split= one of {', '.join(map(repr, found)) or '(none here)'}, {got}")


def split_folder(folder: Path, split: str | None) -> Path:
    try:
        splits = read_json(folder / "dataset_dict.json")["splits"]
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise ValueError("it is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SavedFileError(f"{folder / 'dataset_dict.json'}: expected a list of splits; save it again") from error
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        raise which_split(folder, split, splits)
    refuse_outside(folder / split, folder)
    return folder / split


def _split_path(path: Path, split: str) -> Path:
    found = {}
    if path.is_dir() and not is_saved_dataset(path):
        visible = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
        found = {p.name if p.is_dir() else _stem(p): p for p in visible if p.is_dir() or _is_table(p)}
    if split not in found:
        raise which_split(path, split, list(found))
    return found[split]


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _suffix(path: Path) -> str:
    """The format: ".csv" of a.csv and of a.csv.gz."""
    suffix = path.suffix.lower()
    packed = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    return packed if suffix != ".gz" or packed in _TEXTS else suffix


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _is_table(path: Path) -> bool:
    return _suffix(path) in _SUFFIXES and not path.name.startswith(".")


def _table_in(folder: Path) -> Path | None:
    """The one table of a folder; None where it holds no table file."""
    tables = sorted(p for p in folder.iterdir() if _is_table(p) and not p.is_dir())
    named = [p for p in tables if _stem(p) == "metadata"] or tables
    if len(named) > 1:
        raise SavedFileError(
            f"{folder}: expected one table file, found {', '.join(p.name for p in named)}; "
            "pass the file itself, or split= with its name"
        )
    if named and named[0].exists():
        refuse_outside(named[0], folder)
    return named[0] if named else None


def _is_triplet_file(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        refuse_special(file)
        return b"drum_hf" in (pq.read_schema(file).metadata or {})
    except (pa.ArrowException, OSError, ValueError):
        return False  # reading it will say what is wrong


def _unpacked(archive: Path) -> Path:
    """The folder of a zip archive's files, which are unpacked once.

    Raises:
        SavedFileError: it is no archive, or a name in it leads elsewhere, or it takes far more space than its size.
    """
    import datasets

    try:
        refuse_special(archive)
        cache = Path(datasets.config.HF_DATASETS_CACHE, "drum_hf")
        place = cache / f"{checksum(archive)}-unpacked"
        if not place.is_dir():
            with writing(cache):
                cache.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=cache))
            try:
                with zipfile.ZipFile(archive) as packed:
                    _unpack(packed, partial, most_content(archive))
                with contextlib.suppress(OSError):  # another process was faster
                    os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    # A broken archive makes zipfile raise nearly anything.
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(f"{archive}: expected a zip archive ({error}); pack the folder again") from error
    except zipfile.zlib.error as error:  # type: ignore[attr-defined]
        raise SavedFileError(f"{archive}: expected a zip archive ({error}); pack the folder again") from error
    inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    if len(inside) == 1 and inside[0].is_dir():  # the folder itself was packed
        below = [p for p in inside[0].iterdir() if not p.name.startswith(".")]
        if any(p.is_dir() or _is_table(p) for p in below):
            return inside[0]
    return place


def _unpack(packed: zipfile.ZipFile, folder: Path, most: int) -> None:
    entries = packed.infolist()
    if len(entries) > _MOST_FILES:
        raise ValueError(f"it holds {len(entries):,} files, more than {_MOST_FILES:,}")
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))  # as old tools of Windows write it
        if name.is_absolute() or ".." in name.parts or any(":" in part for part in name.parts[:1]):
            raise ValueError(f"the name {entry.filename[:80]!r} leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{entry.filename[:80]!r} is a link")
        is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
        if is_hidden or entry.filename.endswith(("/", "\\")):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with packed.open(entry) as source, target.open("xb") as sink:
            while chunk := source.read(1 << 20):
                most -= len(chunk)
                if most < 0:
                    raise ValueError("it takes far more space than its size once it is unpacked")
                sink.write(chunk)


# Reading


def _read(path: Path, faults: list[str] | None = None) -> tuple[str, Rows]:
    if path.is_dir():
        return "saved Dataset", read_saved_dataset(path)
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise SavedFileError(f"{path}: expected a table ({_SHOWN}), got {suffix or 'no'} extension")
    try:
        refuse_special(path)
        size = path.stat().st_size
    except OSError as error:
        raise SavedFileError(f"{path}: expected a table, it can't be opened ({error}); give another file") from error
    if not size:
        raise EmptySupportError(f"{path}: expected at least one row, got an empty file; write the table again")
    kind = f"{suffix.lstrip('.')} file"
    if suffix in (".parquet", ".arrow"):
        return kind, _read_arrow_rows(path, suffix)
    text = _text(path)
    if suffix in (".jsonl", ".ndjson"):
        return kind, list(_json_rows(text, path, faults))
    if suffix == ".json":
        return kind, _json_list(text, path)
    delimiter, text = _delimiter(text, "\t" if suffix == ".tsv" else ",")
    name = {",": "", "\t": "" if suffix == ".tsv" else "tab-"}.get(delimiter, f"{delimiter}-")
    kind = f"{name and name.rstrip('-') + '-separated '}{kind}"
    return kind, list(_csv_rows(text, path, delimiter, faults))


def _text(path: Path) -> str:
    try:
        if path.suffix.lower() == ".gz":
            most = most_content(path)
            with gzip.open(path) as packed:
                data = packed.read(most + 1)
            if len(data) > most:
                raise SavedFileError(f"{path}: it takes far more memory than its size once it is unpacked; unpack it")
        else:
            data = path.read_bytes()
        is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as Excel writes "Unicode text"
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SavedFileError(f"{path}: expected text in UTF-8 ({error}); save it in that encoding") from error
    except SavedFileError:
        raise
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise SavedFileError(f"{path}: it can't be read ({error}); see to its permissions and its disk") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SavedFileError(f"{where}: expected JSON ({error}); correct it, or write the file again") from error


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        rows = _json(text, str(path))
    except SavedFileError:
        if text.lstrip()[:1] != "{":
            raise
        lines: list[str] = []
        found = list(_json_rows(text, path, lines))  # as Dataset.to_json writes, whatever the file is called
        if lines or len(found) < 2:
            raise
        return found
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise SavedFileError(f"{path}: expected a list of objects, got {type(rows).__name__}; one object a row")
    return rows


def _json_rows(text: str, path: Path, faults: list[str] | None) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _json(line, f"{path}, line {number}")
            except SavedFileError as error:
                _tell(error, faults)


def _tell(error: SavedFileError, faults: list[str] | None) -> None:
    if faults is None:
        raise error
    faults.append(str(error))


def _delimiter(text: str, usual: str) -> tuple[str, str]:
    """What separates the header's cells, and the text without a line that only says so (Excel's "sep=;")."""
    line, _, rest = text.partition("\n")
    if re.fullmatch(r"sep=.", line):
        return line[-1], rest
    header = re.sub(r'"(?:[^"]|"")*"', '""', text[:100_000]).partition("\n")[0]
    counts = {delimiter: header.count(delimiter) for delimiter in (usual, ",", ";", "\t", "|")}
    best = max(counts.values())
    return next(delimiter for delimiter, count in counts.items() if count == best), text


def _csv_rows(text: str, path: Path, delimiter: str, faults: list[str] | None) -> Iterator[dict[str, Any]]:
    limit = csv.field_size_limit(max(len(text), 131_072))  # a cell may be an image in base64
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(header) > 1 and all(name.startswith(" ") for name in header[1:]):  # "a, b, c"
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
            header = next(reader)
        header = [name.strip() for name in header]
        names = [name for name in header if name]
        if len(set(names)) < len(names):
            raise ColumnError(
                f"{path}: expected each column once, got {', '.join(map(repr, names))}; rename the copies"
            )
        # Columns without a name are an index that was written, or come from separators at the end of every line.
        unnamed = [place for place, name in enumerate(header) if not name and place]
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header) or any(cells[place].strip() for place in unnamed):
                fault = SavedFileError(
                    f"{path}, line {reader.line_num}: expected {len(names)} cells, got {len(cells)}; "
                    'put quotes ("…") around a text that holds the separator'
                )
                _tell(fault, faults)
            else:
                yield {name: cell for name, cell in zip(header, cells, strict=True) if name}
    except csv.Error as error:
        raise SavedFileError(f"{path}, line {reader.line_num}: {error}; correct the line") from error
    finally:
        csv.field_size_limit(limit)


def _read_arrow_rows(path: Path, suffix: str) -> datasets.Dataset:
    import pyarrow as pa

    try:
        table = read_parquet(path) if suffix == ".parquet" else _read_ipc(path)
        fingerprint = content_key(str(path.resolve()), str(path.stat().st_mtime_ns), str(path.stat().st_size))
        return _of_arrow(table, fingerprint)
    except (pa.ArrowException, OSError, ValueError) as error:
        kind = suffix.lstrip(".")
        raise SavedFileError(
            f"{path}: expected {'an' if kind[0] == 'a' else 'a'} {kind} file ({error}); write or download it again"
        ) from error


def _read_ipc(path: Path) -> pa.Table:
    """An Arrow file, or a stream as `datasets` writes it."""
    import pyarrow as pa

    most = most_content(path)
    with pa.memory_map(os.fspath(path)) as file:
        try:
            opened = pa.ipc.open_file(file)
            batches: Iterator[pa.RecordBatch] = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            opened = batches = pa.ipc.open_stream(file)
        read = []
        for batch in batches:
            most -= batch.nbytes
            if most < 0:
                raise ValueError("it takes far more memory than its size once it is read")
            read.append(batch)
        table = pa.Table.from_batches(read, schema=opened.schema)
    table.validate(full=True)
    return table


def read_saved_dataset(folder: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        for file in folder.iterdir():
            refuse_outside(file, folder)
            refuse_special(file)
        data = datasets.Dataset.load_from_disk(str(folder))
        data.data.table.validate(full=True)  # texts and offsets: no row would be read to its end otherwise
        return data
    except SavedFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SavedFileError(
            f"{folder}: expected what Dataset.save_to_disk writes ({type(error).__name__}: {error}); save it again"
        ) from error


def read_class_folders(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """Images below a folder for each class, at any depth; what is left out is told in `notes`.

    Raises:
        EmptySupportError: there is none.
        ValueError: the folders are splits, not classes.
    """
    suffixes = _image_suffixes()
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    for place in classes:
        refuse_outside(place, folder)
    names = [p.name for p in classes]
    if names and {name.lower() for name in names} <= _SPLITS and not _holds_images(classes, suffixes):
        if len(names) > 1:
            raise which_split(folder, None, names)
        return [
            row | {"id": f"{names[0]}/{row['id']}", "image": f"{names[0]}/{row['image']}"}
            for row in read_class_folders(classes[0], notes)
        ]
    rows: list[dict[str, Any]] = []
    others: list[str] = []
    empty: list[str] = []
    for place in classes:
        # File names of macOS have their accents apart, which is not how anybody writes the class.
        label = unicodedata.normalize("NFC", place.name)
        before = len(rows)
        for file in _files_below(place):
            name = file.relative_to(folder).as_posix()
            if file.suffix.lower() not in suffixes:
                others.append(name)
            else:
                rows.append({"id": name, "image": name, "response": label, "label": label})
        if len(rows) == before:
            empty.append(place.name)
    splits = [name for name in names if name.lower() in _SPLITS]
    loose = [p.name for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes and p.is_file()]
    if not rows:
        raise EmptySupportError(
            f"{folder}: expected a table file ({_SHOWN}) or a folder of images for each class, found neither; add one"
        )
    left_out = (
        (others, "files in class folders are no images of a known format and were left out"),
        (loose, "images are in no class folder and were left out"),
        (empty, "class folders hold no image"),
        (splits, "class folders are called like splits; if they are, give the folder of one, or split="),
    )
    if notes is not None:
        notes += [f"{len(found)} {what}: {shorten(list(map(repr, found)))}" for found, what in left_out if found]
    return rows


def image_files(folder: Path) -> Iterator[Path]:
    """Visible files at any depth below a folder that are called as images are."""
    suffixes = _image_suffixes()
    return (file for file in _files_below(folder) if file.suffix.lower() in suffixes)


def _image_suffixes() -> set[str]:
    from PIL import Image

    Image.init()
    return {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}


def _holds_images(folders: Sequence[Path], suffixes: set[str]) -> bool:
    return any(p.suffix.lower() in suffixes for folder in folders for p in folder.iterdir() if not p.is_dir())


def _files_below(folder: Path) -> Iterator[Path]:
    """Visible files at any depth; a folder that links lead to twice is walked once."""
    seen, waiting = set(), [folder]
    while waiting:
        place = waiting.pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        refuse_outside(place, folder)
        seen.add(real)
        entries = sorted(p for p in place.iterdir() if not p.name.startswith("."))
        yield from (p for p in entries if not p.is_dir())
        waiting += [p for p in reversed(entries) if p.is_dir()]
