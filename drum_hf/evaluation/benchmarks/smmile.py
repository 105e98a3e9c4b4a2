"""SMMILE (Rieff et al., 2025): medical problems with examples chosen by experts, read and scored as published."""

from __future__ import annotations

import functools
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...data import MAX_PIXELS, TripletTable
from ...errors import ColumnError, ImageError, RowError, SavedFileError
from ...tuning.episodes import choice_prompt
from ...types import ICLRequest, Query
from ...utils.files import read_parquet, refuse_outside
from .base import Benchmark, BenchmarkItem, Shots, letter_match

if TYPE_CHECKING:
    import datasets

__all__ = ["read_smmile", "smmile_match"]

_COLUMNS = ("problem_id", "order", "image", "question", "answer")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STREAM = 60_026


def smmile_match(prediction: str, gold: str) -> float:
    """SMMILE's exact match: equality without case, punctuation and repeated white space.

    >>> smmile_match("pneumothorax,  LEFT.", "Pneumothorax left"), smmile_match("It is black", "Black.")
    (1.0, 0.0)
    """
    texts = (re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip() for text in (prediction, gold))
    return float(len(set(texts)) == 1)


def _open(data: Any) -> datasets.Dataset | list[Mapping[str, Any]]:
    """The rows, from a table or from parquet files."""
    import datasets

    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise SavedFileError(
                f"expected SMMILE's parquet files at {path}, found none; download the data set smmile/SMMILE there"
            )
        for file in files:
            refuse_outside(file, path)
        try:
            parts = [datasets.Dataset(read_parquet(file)) for file in files]
            data = datasets.concatenate_datasets(parts)
        except Exception as error:  # pyarrow and datasets raise many kinds of their own
            raise SavedFileError(f"expected SMMILE's parquet files at {path}, reading failed ({error})") from error
    if isinstance(data, datasets.DatasetDict):
        raise ColumnError(f"expected one table, got a DatasetDict; pass one of its splits: {', '.join(data)}")
    rows = data if isinstance(data, datasets.Dataset) else list(data)
    found = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0]) if rows else []
    missing = [name for name in _COLUMNS if name not in found]
    if missing:
        raise ColumnError(f"expected a column {missing[0]!r}, got {', '.join(map(repr, found)) or 'none'}")
    return rows


def _table(
    rows: datasets.Dataset | list[Mapping[str, Any]], root: Path | None, on_bad_rows: Any, max_pixels: int
) -> TripletTable:
    """The rows as (image, question, answer), their ids being their numbers: each checked."""
    import datasets

    names = ["image", "question", "answer"]
    if isinstance(rows, datasets.Dataset):
        data: Any = rows.select_columns(names).add_column("id", [str(i) for i in range(len(rows))])
    else:
        data = [{name: row.get(name) for name in names} | {"id": str(i)} for i, row in enumerate(rows)]
    columns = {"prompt": "question", "response": "answer"}
    return TripletTable.from_dataset(
        data, columns=columns, on_bad_rows=on_bad_rows, image_root=root, max_pixels=max_pixels
    )


