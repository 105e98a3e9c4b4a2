"""What a table holds and what is wrong with it, all problems at once."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DrumError, EmptySupportError
from .loading import find_object, find_table, image_files
from .rows import COLUMNS, Columns, check_rows, open_columns, shorten
from .sources import find_source, load_triplets
from .table import MAX_PIXELS, TripletTable

if TYPE_CHECKING:
    from PIL.Image import Image

_FEW = 3  # rows shown
_RARE = 3  # rows of a label
_LONG = 200  # sides of an image, one by the other
_LONGEST_PATH = 4096  # a longer text is an image itself
_MOST_IMAGES = 200_000  # files of a folder that are compared with its table


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What `check_table` found; JSON-ready by `dataclasses.asdict`.

    Attributes:
        path: as it was given.
        kind: what is there, such as "csv file".
        columns: what is read -> the table's column, of all that are used.
        unused: columns that are left behind.
        rows: rows that can be used; 0 where the table as a whole can't.
        images, groups, labels: how many different ones these rows have.
        references: rows with several gold answers.
        without_image, without_prompt: rows that lack it.
        examples: a few rows as the LVLM would see them: id, image (its size), prompt, response.
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
    data: Any,
    *,
    source: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    group: str | None = "image",
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    check_image: Callable[[Image], None] | None = None,
) -> TableReport:
    """Read a table as `load_table` would, and report instead of raising.

    Args:
        data: what `load_table` takes; with `source`, a local copy of that data set.
        source: a name of `SOURCES`: the copy must have its columns.
        split: as `load_table` takes it; with `source`, as `load_triplets` does ("support" where left out).
        columns, group, image_root, check_image: as in `load_table`; not with `source`.
        limit: with `source`, check the first so many rows only.

    Raises:
        ValueError: there is no data set called `source`, or `columns` came with it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> table = Path(tempfile.mkdtemp()) / "table.csv"
        >>> _ = table.write_text("question,answer\\nWhat color is grass?,green\\nWho knows?,\\n")
        >>> report = check_table(table)
        >>> report.rows, report.bad_rows
        (1, [(1, "column 'answer': expected a text that is not empty, got ''")])
    """
    is_path = isinstance(data, (str, os.PathLike))
    name = os.fspath(data) if is_path else type(data).__name__
    if source is not None:
        if columns or image_root:
            raise ValueError(f"columns= and image_root= are for tables of your own; {source!r} names its columns")
        entry = find_source(source)
        side = split or "support"
        about: dict[str, Any] = {"kind": f"{entry.title}, {entry.part(side).split}", "columns": {}, "unused": []}

        def load() -> TripletTable:
            return load_triplets(entry, split=side, data_dir=data, limit=limit, on_bad_rows="skip")

        return _report(name, about, load, [], [])
    faults: list[str] = []
    notes: list[str] = []
    about = {}
    try:
        if isinstance(data, TripletTable):
            return _report(name, {"kind": "TripletTable"}, lambda: data, [], [])
        if is_path:
            found = find_table(data, split=split, image_root=image_root, faults=faults)
        else:
            found = find_object(data, split=split, image_root=image_root)
        about = {"kind": found.kind}
        notes += found.notes
        if found.saved is not None:
            saved = found.saved
            about |= {"columns": {name: name for name in COLUMNS}}
            return _report(name, about, lambda: TripletTable.load(saved, image_root=image_root), faults, notes)
        match, texts, images = open_columns(found.rows, columns or {}, group)
        if is_path and isinstance(found.root, (str, os.PathLike)):
            notes += _unnamed_images(Path(found.root), _image_paths(match, texts, images))
    except (DrumError, ValueError) as error:
        return TableReport(name, **about, problems=[*faults, _said(error)])
    about |= {"columns": match.used, "unused": list(match.unused)}

    def check() -> TripletTable:
        checked = check_rows(
            match,
            texts,
            images,
            skip=True,
            root=found.root,
            max_pixels=MAX_PIXELS,
            group=group,
            check_image=check_image,
            told=notes,
        )
        return TripletTable._of_checked(*checked)

    return _report(name, about, check, faults, notes)


def _report(
    path: str, about: dict[str, Any], load: Callable[[], TripletTable], problems: list[str], notes: list[str]
) -> TableReport:
    try:
        table = load()
    except EmptySupportError as error:
        problems = [*problems, "no row can be used" if error.skipped else _said(error)]
        return TableReport(path, **about, problems=problems, bad_rows=error.skipped)
    except (DrumError, ValueError) as error:
        return TableReport(path, **about, problems=[*problems, _said(error)])
    sizes = _sizes(table)
    groups = [group for group in table.groups if group is not None]
    return TableReport(
        path,
        **about,
        rows=len(table),
        images=len(sizes),
        groups=len(set(groups)),
        labels=len(table.label_set),
        references=sum(len(texts) > 1 for texts in table.references),
        without_image=table.image_keys.count(""),
        without_prompt=sum(not prompt.strip() for prompt in table.prompts),
        examples=[
            {
                "id": id,
                "image": "{} x {}".format(*sizes[key]) if key else "",
                "prompt": prompt,
                "response": response,
            }
            for id, key, prompt, response in zip(
                table.ids[:_FEW], table.image_keys[:_FEW], table.prompts[:_FEW], table.responses[:_FEW], strict=True
            )
        ],
        problems=problems,
        bad_rows=table.skipped,
        notes=[*notes, *_notes(table, sizes)],
    )


def _image_paths(match: Columns, texts: Any, images: Any) -> Iterator[str]:
    """The files that rows name as their images."""
    name = match.names.get("image")
    cells = (
        (row["image"] for row in images)
        if images is not None
        else (row.get(name) for row in texts if isinstance(row, Mapping))
    )
    for cell in cells:
        path = cell.get("path") if isinstance(cell, Mapping) and cell.get("bytes") is None else cell
        if isinstance(path, str) and len(path) < _LONGEST_PATH:
            yield path.replace("\\", "/")


def _unnamed_images(root: Path, named: Iterator[str]) -> list[str]:
    """A note on images that lie below `root` and that no row names."""
    used = {os.path.normpath(root / path) for path in named}
    if not used:
        return []
    files = itertools.islice(image_files(root), _MOST_IMAGES)
    left = [repr(file.relative_to(root).as_posix()) for file in files if os.path.normpath(file) not in used]
    return [f"{len(left)} images of the folder are in no row: {shorten(left)}"] if left else []


def _sizes(table: TripletTable) -> dict[str, tuple[int, int]]:
    """Width and height of each picture, from the head of its file."""
    from PIL import Image

    sizes: dict[str, tuple[int, int]] = {}
    for row, key in enumerate(table.image_keys):
        if key and key not in sizes:
            source = table._images[row]["image"]
            with Image.open(source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])) as image:
                sizes[key] = image.size
    return sizes


def _notes(table: TripletTable, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What works but may not be meant."""
    notes = []
    groups = {group for group in table.groups if group is not None}
    if len(groups) == 1 and len(table) > 1 and None not in table.groups:
        is_one_picture = len(set(table.image_keys)) == 1 and any(table.image_keys)
        joined = "show one picture" if is_one_picture else f"are of the group {groups.pop()!r}"
        notes.append(f"all rows {joined}: none may demonstrate another, and nothing can be split off")
    if twins := _twins(table):
        notes.append(
            f"{twins} images are in several rows that no group joins: a row may demonstrate another question about "
            "its own image; give such rows the same 'group'"
        )
    notes += _label_notes(table)
    if len(set(table.responses)) == 1 and len(table) > 1 and len(table.label_set) != 1:
        notes.append(f"every response is {table.responses[0]!r}")
    numbers = [response for response in table.responses if re.fullmatch(r"-?\d+(\.\d+)?", response)]
    if len(numbers) > 1 and all(number.endswith(".0") for number in numbers):
        notes.append(
            f"whole numbers end in .0, such as {numbers[0]!r}, as pandas writes a column with empty cells: is this "
            "how the LVLM is to answer?"
        )
    strange = sum(
        bool(texts) and response not in texts
        for texts, response in zip(table.references, table.responses, strict=True)
    )
    if strange:
        notes.append(f"{strange} rows have a response that is none of their references")
    without_image, without_prompt = not any(table.image_keys), not any(prompt.strip() for prompt in table.prompts)
    if without_image:
        notes.append("no row has an image: strategies that compare images can't be used")
    if without_prompt:
        notes.append("no row asks anything: strategies that compare prompts can't be used")
    long = [key for key, (width, height) in sizes.items() if max(width, height) > _LONG * min(width, height)]
    if long:
        ids = [repr(table.ids[table.image_keys.index(key)]) for key in long]
        notes.append(
            f"{len(long)} images are more than {_LONG} times as long as wide, which Qwen-VL and others refuse: ids "
            f"{shorten(ids)}; --lvlm asks the LVLM's own processor"
        )
    return notes


