"""What a table holds and what is wrong with it, all problems at once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DrumError, EmptySupportError
from .columns import COLUMNS
from .loading import OpenTable, open_table
from .sources import find_source, load_triplets
from .table import TripletTable

_FEW = 3


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What `check_table` found; JSON-ready by `dataclasses.asdict`.

    Attributes:
        path: as it was given.
        kind: what is there, such as "csv file".
        columns: our column -> the table's, of all that are used.
        unused: columns that are left behind.
        rows: rows that can be used; 0 where the table as a whole can't.
        images, groups, labels: how many different ones these rows have.
        references: rows with several gold answers.
        without_image, without_prompt: rows that lack it.
        examples: a few rows as ids and texts.
        problems: what stops the whole table, as messages; empty if nothing does.
        bad_rows: (row number from 0, what is wrong with it) of every row that can't be used.
        notes: what works but may not be meant.
    """

    path: str
    kind: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)
    rows: int = 0
    images: int = 0
    groups: int = 0
    labels: int = 0
    references: int = 0
    without_image: int = 0
    without_prompt: int = 0
    examples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    bad_rows: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row can be used as it stands."""
        return not self.problems and not self.bad_rows


def check_table(
    path: str | os.PathLike[str],
    *,
    source: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> TableReport:
    """Read a table as `load_table` would, and report instead of raising.

    Args:
        path: what `load_table` takes; with `source`, a local copy of that data set.
        source: a name of `SOURCES`: the copy must have its columns.
        split: as `load_table` takes it; with `source`, as `load_triplets` does ("support" where left out).
        columns, image_root: as in `load_table`; not with `source`.
        limit: with `source`, check the first so many rows only.

    Raises:
        ValueError: there is no data set called `source`, or `columns` came with it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> table = Path(tempfile.mkdtemp()) / "table.csv"
        >>> _ = table.write_text("question,answer\\nWhat colour is grass?,green\\nWho knows?,\\n")
        >>> report = check_table(table)
        >>> report.rows, report.bad_rows
        (1, [(1, "column 'answer': expected a text that is not empty, got ''")])
    """
    name = os.fspath(path)
    if source is not None:
        if columns or image_root:
            raise ValueError(f"columns= and image_root= are for tables of your own; {source!r} names its columns")
        entry = find_source(source)
        part = entry.part(split or "support")
        about: dict[str, Any] = {"kind": f"{entry.title}, {part.split}", "columns": {}, "unused": []}
        load = functools.partial(
            load_triplets, entry, split=split or "support", data_dir=path, limit=limit, on_bad_rows="skip"
        )
        return _report(name, about, load, [])
    faults: list[str] = []
    try:
        opened = open_table(path, split=split, columns=columns, image_root=image_root, faults=faults)
    except (DrumError, ValueError) as error:
        return TableReport(name, problems=[*faults, _said(error)])
    return _report(name, _columns(opened), functools.partial(_load, opened), faults)


def _load(opened: OpenTable) -> TripletTable:
    if opened.saved is not None:
        return TripletTable.load(opened.saved)
    return TripletTable.from_dataset(opened.rows, on_bad_rows="skip", columns=opened.columns, image_root=opened.root)


def _columns(opened: OpenTable) -> dict[str, Any]:
    if opened.saved is not None:
        return {"kind": opened.kind, "columns": {name: name for name in COLUMNS}, "unused": []}
    if isinstance(opened.rows, list):
        found = list(dict.fromkeys(name for row in opened.rows if isinstance(row, dict) for name in row))
    else:
        found = list(opened.rows.column_names)
    used = {ours: opened.columns.get(ours, ours) for ours in COLUMNS}
    used = {ours: theirs for ours, theirs in used.items() if theirs in found}
    return {"kind": opened.kind, "columns": used, "unused": [name for name in found if name not in used.values()]}


def _report(path: str, about: dict[str, Any], load: Callable[[], TripletTable], problems: list[str]) -> TableReport:
    try:
        table = load()
    except EmptySupportError as error:
        problems = [*problems, "no row can be used" if error.skipped else _said(error)]
        return TableReport(path, **about, problems=problems, bad_rows=error.skipped)
    except (DrumError, ValueError) as error:
        return TableReport(path, **about, problems=[*problems, _said(error)])
    groups = [group for group in table.groups if group is not None]
    return TableReport(
        path,
        **about,
        rows=len(table),
        images=len(set(table.image_keys) - {""}),
        groups=len(set(groups)),
        labels=len(table.label_set),
        references=sum(len(texts) > 1 for texts in table.references),
        without_image=table.image_keys.count(""),
        without_prompt=sum(not prompt.strip() for prompt in table.prompts),
        examples=[
            {"id": id, "prompt": prompt, "response": response}
            for id, prompt, response in zip(
                table.ids[:_FEW], table.prompts[:_FEW], table.responses[:_FEW], strict=True
            )
        ],
        problems=problems,
        bad_rows=table.skipped,
        notes=_notes(table),
    )


def _notes(table: TripletTable) -> list[str]:
    notes = []
    rows_of: defaultdict[str, set[str | None]] = defaultdict(set)
    count = Counter(key for key in table.image_keys if key)
    for id, key, group in zip(table.ids, table.image_keys, table.groups, strict=True):
        rows_of[key].add(f"row {id}" if group is None else f"group {group}")
    loose = sum(count[key] > 1 and len(rows_of[key]) > 1 for key in count)
    if loose:
        notes.append(
            f"{loose} images stand in several rows that no group joins: a row may demonstrate another question about "
            "its own image; give such rows the same 'group'"
        )
    if len(table.label_set) == 1:
        notes.append(f"every label is {table.label_set[0]!r}: there is nothing to tell apart")
    if 0 < table.labels.count(None) < len(table):
        notes.append(f"{table.labels.count(None)} of {len(table)} rows have no label")
    if len(set(table.responses)) == 1 and len(table) > 1:
        notes.append(f"every response is {table.responses[0]!r}")
    strange = sum(
        bool(texts) and response not in texts
        for texts, response in zip(table.references, table.responses, strict=True)
    )
    if strange:
        notes.append(f"{strange} rows have a response that is none of their references")
    return notes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
