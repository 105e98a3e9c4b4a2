"""Which columns of the given data are ours, and whether their types fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ColumnError, EmptySupportError

if TYPE_CHECKING:
    import datasets

COLUMNS = ("id", "image", "prompt", "response", "references", "group", "label")
_REQUIRED = ("prompt", "response")

#: Letters of a multiple choice's options, in order.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def open_columns(
    data: datasets.Dataset | Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, str], Sequence[Mapping[str, Any]] | NamedClasses, datasets.Dataset | None]:
    """Our names -> the data's, its rows of texts, and (for a Dataset) its undecoded images."""
    import datasets

    if isinstance(data, datasets.DatasetDict):
        raise ColumnError(f"expected one table, got a DatasetDict; pass one of its splits: {', '.join(data)}")
    if not isinstance(data, (datasets.Dataset, Sequence)) or isinstance(data, (str, bytes)):
        raise ColumnError(
            f"expected a datasets.Dataset, a list of dicts or a TripletTable, got {type(data).__name__}; "
            "read files and Hub data sets with drum_hf.data.load_table"
        )
    if not len(data):
        raise no_rows()
    if not isinstance(data, datasets.Dataset):
        found = list(dict.fromkeys(name for row in data if isinstance(row, Mapping) for name in row))
        return _match_columns(found, columns), data, None

    names = _match_columns(data.column_names, columns)
    data = data.with_format(None)
    for ours, theirs in names.items():
        _check_feature(ours, theirs, data.features[theirs])
    texts = data.select_columns(list(dict.fromkeys(name for ours, name in names.items() if ours != "image")))
    image = names.get("image")
    if image is None or getattr(data.features[image], "dtype", None) == "null":
        return names, NamedClasses(texts), None
    images = data.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    return names, NamedClasses(texts), images.cast_column("image", datasets.Image(decode=False))


def _match_columns(found: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    unknown = [ours for ours in columns if ours not in COLUMNS]
    if unknown:
        raise ColumnError(f"columns= names {unknown[0]!r}, which is none of ours: {', '.join(COLUMNS)}")
    names = {ours: columns.get(ours, ours) for ours in COLUMNS}
    for ours, theirs in names.items():
        if theirs not in found and (ours in _REQUIRED or ours in columns):
            remedy = f"name it with columns={{{ours!r}: '<column>'}} (--columns {ours}=<column>)"
            if ours == "prompt":
                remedy += ", or add a column of '' where nothing is asked (captioning, classification)"
            raise ColumnError(f"expected a column {theirs!r}, got columns {', '.join(map(repr, found))}; {remedy}")
    return {ours: theirs for ours, theirs in names.items() if theirs in found}


def _check_feature(ours: str, theirs: str, feature: Any) -> None:
    """Refuse a column by its type, before any row is read."""
    import datasets

    text = ("string", "large_string", "null")
    dtype = getattr(feature, "dtype", None)
    if ours == "image":
        expected, remedy = "an Image feature, paths or encoded bytes", "cast it to datasets.Image()"
        is_struct = isinstance(feature, dict) and feature.keys() <= {"bytes", "path"}
        fits = isinstance(feature, datasets.Image) or is_struct or dtype in (*text, "binary", "large_binary")
    elif ours == "references":
        expected, remedy = "lists of texts", "cast it with data.cast_column"
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        fits = dtype == "null" or getattr(inner, "dtype", None) in text
    else:
        expected, remedy = "text", "cast it with data.cast_column"
        fits = isinstance(feature, datasets.ClassLabel) or dtype in text
    if not fits:
        raise ColumnError(f"column {theirs!r}: expected {expected}, got {feature}; {remedy}, or name another column")


class NamedClasses:
    """Rows of a Dataset with its ClassLabel numbers as class names, and -1 (unlabelled) as None."""

    def __init__(self, data: datasets.Dataset) -> None:
        import datasets

        self._data = data
        self._classes = {name: f.names for name, f in data.features.items() if isinstance(f, datasets.ClassLabel)}

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._name, self._data)

    def _name(self, row: dict[str, Any]) -> dict[str, Any]:
        for column, classes in self._classes.items():
            number = row[column]
            row[column] = None if number is None or number < 0 else classes[number]
        return row


def no_rows(reason: str = "", skipped: Sequence[tuple[int, str]] = ()) -> EmptySupportError:
    return EmptySupportError(
        f"expected at least one demonstration, got a table without rows{reason}; give one row or more with a prompt "
        "or an image, and a response",
        skipped=skipped,
    )
