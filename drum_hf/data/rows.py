"""Raw rows to records with content hashes, or what is wrong with which row."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DuplicateIdError, ImageError, RowError
from ..types import content_key, image_key
from ..utils.files import leads_outside
from .columns import NamedClasses
from .images import decode, image_column, image_dataset
from .records import Record

if TYPE_CHECKING:
    import datasets

_BAR_FROM = 1000  # rows; a shorter check is over before a progress bar could be read


def check_rows(
    names: Mapping[str, str],
    texts: Sequence[Mapping[str, Any]] | NamedClasses,
    images: datasets.Dataset | None,
    *,
    skip: bool,
    root: str | os.PathLike[str] | None,
    max_pixels: int,
) -> tuple[list[Record], datasets.Dataset, list[tuple[int, str]]]:
    """Records and undecoded images of the rows that can be used, and (row, reason) of those that were skipped."""
    from tqdm.auto import tqdm

    check = _RowCheck(names, root=root, max_pixels=max_pixels)
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
    held = None if images is None else images.select(list(first.values()))
    if held is None or moved:
        sources = (moved[i] if i in moved or held is None else held[i]["image"] for i in range(len(records)))
        held = image_dataset(image_column(sources), fingerprint=content_key(*(record.key for record in records)))
    return records, held, skipped


def refuse_duplicate_ids(ids: Iterable[Any]) -> None:
    first: dict[str, int] = {}
    repeated = []
    for row, id in enumerate(ids):
        if isinstance(id, str) and first.setdefault(id, row) != row:
            repeated.append(f"{id!r} in rows {first[id]} and {row}")
    if repeated:
        raise DuplicateIdError(f"expected unique ids, got {shorten(repeated)}; remove or rename the copies")


def shorten(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


class _RowCheck:
    """Turns one raw row into a record and the source of its image, or says what is wrong with it."""

    def __init__(self, names: Mapping[str, str], *, root: str | os.PathLike[str] | None, max_pixels: int) -> None:
        self.names = names
        self.root = None if root is None else os.path.abspath(root)
        self.decode = functools.partial(decode, max_pixels=max_pixels)
        # A picture with twenty questions is one file: hash it once.
        self.file_key = functools.lru_cache(maxsize=4096)(self._file_key)

    def __call__(self, values: Any, stored: dict[str, Any] | None) -> tuple[Record, dict[str, Any] | None]:
        if not isinstance(values, Mapping):
            raise RowError(f"expected a dict of columns, got {type(values).__name__}")
        prompt = self._text(values, "prompt", "text, '' where nothing is asked", may_be_empty=True)
        response = self._text(values, "response", "a text that is not empty")
        raw = values.get(self.names["image"]) if "image" in self.names and stored is None else stored
        source, pixels_key = self._picture(raw)
        if source is None and not prompt.strip():
            raise RowError("columns 'image' and 'prompt': expected at least one of the two, both are empty")
        key = content_key(pixels_key, prompt, response)
        record = Record(
            id=self._text(values, "id", "a text that is not empty") if "id" in self.names else key[:16],
            prompt=prompt,
            response=response,
            references=self._references(values),
            group=self._optional(values, "group"),
            label=self._optional(values, "label"),
            key=key,
            query_key=content_key(pixels_key, prompt),
            image_key=pixels_key,
        )
        return record, source

    def _text(self, values: Mapping[str, Any], ours: str, expected: str, *, may_be_empty: bool = False) -> str:
        name = self.names[ours]
        return _valid_text(values.get(name), name, expected, may_be_empty=may_be_empty)

    def _optional(self, values: Mapping[str, Any], ours: str) -> str | None:
        if ours not in self.names or values.get(self.names[ours]) in (None, ""):
            return None
        return self._text(values, ours, "a text, or none")

    def _references(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        name = self.names.get("references")
        found = None if name is None else values.get(name)
        if name is None or found is None:
            return ()
        if not isinstance(found, (list, tuple)):
            raise RowError(f"column {name!r}: expected a list of texts, got {_brief(found)}")
        return tuple(_valid_text(item, name, "a list of texts, none of them empty") for item in found)

    def _picture(self, value: Any) -> tuple[dict[str, Any] | None, str]:
        """Source and hash of an image; None and "" where there is none."""
        from PIL import Image

        if value is None:
            return None, ""
        if isinstance(value, Image.Image):
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
                "column 'image': expected a PIL image, a path, encoded bytes or {'bytes', 'path'}, "
                f"got {type(value).__name__}"
            )
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            source = {"bytes": data, "path": path}
            return source, image_key(self.decode(source))
        if not path:
            return None, ""
        path = self._resolve(path)
        return {"bytes": None, "path": path}, self.file_key(path)

    def _file_key(self, path: str) -> str:
        return image_key(self.decode({"bytes": None, "path": path}))

    def _resolve(self, path: str) -> str:
        if "://" in path:
            raise ImageError(f"column 'image': expected a local file, got the address {path!r}; download it first")
        if "\0" in path:
            raise ImageError(f"column 'image': expected a path, got {path!r}; correct it")
        full = os.path.abspath(path) if self.root is None else os.path.normpath(os.path.join(self.root, path))
        if self.root is not None:
            leaves = "" if Path(full).is_relative_to(self.root) else "leaves it"
            if not leaves and leads_outside(full, self.root):
                leaves = "is a link that leaves it"
            if leaves:
                raise RowError(
                    f"column 'image': expected a path inside {self.root}, {path!r} {leaves}; "
                    "pass image_root= with the folder that holds the images"
                )
        if os.path.exists(full) and not os.path.isfile(full):  # a pipe would never end
            raise ImageError(f"column 'image': expected a file, {path!r} is none; name the image")
        return full


def _valid_text(value: Any, column: str, expected: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise RowError(f"column {column!r}: expected {expected}, got {_brief(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"column {column!r}: expected valid Unicode, got half a surrogate pair ({error})") from error
    return value


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:77]}..." if len(shown) > 80 else shown
