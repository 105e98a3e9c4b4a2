"""Rows of a table: which columns are ours, what a cell may hold, and what is wrong with which row."""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import json
import logging
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

from ..errors import ColumnError, DuplicateIdError, EmptySupportError, ImageError, RowError
from ..types import content_key, image_key, texts_key
from ..utils.files import leads_outside
from ..utils.images import base64_bytes, is_image
from .images import decode, image_column, image_dataset

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Where image paths may lead: anywhere; into one folder, which they are relative to; or, absolute, into several.
ImageRoot: TypeAlias = str | os.PathLike[str] | tuple[str, ...] | None

COLUMNS = ("id", "image", "prompt", "response", "references", "group", "label")

#: Letters of a multiple choice's options, in order.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

#: Our column -> names that public tables use for it, tried in order where ours is absent. Case, blanks around a name
#: and what joins its words make no difference.
_USUAL = {
    "image": (
        *("file_name", "filename", "file_path", "filepath", "image_path", "image_file_name", "image_filename"),
        *("image_file", "image_name", "img", "img_path", "images", "image_url"),
    ),
    "prompt": ("question", "query", "instruction"),
    "response": ("answer", "caption"),
    "references": ("answers", "captions"),
}
#: Names of the class, where nothing else could be the response.
_CLASS = ("class", "class_name", "labels", "category")
_CHATS = ("conversations", "messages")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_BAR_FROM = 1000  # rows; a shorter check ends before a progress bar could be read
#: Rows read together when all of them are read.
_BATCH = 2000


# Columns


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a table's columns are for.

    Attributes:
        names: our column -> the table's, of those that are used as they stand.
        chat: column of a conversation, whose first exchange is prompt and response.
        options: columns of a multiple choice's options, in the order of their letters.
        hint: column of a text that stands before the question of a multiple choice.
        index: column of row names, by which a row may refer to another row's image.
        unused: columns that are left behind.
    """

    names: Mapping[str, str]
    chat: str | None = None
    options: tuple[str, ...] = ()
    hint: str | None = None
    index: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def used(self) -> dict[str, str]:
        """What is read -> the table's column, for a reader: "prompt and response" of a conversation, say."""
        used = {ours: self.names[ours] for ours in COLUMNS if ours in self.names}
        if self.chat:
            used["prompt and response"] = self.chat
        elif "response" not in used:
            used["response (the most frequent)"] = self.names["references"]
        if self.options:
            used["options"] = ", ".join(self.options)
        if self.hint:
            used["hint"] = self.hint
        return used

    def __str__(self) -> str:
        renamed = [f"{theirs!r} is read as {ours!r}" for ours, theirs in self.used.items() if ours != theirs]
        if "prompt" not in self.names and not self.chat:
            renamed.append("no column is a prompt: nothing is asked")
        if self.unused:
            renamed.append(f"not used: {', '.join(map(repr, self.unused))}")
        return "; ".join(renamed)