def read_smmile(
    data: datasets.Dataset | Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    format: Literal["open", "choice"] = "open",
    shots: Shots | Sequence[Shots] = (0, "all"),
    seed: int = 0,
    on_bad_rows: Literal["raise", "skip"] = "raise",
    max_pixels: int = MAX_PIXELS,
) -> Benchmark:
    """Read SMMILE or SMMILE++: rows of problem_id, order, image, question and answer.

    A problem's last row by order is the query, the ones before are its examples.

    "open": answers are compared by the published exact match. "choice": the query (not its examples) lists the
    problem's different answers with letters, and is asked once with each of them under each letter; the letter is
    scored. Ours: the wording, which asks for no reasoning aloud, and all turns of the options in place of a shuffle.

    Args:
        data: a Dataset, a list of dicts, a parquet file, or a folder with parquet files.
        format: "open" or "choice".
        shots: 0, or the last so many of a problem's examples (all, where it has fewer), or "all".
        seed: of the options' order.
        on_bad_rows: "raise" at the first problem that can't be used, or "skip" such problems, as the published
            evaluation does where an image is missing; `skipped` names them.
        max_pixels: larger images are refused.

    Raises:
        SavedFileError: there are no parquet files, or they can't be read.
        ColumnError: a column is missing.
        RowError, ImageError: a row can't be used; the message names row and problem.
        ValueError: an unknown setting, or no problem that can be used.
    """
    if format not in ("open", "choice") or on_bad_rows not in ("raise", "skip"):
        raise ValueError(
            f'expected format "open" or "choice" and on_bad_rows "raise" or "skip", got {format!r}, {on_bad_rows!r}'
        )
    wanted: tuple[Shots, ...] = (shots,) if isinstance(shots, (int, str)) else tuple(dict.fromkeys(shots))
    if not wanted or any(s != "all" and (not isinstance(s, int) or s < 0) for s in wanted):
        raise ValueError(f'expected numbers of shots from 0, or "all", got {shots!r}')
    rows = _open(data)
    root = Path(data) if isinstance(data, (str, os.PathLike)) else None  # names in files from elsewhere stay there
    table = _table(rows, root.parent if root is not None and root.is_file() else root, on_bad_rows, max_pixels)
    problems: dict[str, list[tuple[Any, str]]] = {}
    for i, (problem, order) in enumerate(zip(*(_column(rows, n) for n in ("problem_id", "order")), strict=True)):
        problems.setdefault(str(problem), []).append((order, str(i)))

    reasons = {str(row): reason for row, reason in table.skipped}
    items: list[BenchmarkItem] = []
    skipped: list[tuple[str, str]] = []
    for number, (problem, placed) in enumerate(problems.items()):
        try:
            ids = _in_order(problem, placed, table, reasons)
        except RowError as error:
            if on_bad_rows == "raise":
                raise
            skipped.append((problem, str(error)))
            continue
        answers = list(dict.fromkeys(table.responses[table.row(id)] for id in ids))
        turned = np.random.default_rng([_STREAM, seed, number]).permutation(len(answers))
        for count in wanted:
            items += _items(problem, table, ids, count, [answers[i] for i in turned] if format == "choice" else [])
    items.sort(key=lambda item: wanted.index(item.shots))
    if not items:
        raise ValueError(f"expected at least one SMMILE problem, got {len(problems)} with {len(skipped)} left out")
    return Benchmark(
        f"smmile/{format}",
        items,
        scorer=smmile_match if format == "open" else letter_match,
        max_new_tokens=64 if format == "open" else 8,
        settings={"format": format, "shots": list(wanted), "problems": len(problems) - len(skipped), "seed": seed},
        skipped=skipped,
    )


def _column(rows: datasets.Dataset | list[Mapping[str, Any]], name: str) -> list[Any]:
    return [row.get(name) for row in rows] if isinstance(rows, list) else list(rows[name])


def _in_order(
    problem: str, placed: Sequence[tuple[Any, str]], table: TripletTable, reasons: Mapping[str, str]
) -> list[str]:
    """Ids of a problem's rows by their place, examples first and then the query."""
    if len(placed) < 2:
        raise RowError(f"problem {problem!r}: expected examples and a query, got only row {placed[0][1]}")
    for order, id in placed:
        where = f"row {id} (problem {problem!r})"
        if not isinstance(order, int):
            raise RowError(f"{where}: column 'order': expected a whole number, got {order!r}")
        if id in reasons:
            raise RowError(f"{where}: {reasons[id]}")
        if not table.image_keys[table.row(id)]:
            raise ImageError(f"{where}: column 'image': expected an image, got none")
    if len({order for order, _ in placed}) < len(placed):
        raise RowError(f"problem {problem!r}: column 'order': expected each place once, got some twice")
    return [id for _, id in sorted(placed)]


def _items(
    problem: str, table: TripletTable, ids: Sequence[str], shots: Shots, answers: list[str]
) -> list[BenchmarkItem]:
    """The problem at some shots: one item, or one for each turn of the answers, which the query lists as options.

    As published, these are the answers of all the problem's rows, also where its examples aren't shown.
    """
    *examples, query = ids
    shown = examples if shots == "all" else examples[max(0, len(examples) - shots) :]
    gold, question = table.responses[table.row(query)], table.prompts[table.row(query)]
    told = [table.responses[table.row(id)] for id in shown]
    items = []
    for turn in range(max(1, len(answers))):
        options = answers[turn:] + answers[:turn]
        letters = dict(zip(options, string.ascii_uppercase, strict=False))
        text = choice_prompt(question, options) if options else question
        items.append(
            BenchmarkItem(
                id=problem,
                shots=shots,
                gold=letters.get(gold, gold),
                options=tuple(letters.values()),
                shown=tuple(letters.get(answer, answer) for answer in told),
                build=functools.partial(_request, problem, table, shown, query, text),
            )
        )
    return items


def _request(problem: str, table: TripletTable, shown: Sequence[str], query: str, text: str) -> ICLRequest:
    asked = table[query]
    return ICLRequest(Query(asked.image, text, id=problem), tuple(table.demonstrations(shown)))
