"""Rows of a concept-labelled table: which columns are ours, and whether a row's texts can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...data.rows import LETTERS, NamedClasses
from ...data.table import TripletTable
from ...errors import ColumnError, EmptySupportError, RowError

CONCEPT_COLUMNS = ("image", "concepts", "question", "answer", "options", "caption")


def match_concept_columns(data: Any, columns: Mapping[str, str], concepts: Mapping[str, str] | None) -> dict[str, str]:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        raise ColumnError(f"expected one table, got a DatasetDict; pass one of its splits: {', '.join(data)}")
    if not isinstance(data, (datasets.Dataset, Sequence)) or isinstance(data, (str, bytes)):
        raise ColumnError(f"expected a datasets.Dataset or a list of dicts, got {type(data).__name__}")
    if not len(data):
        raise EmptySupportError("expected at least one row about a concept, got a table without rows; give rows")
    if isinstance(data, datasets.Dataset):
        found = data.column_names
    else:
        found = list(dict.fromkeys(name for row in data if isinstance(row, Mapping) for name in row))
    unknown = [ours for ours in columns if ours not in CONCEPT_COLUMNS]
    if unknown:
        raise ColumnError(f"columns= names {unknown[0]!r}, which is none of ours: {', '.join(CONCEPT_COLUMNS)}")
    names = {ours: columns.get(ours, ours) for ours in CONCEPT_COLUMNS}
    needed = {"image", *columns} | (set() if concepts else {"concepts"})
    for ours, theirs in [*((o, n) for o, n in names.items() if o in needed), *(concepts or {}).items()]:
        if theirs not in found:
            remedy = "name label columns with concepts={'<concept>': '<column>'}, and others with columns="
            raise ColumnError(f"expected a column {theirs!r} ({ours}), got {', '.join(map(repr, found))}; {remedy}")
    return names


def open_texts(
    data: Any, image: str, *, on_bad_rows: Any, image_root: Any, max_pixels: int
) -> tuple[TripletTable, Sequence[Mapping[str, Any]]]:
    """Pictures by row number, checked by the table that holds them, and the rows' texts."""
    import datasets

    held: Any
    texts: Any
    if isinstance(data, datasets.Dataset):
        data = data.with_format(None)
        numbers = [str(n) for n in range(len(data))]
        held = data.select_columns([image])
        held = held if image == "image" else held.rename_column(image, "image")
        dummies = ["-"] * len(data)
        held = held.add_column("id", numbers).add_column("prompt", dummies).add_column("response", dummies)
        texts = list(NamedClasses(data.remove_columns([image])))
    else:
        for number, row in enumerate(data):
            if not isinstance(row, Mapping):
                raise RowError(f"row {number}: expected a dict of columns, got {type(row).__name__}")
        held = [{"id": str(n), "image": row.get(image), "prompt": "-", "response": "-"} for n, row in enumerate(data)]
        texts = data
    pictures = TripletTable.from_dataset(held, on_bad_rows=on_bad_rows, image_root=image_root, max_pixels=max_pixels)
    return pictures, texts


def triplet_texts(table: TripletTable) -> list[dict[str, Any]]:
    if not table.label_set:
        raise ColumnError("expected a TripletTable with labels, this one has none; read it with columns={'label': …}")
    columns = zip(table.prompts, table.responses, table.labels, strict=True)
    return [{"prompt": prompt, "response": response, "label": label} for prompt, response, label in columns]


def row_check(
    columns: Mapping[str, str], concepts: Mapping[str, str] | None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    names = {ours: columns.get(ours, ours) for ours in CONCEPT_COLUMNS}

    def check(row: Mapping[str, Any]) -> dict[str, Any]:
        if concepts:
            labels: Any = {concept: row.get(column) for concept, column in concepts.items()}
        else:
            labels = row.get(names["concepts"])
        where = f"column {names['concepts']!r}"
        if not isinstance(labels, Mapping):
            raise RowError(f"{where}: expected {{name: value}}, got {labels!r}")
        known = {c: _value(v, f"{where}, concept {c!r}") for c, v in labels.items() if v is not None and v != ""}
        texts = {ours: _text(row.get(names[ours]), names[ours]) for ours in ("question", "answer", "caption")}
        return {"concepts": known, **texts, "options": _options(row.get(names["options"]), texts["answer"])}

    return check


def _value(value: Any, where: str) -> str:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: expected a text or a whole number, got {value!r}")
    return value.strip()


def _text(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r}: expected text, or none, got {value!r}")
    return (value or "").strip()


def _options(options: Any, answer: str) -> tuple[str, ...]:
    if options is None or not len(options):
        return ()
    if isinstance(options, str) or not all(isinstance(option, str) and option.strip() for option in options):
        raise RowError(f"column 'options': expected a list of texts, none of them empty, got {options!r}")
    options = tuple(option.strip() for option in options)
    if not 2 <= len(set(options)) == len(options) <= len(LETTERS):
        raise RowError(f"column 'options': expected 2 to {len(LETTERS)} different texts, got {options!r}")
    if answer not in options:
        raise RowError(f"column 'options': expected the answer {answer!r} among them, got {options!r}")
    return options
