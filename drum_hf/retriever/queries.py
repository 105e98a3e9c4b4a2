"""What is asked: whatever users have, parsed as queries, and queries as items for the encoder."""

from __future__ import annotations

import difflib
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from ..data.rows import query_columns
from ..errors import ColumnError, ImageError, RowError
from ..types import Demonstration, Query, trusted
from ..utils.images import is_image, load_image

__all__ = [
    "Queries",
    "SizedItems",
    "as_item",
    "as_queries",
    "as_query",
    "as_rows",
    "in_chunks",
    "is_single",
    "name_query",
]

_KEYS = ("image", "prompt", "question", "draft", "id", "group")
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


def is_single(given: Any) -> bool:
    """Whether it is one query rather than several: a Query, a Demonstration, a dict, or an image."""
    return isinstance(given, (Query, Demonstration, Mapping)) or is_image(given)


def as_query(
    given: Any,
    *,
    name: str = "query",
    default_prompt: Callable[[], str] = str,
    urls: bool | Literal["private"] = False,
    timeout: float = 20.0,
) -> Query:
    """Parse one query.

    Args:
        given: a `Query` or a `Demonstration`, whose response is left aside; a dict with `image`, `prompt` (or
            `question`) and, where wanted, `draft`, `id` and `group`, of which a table's other columns (`response`,
            `references`, `label`) are left aside; or an image alone. Images are whatever
            [`load_image`][drum_hf.data.load_image] takes; `id` and `group` may be integers.
        name: names the query in errors, where it has no id.
        default_prompt: gives what is asked where the query asks nothing.
        urls, timeout: of images, as in `load_image`.

    Raises:
        ColumnError: a key is unknown, or there are a prompt and a question.
        RowError: a value is of another type, or there is neither an image nor a prompt.
        ImageError: the image can't be read.
    """
    if isinstance(given, Query):
        query = given
    elif isinstance(given, Demonstration):
        query = trusted(Query, image=given.image, prompt=given.prompt, id=given.id, group=given.group)
    else:
        if not isinstance(given, Mapping) and not is_image(given):
            raise ColumnError(
                f"{name}: expected a Query, a dict with 'image' and 'prompt', or an image, got {type(given).__name__}"
            )
        image_alone = not isinstance(given, Mapping) or (given and given.keys() <= {"bytes", "path"})
        row = {"image": given} if image_alone else given
        _refuse_keys(row, name)
        id, group = (_name(row, key, name) for key in ("id", "group"))
        name = name if id is None else f"query {id!r}"
        prompt = next((row[key] for key in ("question", "prompt") if row.get(key) is not None), None)
        prompt = default_prompt() if prompt is None else prompt
        draft = row.get("draft")
        for key, text in (("prompt", prompt), ("draft", draft)):
            if text is not None and not isinstance(text, str):
                raise RowError(
                    f"{name}, column {key!r}: expected a text, got {type(text).__name__}; convert it with str()"
                )
        image = row.get("image")
        try:
            image = None if image is None else load_image(image, urls=urls, timeout=timeout)
        except ImageError as error:
            hint = "; a query is an image, or a dict with 'image' and 'prompt'" if image_alone else ""
            raise ImageError(f"{name}, column 'image': {error}{hint}") from error
        query = Query(image, prompt, draft, id, group)
    if query.image is None and not query.prompt.strip():
        name = name if query.id is None else f"query {query.id!r}"
        raise RowError(f"{name}: expected an image or a prompt, both are empty; give one of them")
    return query


def _refuse_keys(row: Mapping[str, Any], name: str) -> None:
    expected = "'image' and 'prompt' (or 'question'), optionally 'draft', 'id' and 'group'"
    unknown = [key for key in row if key not in _KEYS and key not in _LEFT_ASIDE]
    for key in unknown:
        near = difflib.get_close_matches(str(key), _KEYS, n=1)
        hint = f" (is it {near[0]!r}?)" if near else ""
        raise ColumnError(f"{name}: expected {expected}, got the unknown key {key!r}{hint}; rename or remove it")
    if not row.keys() & {"image", "prompt", "question"}:
        raise ColumnError(f"{name}: expected {expected}, got {', '.join(map(repr, row)) or 'an empty dict'}")
    if row.get("prompt") is not None and row.get("question") is not None:
        raise ColumnError(
            f"{name}: expected one of 'prompt' and 'question', which mean the same, got both; remove one"
        )


def _name(row: Mapping[str, Any], key: str, name: str) -> str | None:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    raise RowError(f"{name}, column {key!r}: expected a text or an integer, got {type(value).__name__}")


def as_queries(rows: Iterable[Any]) -> Iterator[Query]:
    """Parse queries one by one; errors give the place of one without an id."""
    return (as_query(row, name=name_query(None, position)) for position, row in enumerate(rows))


def as_rows(rows: Any) -> Any:
    """Rows of a data frame or a data set of `datasets`: of its columns those that a query may have, by the names that
    [`load_table`][drum_hf.data.load_table] knows for them.

    Images stay undecoded: we decode them within our bounds. A single split stands for its DatasetDict. Whatever else
    comes back as it is.

    Raises:
        ColumnError: it is several data sets.
    """
    import datasets

    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if len(rows) == 1:
            return as_rows(next(iter(rows.values())))
        raise ColumnError(f"expected queries, got a {type(rows).__name__}; pass one of its splits: {', '.join(rows)}")
    if isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        for theirs, name in query_columns(rows.column_names or ()).items():
            rows = rows.rename_column(theirs, name)
        ours = [name for name in rows.column_names or () if name in _KEYS]
        rows = rows.select_columns(ours) if ours else rows
        if isinstance((rows.features or {}).get("image"), datasets.Image):
            rows = rows.cast_column("image", datasets.Image(decode=False))
    elif hasattr(rows, "columns") and (hasattr(rows, "to_dicts") or hasattr(rows, "to_dict")):  # polars or pandas
        renamed = query_columns(list(map(str, rows.columns)))
        rows = rows.rename(renamed) if hasattr(rows, "to_dicts") else rows.rename(columns=renamed)
        ours = [name for name in rows.columns if name in _KEYS]
        rows = rows[ours] if ours else rows
        rows = rows.to_dicts() if hasattr(rows, "to_dicts") else rows.to_dict("records")
    return rows


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
