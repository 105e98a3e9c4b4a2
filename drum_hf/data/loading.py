"""The user's own data: local tables and folders of images, or a data set of the Hub, as a `TripletTable`."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ..errors import ColumnError, EmptySupportError, SavedFileError
from ..types import content_key
from ..utils.files import read_parquet, refuse_special
from ..utils.images import FORMATS, MAX_PIXELS
from .storage import saved_about
from .table import TripletTable

if TYPE_CHECKING:
    import datasets

    Rows: TypeAlias = list[Any] | datasets.Dataset

__all__ = ["load_table"]

logger = logging.getLogger(__name__)

#: Our column -> names that public tables use for it, tried in order where ours is absent.
_SYNONYMS = {
    "image": ("file_name", "image_path"),
    "prompt": ("question",),
    "response": ("answer",),
    "references": ("answers",),
}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_table(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    on_bad_rows: Literal["raise", "skip"] = "raise",
    columns: Mapping[str, str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    **load_options: Any,
) -> TripletTable:
    """Read and check the user's own table of demonstrations.

    `path` is one of
      - a .csv, .tsv, .jsonl, .json (a list of objects) or .parquet file. Image paths are relative to its folder and
        may not leave it, unless `image_root` says otherwise. In CSV every cell is text, and lists are JSON texts;
      - a folder with one such file (metadata.* if there are several) and the images beside it;
      - a folder of folders of images, one for each class: label and response are the folder's name, the prompt is
        empty, and the id is the image's path;
      - what `TripletTable.save`, `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote;
      - the id of a data set on the Hub.

    Where a column is absent, a usual other name for it is accepted and logged: question (prompt), answer (response),
    file_name or image_path (image), answers (references, if they are lists). Without any response, it is the most
    frequent of the row's references. Ids and groups may be whole numbers.

    Args:
        path: see above. What exists on disk goes before the Hub.
        split: which split, where there are several: of the Hub's, of a DatasetDict, or a sub-folder or file so named.
        on_bad_rows, columns, max_pixels: as in `TripletTable.from_dataset`.
        image_root: the folder that image paths are relative to and may not leave.
        load_options: for `datasets.load_dataset` (name, revision, token…); only with a Hub id.

    Raises:
        SavedFileError: there is no such table, or it can't be read as one.
        ColumnError, RowError, ImageError, DuplicateIdError, EmptySupportError: as in `TripletTable.from_dataset`.
        ValueError: `split` names none of the splits, or is needed and missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "bus.png")
        >>> _ = (folder / "metadata.csv").write_text("file_name,question,answer\\nbus.png,What colour?,red\\n")
        >>> table = load_table(folder)
        >>> table.prompts, table.responses
        (['What colour?'], ['red'])
    """
    opened = open_table(path, split=split, columns=columns, image_root=image_root, load_options=load_options)
    if opened.saved is not None:
        return TripletTable.load(opened.saved, max_pixels=max_pixels)
    return TripletTable.from_dataset(
        opened.rows, on_bad_rows=on_bad_rows, columns=opened.columns, image_root=opened.root, max_pixels=max_pixels
    )


class OpenTable(NamedTuple):
    """A table found and read, but not checked.

    Attributes:
        kind: what was found, in words.
        rows: its rows; none where it is one of our own, in the file `saved`.
        columns: our column -> the table's, where they differ.
        root: the folder that image paths are relative to.
    """

    kind: str
    rows: Rows
    columns: dict[str, str]
    root: Any = None
    saved: Path | None = None


def open_table(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    image_root: Any = None,
    load_options: dict[str, Any] | None = None,
    faults: list[str] | None = None,
) -> OpenTable:
    """Find and read what `load_table` takes, and match its columns with ours.

    Lines of a CSV or JSONL file that can't be read raise, or are told in `faults` and left out.
    """
    local = Path(path)
    if not local.exists():
        kind, data, root = "Hub data set", _from_hub(os.fspath(path), split, load_options or {}), image_root
    else:
        if load_options:
            raise ValueError(
                f"{', '.join(load_options)}: expected only with a Hub id, but {local} is on this machine; "
                "drop the option, or rename the folder if you mean the Hub's data set"
            )
        if local.is_dir() and (local / "dataset_dict.json").is_file():
            local = split_folder(local, split)
        elif split is not None:
            local = _split_path(local, split)
        if local.is_dir() and not is_saved_dataset(local):
            local = _table_in(local) or local
        if local.suffix == ".parquet" and _is_triplet_file(local):
            return OpenTable("table saved by drum-hf", [], {}, saved=local)
        kind, data = _kind(local), _read(local, faults)
        root = image_root or (local.parent if local.is_file() else local)
    if not len(data):
        raise EmptySupportError(f"{path}: expected at least one row, got an empty table; add rows")
    return OpenTable(kind, *_with_usual_names(data, dict(columns or {})), root)


def _kind(path: Path) -> str:
    if not path.is_dir():
        return f"{path.suffix.lower().lstrip('.')} file"
    return "saved Dataset" if is_saved_dataset(path) else "folder of a folder of images for each class"


# Where the table is


def _from_hub(path: str, split: str | None, options: dict[str, Any]) -> datasets.Dataset:
    if not _HUB_ID.fullmatch(path) or path.endswith(_SUFFIXES):
        raise SavedFileError(f"{path}: expected a file, a folder or a Hub data set id, found none; check the path")
    import datasets

    data = ask_hub(path, split=split, **options)
    if isinstance(data, datasets.Dataset):
        return data
    if not isinstance(data, datasets.DatasetDict):
        raise ColumnError(f"{path}: expected a table, got {type(data).__name__}; load without streaming=True")
    if len(data) != 1:
        raise which_split(path, split, list(data))
    return next(iter(data.values()))


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
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SavedFileError(f"{folder / 'dataset_dict.json'}: expected a list of splits; save it again") from error
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        raise which_split(folder, split, splits)
    return folder / split


def _split_path(path: Path, split: str) -> Path:
    found = {}
    if path.is_dir() and not is_saved_dataset(path):
        visible = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
        found = {p.name if p.is_dir() else p.stem: p for p in visible if p.is_dir() or p.suffix.lower() in _SUFFIXES}
    if split not in found:
        raise which_split(path, split, list(found))
    return found[split]


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _table_in(folder: Path) -> Path | None:
    """The one table of a folder; None where it holds no table file."""
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    named = [p for p in tables if p.stem == "metadata"] or tables
    if len(named) > 1:
        raise SavedFileError(
            f"{folder}: expected one table file, found {', '.join(p.name for p in named)}; "
            "pass the file itself, or split= with its name"
        )
    return named[0] if named else None


def _is_triplet_file(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        refuse_special(file)
        return bool(saved_about(pq.read_schema(file)))
    except (pa.ArrowException, OSError, ValueError):
        return False  # reading it will say what is wrong


# Reading


def _read(path: Path, faults: list[str] | None = None) -> Rows:
    if path.is_dir():
        return read_saved_dataset(path) if is_saved_dataset(path) else read_class_folders(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise SavedFileError(f"{path}: expected a table ({', '.join(_SUFFIXES)}), got {suffix or 'no'} extension")
    try:
        refuse_special(path)
        size = path.stat().st_size
    except OSError as error:
        raise SavedFileError(f"{path}: expected a table, it can't be opened ({error}); give another file") from error
    if not size:
        raise EmptySupportError(f"{path}: expected at least one row, got an empty file; write the table again")
    if suffix == ".parquet":
        return _read_parquet_rows(path)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SavedFileError(f"{path}: expected text in UTF-8 ({error}); save it in that encoding") from error
    except OSError as error:
        raise SavedFileError(f"{path}: it can't be read ({error}); see to its permissions and its disk") from error
    if suffix == ".jsonl":
        return list(_json_rows(text, path, faults))
    if suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise SavedFileError(f"{path}: expected a list of objects, got {type(rows).__name__}; one object a row")
        return rows
    return list(_csv_rows(text, path, "\t" if suffix == ".tsv" else ",", faults))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SavedFileError(f"{where}: expected JSON ({error}); correct it, or write the file again") from error


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


def _csv_rows(text: str, path: Path, delimiter: str, faults: list[str] | None) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ColumnError(f"{path}: expected each column once, got {', '.join(header)}; rename the copies")
        for cells in reader:
            if cells and len(cells) != len(header):
                fault = SavedFileError(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells, got {len(cells)}; "
                    'put quotes ("…") around a text that holds the separator'
                )
                _tell(fault, faults)
            elif cells:
                yield {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise SavedFileError(f"{path}, line {reader.line_num}: {error}; correct the line") from error


def _cell(name: str, cell: str) -> Any:
    if name == "image" or name in _SYNONYMS["image"]:
        return cell or None
    if name == "references" or name in _SYNONYMS["references"]:
        try:
            return json.loads(cell) if cell else None
        except (ValueError, RecursionError):
            return cell  # the row check refuses it, with the row's number
    return cell


def _read_parquet_rows(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        table = read_parquet(path)
        if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
            raise ValueError(f"the column {twice[0]!r} is in it twice")
        fingerprint = content_key(str(path.resolve()), str(path.stat().st_mtime_ns), str(path.stat().st_size))
        return datasets.Dataset(table, fingerprint=fingerprint)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SavedFileError(f"{path}: expected a parquet file ({error}); write or download it again") from error


def read_saved_dataset(folder: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        for file in folder.iterdir():
            refuse_special(file)
        data = datasets.Dataset.load_from_disk(str(folder))
        data.data.table.validate(full=True)  # texts and offsets: no row would be read to its end otherwise
        return data
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SavedFileError(
            f"{folder}: expected what Dataset.save_to_disk writes ({type(error).__name__}: {error}); save it again"
        ) from error


def read_class_folders(folder: Path) -> list[dict[str, Any]]:
    from PIL import Image

    Image.init()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    rows = [
        {"id": name, "image": name, "prompt": "", "response": label.name, "label": label.name}
        for label in sorted(folder.iterdir())
        if label.is_dir() and not label.name.startswith(".")
        for file in sorted(label.iterdir())
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
        for name in [f"{label.name}/{file.name}"]
    ]
    if not rows:
        raise EmptySupportError(
            f"{folder}: expected a table file ({', '.join(_SUFFIXES)}) or a folder of images for each class, "
            "found neither; add one"
        )
    return rows


# Columns


def _with_usual_names(data: Rows, columns: dict[str, str]) -> tuple[Rows, dict[str, str]]:
    """Accept other names that public tables use, whole-number ids, and references without a response."""
    if isinstance(data, list):
        found = {name for row in data if isinstance(row, dict) for name in row}
    else:
        found = set(data.column_names)
    for ours, others in _SYNONYMS.items():
        theirs = next((name for name in others if name in found), None)
        if theirs is None or ours in columns or ours in found:
            continue
        if ours == "references" and not _holds_lists(data, theirs):
            continue
        columns[ours] = theirs
        logger.info("column %r is read as %r", theirs, ours)
    response, references = columns.get("response", "response"), columns.get("references", "references")
    if response not in found and "response" not in columns and references in found:
        logger.info("there is no column 'response': it is the most frequent of each row's %r", references)
        if isinstance(data, list):
            data = [
                {**row, "response": majority(row.get(references))} if isinstance(row, dict) else row for row in data
            ]
        else:
            data = data.add_column("response", [majority(texts) for texts in data[references]])
    return _with_text_ids(data, {columns.get("id", "id"), columns.get("group", "group")}), columns


def _holds_lists(data: Rows, name: str) -> bool:
    if isinstance(data, list):
        first = next((row[name] for row in data if isinstance(row, dict) and row.get(name) is not None), None)
        return isinstance(first, list)
    feature = data.features[name]
    return isinstance(feature, list) or hasattr(feature, "feature")


def majority(texts: Any) -> str | None:
    """Most frequent text, the earliest of equals; None (refused later, with the row's number) where there is none."""
    texts = [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []
    return Counter(texts).most_common(1)[0][0] if texts else None


def _with_text_ids(data: Rows, names: set[str]) -> Rows:
    """Whole numbers of the columns `names` as text: they lose nothing by it."""
    if isinstance(data, list):
        return [
            row | {name: str(row[name]) for name in names if type(row.get(name)) is int}
            if isinstance(row, dict)
            else row
            for row in data
        ]
    import datasets

    for name in names & set(data.column_names):
        feature = data.features[name]
        if isinstance(feature, datasets.Value) and "int" in feature.dtype:
            data = data.cast_column(name, datasets.Value("string"))
    return data
