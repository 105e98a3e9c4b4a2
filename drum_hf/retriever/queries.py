"""What a retriever is asked: rows as queries, and as items for the encoder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import ColumnError, ImageError, RowError
from ..types import Demonstration, Query

__all__ = ["Queries", "SizedItems", "as_item", "as_query", "in_chunks", "name_query"]

_QUERY_KEYS = frozenset({"image", "prompt", "question", "draft", "id", "group"})
#: Columns of a table that a query has no use for: gold answers are never looked at.
_LEFT_ASIDE = frozenset({"response", "references", "label"})

Queries = Iterable["Query | Demonstration | Mapping[str, Any]"]


class SizedItems:
    """Items made while they are read, whose number is known, for a progress bar."""

    def __init__(self, rows: Any, items: Callable[[Any], Iterator[dict[str, Any]]]) -> None:
        self._rows, self._items = rows, items

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._items(self._rows)


def as_query(row: Query | Demonstration | Mapping[str, Any]) -> Query:
    """A query as it was given; of a demonstration or a dict, without its response.

    Raises:
        ColumnError, RowError, ImageError: it can't be used.
    """
    if isinstance(row, Query):
        return row
    if isinstance(row, Demonstration):
        return Query(row.image, row.prompt, None, row.id, row.group)
    if not isinstance(row, Mapping):
        raise ColumnError(f"expected a query: a Query, or a dict with 'image' and 'prompt', got {type(row).__name__}")
    unknown = row.keys() - _QUERY_KEYS - _LEFT_ASIDE
    if unknown or not row.keys() & {"image", "prompt", "question"} or {"prompt", "question"} <= row.keys():
        raise ColumnError(
            "expected a query with 'image' and 'prompt' (or 'question'), optionally 'draft', 'id' and 'group', got "
            f"{', '.join(map(repr, row)) or 'an empty dict'}; rename the columns"
        )
    texts = {key: row.get(key) for key in ("prompt", "question", "draft", "id", "group")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise RowError(f"column {key!r}: expected a text, got {type(value).__name__}; convert it with str()")
    prompt = texts["prompt"] or texts["question"] or ""
    return Query(_image(row.get("image")), prompt, texts["draft"], texts["id"], texts["group"])


def _image(source: Any) -> Any:
    from PIL.Image import Image

    if source is None or isinstance(source, Image):
        return source
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        raise ImageError(
            f"column 'image': expected a PIL image, a path or a URL, got {type(source).__name__}; "
            "decode it first, as with PIL.Image.open"
        )
    from transformers.image_utils import load_image

    try:
        return load_image(source)
    except (OSError, ValueError) as error:
        raise ImageError(f"column 'image': {source!r:.200} can't be read ({error}); give an image file") from error


def as_item(image: Any, prompt: str, response: str | None, used: tuple[str, ...], name: str) -> dict[str, Any]:
    """What `JointEncoder` takes; one of the parts `used` must be there.

    Raises:
        RowError: none is; names the item by `name`.
    """
    there = {"image": image is not None, "prompt": bool(prompt.strip()), "response": bool((response or "").strip())}
    if not any(there[part] for part in used):
        has = ", ".join(part for part in there if there[part]) or "nothing"
        raise RowError(
            f"{name}: expected at least one of {', '.join(used)}, which the strategy compares, got {has}; "
            "leave it out, or choose another strategy"
        )
    return {"image": image, "text": [prompt, response]}


def name_query(id: str | None, position: int) -> str:
    return f"query {position}" if id is None else f"query {id!r}"


def in_chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
