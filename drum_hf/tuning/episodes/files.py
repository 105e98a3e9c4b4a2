"""What the readers of public formats share: JSON files, rows one by one, images left encoded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...errors import RowError, SavedFileError
from ...utils.files import refuse_special

OnBadRows = Literal["raise", "skip"]
Made = TypeVar("Made")

_BAR_FROM = 1000  # rows; a shorter check is over before a progress bar could be read


def read_json(path: str | os.PathLike[str], inside: str = "") -> list[Any]:
    path = Path(path)
    try:
        refuse_special(path)
        text = path.read_text("utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        data = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except FileNotFoundError as error:
        raise SavedFileError(f"{path}: expected a JSON file, found none; check the path") from error
    except (ValueError, RecursionError, OSError) as error:
        raise SavedFileError(f"{path}: expected JSON ({error}); correct it, or download it again") from error
    if inside and isinstance(data, dict):
        data = data.get(inside)
    if not isinstance(data, list):
        raise SavedFileError(f"{path}: expected a list of rows, got {type(data).__name__}; give the file of rows")
    return data


def undecoded(data: Any) -> Sequence[Any]:
    """Rows whose images are not decoded yet."""
    import datasets

    if not isinstance(data, datasets.Dataset):
        return data
    data = data.with_format(None)
    for name, feature in data.features.items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return data


def read_each(
    rows: Iterable[Any], total: int, read: Callable[[Any], Made], on_bad_rows: str
) -> Iterator[tuple[int, Made | None, str]]:
    """(row number, what `read` makes of it, "") or (row number, None, reason) for each row."""
    from tqdm.auto import tqdm

    if on_bad_rows not in ("raise", "skip"):
        raise ValueError(f"expected on_bad_rows 'raise' or 'skip', got {on_bad_rows!r}")
    for number, row in enumerate(rows if total <= _BAR_FROM else tqdm(rows, desc="reading rows", unit="row")):
        try:
            yield number, read(row), ""
        except RowError as error:
            if on_bad_rows == "raise":
                remedy = "correct the row, or pass on_bad_rows='skip' to leave such rows out"
                raise type(error)(f"row {number}, {error}; {remedy}") from error
            yield number, None, str(error)