def match_columns(
    found: Sequence[str], given: Mapping[str, str], group: str | None, first: Callable[[str], Any]
) -> Columns:
    """Match a table's columns with ours.

    Args:
        found: the table's columns.
        given: our column -> the table's, as the user names them.
        group: "image", None, or the column of the groups.
        first: the first value of a column that is not empty, or None.

    Raises:
        ColumnError: a column named is not there, or none can be a prompt or a response.
    """
    names = dict(given)
    if group not in (None, "image"):
        names.setdefault("group", group)
    for ours, theirs in names.items():
        if ours not in COLUMNS:
            raise ColumnError(f"columns= names {ours!r}, which is none of ours: {', '.join(COLUMNS)}")
        if theirs not in found:
            raise _missing(ours, theirs, found)

    alike = {_plain_name(name): name for name in reversed(found)}

    def there(name: str) -> str | None:
        return name if name in found else alike.get(name)

    def take(ours: str, others: Sequence[str] = ()) -> None:
        usual = [(name, there(name)) for name in (ours, *others)]
        usual = [(name, column) for name, column in usual if column is not None]
        usual = [(name, column) for name, column in usual if name == ours or column not in names.values()]
        if ours not in names and usual:
            names[ours] = str(usual[0][1])

    for ours in ("id", "group", "label", "image", "prompt"):
        take(ours, _USUAL.get(ours, ()))
    take("references", [name for name in _USUAL["references"] if _is_list(first(there(name) or name))])
    take("response", _USUAL["response"])
    chat = next((there(name) for name in _CHATS if there(name) and "response" not in names), None)
    if chat is None:
        found_here = "response" in names and "response" not in given
        if found_here and "references" not in names and _is_list(first(names["response"])):
            names["references"] = names.pop("response")
        if not names.keys() & {"response", "references"}:
            take("response", _USUAL["references"])
        answered = bool(names.keys() & {"response", "references", "label"})
        # A text beside an answer is what was asked; alone with a picture, it is what the picture shows.
        text = there("text")
        if text is not None and text not in names.values():
            if answered and "prompt" not in names:
                names["prompt"] = text
            elif not answered and ("image" in names or "prompt" in names):
                names["response"] = text
        if not names.keys() & {"response", "references", "label"}:
            take("label", _CLASS)
        if not names.keys() & {"response", "references"} and "label" in names:
            names["response"] = names["label"]
        if "prompt" not in names and "image" not in names:
            raise _missing("prompt", "prompt", found)
        if not names.keys() & {"response", "references"}:
            raise _missing("response", "response", found)
    letters = tuple(letter for i, letter in enumerate(LETTERS) if set(LETTERS[: i + 1]) <= set(found))
    options = letters if len(letters) > 1 and chat is None and "prompt" in names else ()
    hint = "hint" if options and "hint" in found else None
    index = "index" if "index" in found and "image" in names and encoded_image(first(names["image"])) else None
    used = {*names.values(), *options, *filter(None, (chat, hint, index))}
    return Columns(names, chat, options, hint, index, tuple(name for name in found if name not in used))


def query_columns(found: Sequence[str]) -> dict[str, str]:
    """The table's column -> "image" or "prompt", of a table of queries whose columns have other usual names."""
    alike = {_plain_name(name): name for name in reversed(found)}
    renamed: dict[str, str] = {}
    for ours, there in (("image", ("image",)), ("prompt", ("prompt", "question"))):
        if not set(there) & set(found):
            usual = [alike[name] for name in (ours, *_USUAL[ours]) if name in alike]
            renamed |= {usual[0]: ours} if usual else {}
    return renamed