def _twins(table: TripletTable) -> int:
    """Images of several rows, of which not all are of one group."""
    rows_of: dict[str, set[str]] = {}
    count = Counter(key for key in table.image_keys if key)
    for id, key, group in zip(table.ids, table.image_keys, table.groups, strict=True):
        rows_of.setdefault(key, set()).add(f"row {id}" if group is None else f"group {group}")
    return sum(count[key] > 1 and len(rows_of[key]) > 1 for key in count)


def _label_notes(table: TripletTable) -> list[str]:
    notes = []
    labels = table.label_set
    if len(labels) == 1:
        notes.append(f"every label is {labels[0]!r}: there is nothing to tell apart")
    if 0 < table.labels.count(None) < len(table):
        notes.append(f"{table.labels.count(None)} of {len(table)} rows have no label")
    ordered = sorted(labels)
    prefixes = []
    for i, short in enumerate(ordered):
        for long in itertools.islice(ordered, i + 1, None):
            if not long.startswith(short):
                break
            prefixes.append(f"{short!r} of {long!r}")
    if prefixes:
        notes.append(
            f"{len(prefixes)} labels are the beginning of another, which scoring must tell apart: {shorten(prefixes)}"
        )
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(unicodedata.normalize("NFKC", label).casefold(), []).append(label)
    if same := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        notes.append(f"{len(same)} labels differ in case or in how they are encoded alone: {shorten(same)}")
    if labels and all(label.isdecimal() for label in labels) and table.responses == table.labels:
        notes.append("every label is a number: an LVLM knows what a class is by its name; give names")
    count = Counter(label for label in table.labels if label is not None)
    rare = [repr(label) for label in labels if count[label] < _RARE]
    if len(labels) > 1 and rare:
        notes.append(
            f"{len(rare)} labels have fewer than {_RARE} rows, so that hardly any other row can demonstrate them: "
            f"{shorten(rare)}"
        )
    return notes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