def _plain_name(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()


def _missing(ours: str, theirs: str, found: Sequence[str]) -> ColumnError:
    remedy = f"name it with columns={{{ours!r}: '<column>'}} (--columns {ours}=<column>)"
    if ours == "prompt":
        remedy += ", or give images, for which nothing need be asked (captioning, classification)"
    return ColumnError(
        f"expected a column {theirs!r}, got columns {', '.join(_brief(name) for name in found)}; {remedy}"
    )


def open_columns(
    data: datasets.Dataset | Sequence[Mapping[str, Any]], columns: Mapping[str, str], group: str | None = None
) -> tuple[Columns, Sequence[Mapping[str, Any]] | NamedClasses, datasets.Dataset | None]:
    """What the columns are for, the rows' texts, and (for a Dataset with a column of images) undecoded images."""
    import datasets

    if not len(data):
        raise no_rows()
    if not isinstance(data, datasets.Dataset):
        found = list(dict.fromkeys(name for row in data if isinstance(row, Mapping) for name in row))

        def first(name: str) -> Any:
            cells = (row.get(name) for row in data if isinstance(row, Mapping))
            return next(
                (cell for cell in cells if cell is not None and not (isinstance(cell, str) and not cell)), None
            )

        return match_columns(list(map(str, found)), columns, group, first), data, None

    data = data.with_format(None)
    plain = _undecoded(data)

    def first_stored(name: str) -> Any:
        if name not in plain.column_names:
            return None
        cells = (cell for batch in plain.select_columns([name]).iter(100) for cell in batch[name])
        return next((cell for cell in cells if cell is not None and not (isinstance(cell, str) and not cell)), None)

    match = match_columns(data.column_names, columns, group, first_stored)
    for ours, theirs in match.names.items():
        _check_feature(ours, theirs, data.features[theirs], first_stored)
    texts = [theirs for ours, theirs in match.names.items() if ours != "image"]
    texts += [name for name in (match.chat, match.hint, match.index, *match.options) if name]
    image = match.names.get("image")
    if image is not None and not _is_one_image(data.features[image]):
        texts.append(image)
        image = None
    rows = NamedClasses(plain.select_columns(list(dict.fromkeys(texts))))
    if image is None or getattr(data.features[image], "dtype", None) == "null":
        return match, rows, None
    images = data.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    return match, rows, images.cast_column("image", datasets.Image(decode=False))


def _undecoded(data: datasets.Dataset) -> datasets.Dataset:
    """The same rows, where lists of images are lists of bytes: a cast would write them anew."""
    import datasets

    lists = {n: f for n, f in data.features.items() if isinstance(getattr(f, "feature", None), datasets.Image)}
    if not lists:
        return data
    features = data.features | {name: datasets.List(datasets.Image(decode=False)) for name in lists}
    table = data.with_format("arrow")[:].replace_schema_metadata(None)
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(table, info=info, fingerprint=content_key(data._fingerprint, "undecoded"))


def _is_one_image(feature: Any) -> bool:
    import datasets

    is_struct = isinstance(feature, dict) and feature.keys() <= {"bytes", "path"}
    dtype = getattr(feature, "dtype", None)
    return (
        isinstance(feature, datasets.Image)
        or is_struct
        or dtype in ("string", "large_string", "null", "binary", "large_binary")
    )


def _check_feature(ours: str, theirs: str, feature: Any, first: Callable[[str], Any]) -> None:
    """Refuse a column by its type, before any row is read."""
    import datasets

    text = ("string", "large_string", "null")
    dtype = getattr(feature, "dtype", None)
    whole = isinstance(dtype, str) and "int" in dtype
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if ours == "image":
        expected, remedy = "an Image feature, paths or encoded bytes", "cast it to datasets.Image()"
        fits = _is_one_image(feature) or (inner is not None and _is_one_image(inner))
    elif ours == "references":
        expected, remedy = "lists of texts", "cast it with data.cast_column"
        answers = inner if isinstance(inner, dict) else feature if isinstance(feature, dict) else {}
        fits = dtype == "null" or "answer" in answers or getattr(inner, "dtype", None) in text
        fits = fits or (dtype in text and _is_list(first(theirs)))
    else:
        expected, remedy = "text", "cast it with data.cast_column"
        fits = isinstance(feature, datasets.ClassLabel) or dtype in text or (whole and ours != "prompt")
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


# Records


class Record(NamedTuple):
    """One row without its picture."""

    id: str
    prompt: str
    response: str
    references: tuple[str, ...]
    group: str | None
    label: str | None
    key: str
    query_key: str
    image_key: str


class MappedRecords(Sequence[Record]):
    """Rows of a `datasets.Dataset` whose columns are the fields of a record; none is held in memory."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows.select_columns(list(Record._fields)).with_format("arrow")

    @staticmethod
    def features() -> datasets.Features:
        """Of such a Dataset."""
        import datasets

        text = datasets.Value("string")
        return datasets.Features(dict.fromkeys(Record._fields, text) | {"references": datasets.List(text)})

    @classmethod
    def of(cls, records: Sequence[Record]) -> MappedRecords:
        """The same rows; a list's are then in Arrow's memory."""
        if isinstance(records, cls):
            return records
        import datasets

        return cls(datasets.Dataset(arrow_rows(records, cls.features().arrow_schema)))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        for batch in self._rows.iter(_BATCH):
            yield from _from_arrow(batch)

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...

    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        found = list(_from_arrow(self._rows[row]))
        return found if isinstance(row, slice) else found[0]

    def column(self, name: str) -> Iterator[str]:
        """One field of every row."""
        for batch in self._rows.select_columns([name]).iter(10 * _BATCH):
            yield from batch[name].to_pylist()

    def select(self, rows: list[int]) -> MappedRecords:
        return MappedRecords(self._rows.select(rows))

    def concat(self, other: MappedRecords) -> MappedRecords:
        import datasets

        return MappedRecords(datasets.concatenate_datasets([self._rows, other._rows]))


Records: TypeAlias = list[Record] | MappedRecords


def take(records: Records, rows: list[int]) -> Records:
    """Some rows, in the order given."""
    if isinstance(records, MappedRecords):
        return records.select(rows)
    return [records[row] for row in rows]


def joined(first: Records, second: Records) -> Records:
    """The rows of both; mapped where one of them is."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return MappedRecords.of(first).concat(MappedRecords.of(second))


def ids_of(records: Records) -> Iterable[str]:
    return records.column("id") if isinstance(records, MappedRecords) else (record.id for record in records)


def fingerprint_of(records: Records) -> str:
    """Hash of ids, content and groups in row order; 32 hex digits."""
    return texts_key(part for record in records for part in (record.id, record.key, record.group or ""))


def arrow_rows(records: Iterable[Record], schema: pa.Schema) -> pa.Table:
    """Rows as a table of Arrow, whose columns are the fields."""
    import pyarrow as pa

    return pa.Table.from_pylist([record._asdict() for record in records], schema=schema)


def _from_arrow(table: pa.Table) -> Iterator[Record]:
    for values in table.to_pylist():
        yield Record(**values | {"references": tuple(values["references"])})


# Rows


def check_rows(
    columns: Columns,
    texts: Sequence[Mapping[str, Any]] | NamedClasses,
    images: datasets.Dataset | None,
    *,
    skip: bool,
    root: ImageRoot,
    max_pixels: int,
    group: str | None = "image",
    check_image: Callable[[Image], None] | None = None,
    told: list[str] | None = None,
) -> tuple[list[Record], datasets.Dataset, list[tuple[int, str]]]:
    """Records and undecoded images of the rows that can be used, and (row, reason) of those that were skipped.

    Args:
        group: "image": rows of one picture that name no group of their own form one.
        check_image: raises ImageError for an image that can't be used.
        told: takes what was read otherwise than it stands; where left out, it is logged.
    """
    from tqdm.auto import tqdm

    names = columns.names
    check = RowCheck(columns, root=root, max_pixels=max_pixels, check_image=check_image)
    if columns.index and not isinstance(texts, NamedClasses):
        texts = _with_images_of_others(texts, columns.index, names["image"])
    if "id" in names:
        refuse_duplicate_ids(row.get(names["id"]) if isinstance(row, Mapping) else None for row in texts)

    records: list[Record] = []
    skipped: list[tuple[int, str]] = []
    moved: dict[int, dict[str, Any] | None] = {}  # sources that differ from what `images` holds
    first: dict[str, int] = {}  # id -> row
    repeated: list[str] = []
    rows: Any = texts if len(texts) <= _BAR_FROM else tqdm(texts, desc="checking rows", unit="row")
    for row, values in enumerate(rows):
        stored = images[row]["image"] if images is not None else None
        try:
            record, source = check(values, stored)
        except RowError as error:
            if skip:
                skipped.append((row, str(error)))
                continue
            named = f" (id {_brief(values.get(names['id']))})" if isinstance(values, Mapping) and "id" in names else ""
            remedy = (
                "correct the row (they are counted from 0), or pass on_bad_rows='skip' (--skip-bad-rows) to leave "
                "such rows out"
            )
            raise type(error)(f"row {row}{named}, {error}; {remedy}") from error
        if record.id in first:  # only where the id is the content's: given ids were compared above
            if skip:
                skipped.append((row, f"same image, prompt and response as row {first[record.id]}"))
            else:
                repeated.append(f"rows {first[record.id]} and {row} ({record.id})")
            continue
        first[record.id] = row
        if images is None or source != stored:
            moved[len(records)] = source
        records.append(record)
    if repeated:
        raise DuplicateIdError(
            "the table has no 'id' column, so ids come from the content, and rows have the same image, prompt "
            f"and response: {shorten(repeated)}; drop the copies, pass on_bad_rows='skip' (--skip-bad-rows), or "
            "add an 'id' column"
        )
    for said in check.said():
        if told is None:
            logger.info(said)
        else:
            told.append(said)
    held = None if images is None else images.select(list(first.values()))
    if held is None or moved:
        sources = (moved[i] if i in moved or held is None else held[i]["image"] for i in range(len(records)))
        held = image_dataset(image_column(sources), fingerprint=content_key(*(record.key for record in records)))
    return grouped_by_image(records) if group == "image" else records, held, skipped


def grouped_by_image(records: list[Record]) -> list[Record]:
    """Rows without a group join those of the same picture."""
    of_image: dict[str, str] = {}
    for record in records:
        if record.group is not None and record.image_key:
            of_image.setdefault(record.image_key, record.group)
    return [
        record._replace(group=of_image.get(record.image_key, record.image_key[:16]))
        if record.group is None and record.image_key
        else record
        for record in records
    ]


def _with_images_of_others(rows: Sequence[Mapping[str, Any]], index: str, image: str) -> list[Any]:
    """Rows with the image of the row that their image cell names, as VLMEvalKit writes pictures of several rows."""
    held = {str(row.get(index)): row.get(image) for row in rows if isinstance(row, Mapping)}

    def shown(row: Any) -> Any:
        name = row.get(image) if isinstance(row, Mapping) else None
        other = held.get(str(name)) if isinstance(name, (str, int)) and len(str(name)) <= 64 else None
        return row if other is None else {**row, image: other}

    return [shown(row) for row in rows]


def refuse_duplicate_ids(ids: Iterable[Any]) -> None:
    first: dict[str, int] = {}
    repeated = []
    for row, id in enumerate(ids):
        name = str(id) if _is_whole(id) else id
        if isinstance(name, str) and first.setdefault(name, row) != row:
            repeated.append(f"{_brief(name)} in rows {first[name]} and {row}")
    if repeated:
        raise DuplicateIdError(f"expected unique ids, got {shorten(repeated)}; remove or rename the copies")


def shorten(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


class RowCheck:
    """Turns one raw row into a record and the source of its image, or says what is wrong with it."""

    def __init__(
        self,
        columns: Columns,
        *,
        root: ImageRoot,
        max_pixels: int,
        check_image: Callable[[Image], None] | None = None,
    ) -> None:
        self.columns = columns
        self.names = columns.names
        self.root: ImageRoot = root if root is None or isinstance(root, tuple) else os.path.abspath(root)
        self.max_pixels = max_pixels
        self.check_image = check_image
        # A picture with twenty questions is one file: hash it once.
        self.file_key = functools.lru_cache(maxsize=4096)(self._file_key)
        self.blanks: dict[str, list[str]] = {}  # column -> cells with blanks around them
        self.later_turns = 0  # rows whose conversation goes on

    def said(self) -> list[str]:
        """What was read otherwise than it stands, a sentence each."""
        said = [
            f"column {name!r}: {len(cells)} cells are read without the blanks around them, such as {_brief(cells[0])}"
            for name, cells in self.blanks.items()
        ]
        if self.later_turns:
            said.append(f"column {self.columns.chat!r}: {self.later_turns} rows have later turns, which are not used")
        return said

    def __call__(self, values: Any, stored: dict[str, Any] | None) -> tuple[Record, dict[str, Any] | None]:
        if not isinstance(values, Mapping):
            raise RowError(f"expected a dict of columns, got {type(values).__name__}")
        raw = values.get(self.names["image"]) if "image" in self.names and stored is None else stored
        references: tuple[str, ...] = ()
        if self.columns.chat:
            prompt, response, shown = self._exchange(values.get(self.columns.chat))
            raw = shown if _is_absent(raw) else raw
        else:
            prompt = self._prompt(values)
            references = self._references(values)
            response = self._response(values, references)
        source, pixels_key = self.picture(raw)
        if source is None and not prompt.strip():
            where = [repr(self.names[ours]) for ours in ("image", "prompt") if ours in self.names]
            where = where or [repr(self.columns.chat)]
            if len(where) > 1:
                raise RowError(f"columns {' and '.join(where)}: expected at least one of the two, both are empty")
            raise RowError(f"column {where[0]}: expected an image, got none")
        key = content_key(pixels_key, prompt, response)
        label = self._optional(values, "label")
        if self.columns.options:
            label = label or response
        record = Record(
            id=self._text(values, "id", "a text that is not empty") if "id" in self.names else key[:16],
            prompt=prompt,
            response=response,
            references=references,
            group=self._optional(values, "group"),
            label=label,
            key=key,
            query_key=content_key(pixels_key, prompt),
            image_key=pixels_key,
        )
        return record, source

    # Texts

    def _text(self, values: Mapping[str, Any], ours: str, expected: str) -> str:
        name = self.names[ours]
        return _valid_text(values.get(name), name, expected)

    def _stripped(self, value: Any, name: str, expected: str) -> str:
        text = _valid_text(value, name, expected)
        if (stripped := text.strip()) != text:
            self.blanks.setdefault(name, []).append(text)
        return stripped

    def _optional(self, values: Mapping[str, Any], ours: str) -> str | None:
        name = self.names.get(ours)
        value = None if name is None else values.get(name)
        if name is None or _is_absent(value):
            return None
        if ours == "label" and name == self.names.get("response"):
            return _valid_text(value, name, "a text, or none").strip() or None
        if ours == "label":
            return self._stripped(value, name, "a text, or none") if str(value).strip() else None
        return _valid_text(value, name, "a text, or none")

    def _prompt(self, values: Mapping[str, Any]) -> str:
        name = self.names.get("prompt")
        if name is None:
            return ""
        prompt = values.get(name)
        if not isinstance(prompt, str) or not self.columns.options:
            return _valid_text(prompt, name, "text, '' where nothing is asked", may_be_empty=True)
        cells = [values.get(option) for option in self.columns.options]
        options = [str(cell) for cell in cells if not _is_absent(cell)]
        hint = values.get(self.columns.hint) if self.columns.hint else None
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        return "\n".join([*([] if _is_absent(hint) else [str(hint)]), prompt, *lines])

    def _response(self, values: Mapping[str, Any], references: tuple[str, ...]) -> str:
        expected = "a text that is not empty"
        if "response" in self.names:
            name = self.names["response"]
            return self._stripped(values.get(name), name, expected)
        name = self.names["references"]
        found = majority(references)
        if found is None:
            raise RowError(f"column {name!r}: expected at least one answer, got {_brief(values.get(name))}")
        return found

    def _references(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        name = self.names.get("references")
        value = None if name is None else values.get(name)
        if name is None or _is_absent(value):
            return ()
        found = _as_list(value)
        if found is None:
            raise RowError(f"column {name!r}: expected a list of texts, got {_brief(value)}")
        texts = [one["answer"] if isinstance(one, Mapping) and "answer" in one else one for one in found]
        if any(isinstance(one, Mapping) for one in found):  # VQAv2's annotators, some of whom said nothing
            texts = [text for text in texts if text != ""]
        return tuple(self._stripped(text, name, "a list of texts, none of them empty") for text in texts)

    def _exchange(self, value: Any) -> tuple[str, str, Any]:
        """Question and answer of a conversation's first exchange, and the image that one of its parts is."""
        name = self.columns.chat
        turns = _as_list(value)
        if not turns:
            raise RowError(f"column {name!r}: expected a list of turns, got {_brief(value)}")
        said: list[tuple[str, str]] = []
        image = None
        for turn in turns:
            role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
            content = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
            if not isinstance(role, str) or role not in _ROLES:
                raise RowError(f"column {name!r}: expected turns of user and assistant, got {_brief(turn)}")
            text, shown = _parts(content)
            if text is None:
                raise RowError(f"column {name!r}: expected turns with a text each, got {_brief(turn)}")
            image = image if image is not None else shown
            said.append((_ROLES[role], text))
        exchange = [turn for turn in said if turn[0] != "system"]
        if [role for role, _ in exchange[:2]] != ["user", "assistant"]:
            raise RowError(f"column {name!r}: expected a user's turn and an assistant's, got {_brief(turns)}")
        self.later_turns += len(exchange) > 2
        asked = re.sub(r"\s*<image>\s*", "\n", exchange[0][1]).strip()
        return (
            _valid_text(asked, str(name), "text", may_be_empty=True),
            self._stripped(exchange[1][1], str(name), "an answer that is not empty"),
            image,
        )

    # Pictures

    def picture(self, value: Any) -> tuple[dict[str, Any] | None, str]:
        """Source and hash of an image; None and "" where there is none."""
        try:
            return self._picture(value)
        except ImageError as error:
            name = self.names.get("image", "image")
            raise ImageError(f"column {name!r}: {str(error).removeprefix(_AT_IMAGE)}") from error

    def _picture(self, value: Any) -> tuple[dict[str, Any] | None, str]:
        if isinstance(value, (list, tuple)):
            if len(value) > 1:
                raise ImageError(f"expected one image, got a list of {len(value)}; give each its own row")
            value = value[0] if value else None
        if value is None:
            return None, ""
        if is_image(value) and not isinstance(value, (str, os.PathLike, bytes, bytearray)):
            # Saved anew even if it came from a file: it may have been drawn on since it was opened.
            image = self.decode(value)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return {"bytes": buffer.getvalue(), "path": None}, image_key(image)
        if isinstance(value, (str, os.PathLike)):
            value = {"path": os.fspath(value)}
        elif isinstance(value, (bytes, bytearray)):
            value = {"bytes": bytes(value)}
        if not isinstance(value, Mapping) or not value.keys() <= {"bytes", "path"}:
            raise ImageError(
                "expected a PIL image, an array, a path, encoded bytes or {'bytes', 'path'}, got "
                f"{type(value).__name__}"
            )
        data, path = value.get("bytes"), value.get("path")
        if data is None and (data := encoded_image(path)) is not None:
            path = None
        if data is not None:
            source = {"bytes": data, "path": path}
            return source, image_key(self.decode(source))
        if not path:
            return None, ""
        path = self._resolve(path)
        return {"bytes": None, "path": path}, self.file_key(path)

    def decode(self, source: Any) -> Image:
        image = decode(source, max_pixels=self.max_pixels)
        if self.check_image is not None:
            self.check_image(image)
        return image

    def _file_key(self, path: str) -> str:
        return image_key(self.decode({"bytes": None, "path": path}))

    def _resolve(self, path: str) -> str:
        if "://" in path:
            raise ImageError(f"expected a local file, got the address {_brief(path)}; download it first")
        if "\0" in path:
            raise ImageError(f"expected a path, got {_brief(path)}; correct it")
        if isinstance(self.root, tuple):
            full = os.path.normpath(path)
            folders = [folder for folder in self.root if os.path.isabs(full) and Path(full).is_relative_to(folder)]
            if not any(not leads_outside(full, folder) for folder in folders):
                raise ImageError(
                    f"expected the image itself, as a data set of the Hub holds it, got the name of a file: "
                    f"{_brief(path)}; files of this machine are not read for it, unless image_root= names their folder"
                )
        elif self.root is None:
            full = os.path.abspath(path)
        else:
            if "\\" in path and not os.path.exists(os.path.join(self.root, path)):
                path = path.replace("\\", "/")  # as Windows writes it
            full = os.path.normpath(os.path.join(self.root, path))
            leaves = "" if Path(full).is_relative_to(self.root) else "leaves it"
            if not leaves and leads_outside(full, self.root):
                leaves = "is a link that leaves it"
            if leaves:
                raise ImageError(
                    f"expected a path inside {self.root}, {_brief(path)} {leaves}; "
                    "pass image_root= with the folder that holds the images"
                )
        if not os.path.exists(full):
            raise ImageError(f"no such file: {_tail(full)}")
        if not os.path.isfile(full):  # a pipe would never end
            raise ImageError(f"expected a file, {_brief(path)} is none; name the image")
        return full


_AT_IMAGE = "column 'image': "


# Cells


def _valid_text(value: Any, column: str, expected: str, *, may_be_empty: bool = False) -> str:
    if _is_whole(value) and not may_be_empty:
        return str(int(value))
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        kind = "a truth value" if isinstance(value, bool) else "a number" if isinstance(value, numbers.Real) else ""
        meant = f", {kind}; write it as the text that is meant" if kind else ""
        raise RowError(f"column {column!r}: expected {expected}, got {_brief(value)}{meant}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"column {column!r}: expected valid Unicode, got half a surrogate pair ({error})") from error
    return value


def _is_whole(value: Any) -> bool:
    """Whether a cell is a whole number, which loses nothing as text."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _is_list(value: Any) -> bool:
    return _as_list(value) is not None


def _as_list(value: Any) -> list[Any] | None:
    """A cell's list: one, an array, or the text of one in JSON or as Python writes it; None where it is no list."""
    if isinstance(value, str):
        text = value.strip()
        if not (text.startswith("[") and text.endswith("]")):
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return None
    if isinstance(value, Mapping) and isinstance(value.get("answer"), (list, tuple)):
        return [{"answer": answer} for answer in value["answer"]]  # a struct of lists, as datasets once had it
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else None


def _parts(content: Any) -> tuple[str | None, Any]:
    """Text of a turn, and the image that is a part of it; None where it is neither a text nor parts."""
    if isinstance(content, str):
        return content, None
    parts = _as_list(content)
    if parts is None or not all(isinstance(part, (Mapping, str)) for part in parts):
        return None, None
    texts, image = [], None
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
        url = part.get("image_url")
        shown = [part.get(key) for key in ("image", "path", "url")]
        shown += [url.get("url") if isinstance(url, Mapping) else url]
        image = image if image is not None else next((one for one in shown if not _is_absent(one)), None)
    return "\n".join(texts), image


#: How files of the usual formats begin.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")


def encoded_image(text: Any) -> bytes | None:
    """The image that a text is in base64, bare or as a data URI, or as Python writes bytes; None where it is none."""
    if not isinstance(text, str) or len(text) < 32:
        return None
    if text.startswith(("b'", 'b"', "{'bytes'")):
        try:
            written: Any = ast.literal_eval(text)
            written = written.get("bytes") if isinstance(written, dict) else written
            if isinstance(written, bytes) and written.startswith(_BEGINNINGS):
                return written
            text = written.decode("ascii") if isinstance(written, bytes) else ""
        except (AttributeError, ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    data = base64_bytes(text)
    is_image_file = data is not None and (text[:5].lower() == "data:" or data.startswith(_BEGINNINGS))
    return data if is_image_file else None


def majority(texts: Iterable[Any]) -> str | None:
    """Most frequent text, the earliest of equals; None where there is none."""
    counted = Counter(text for text in texts if isinstance(text, str))
    return counted.most_common(1)[0][0] if counted else None


def _tail(path: str) -> str:
    """The end of a path, which tells files apart."""
    shown = repr(path[-200:])
    return shown if len(path) <= 200 and len(shown) <= 200 else f"'…{shown[-180:].lstrip(chr(39))}"


def _brief(value: Any) -> str:
    if isinstance(value, (str, bytes)):
        value = value[:100]  # the repr of a whole file is long in coming
    shown = repr(value)
    return f"{shown[:77]}..." if len(shown) > 80 else shown
