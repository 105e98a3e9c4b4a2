"""A cell is one number of the table before it is averaged: its per-query values, kept as a small parquet file.

A cell's file is named after a hash of everything that could change its values, so a finished cell is found again by
the same suite, and a changed suite finds what it has not changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SavedFileError
from ...utils.files import read_parquet, refuse_outside, replacing_file

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Cell", "CellFiles", "Values", "digest"]

#: Part of every cell's hash: raised when what a cell means changes.
_FORMAT = 1


def digest(facts: Any) -> str:
    """Hash of plain values, keys in any order: 32 hexadecimal digits.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    True
    """
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where in the table a set of values stands.

    Attributes:
        data: name of the data set.
        data_seed: of the world, or of the split.
        lvlm: that answers.
        trained_on: the LVLM whose feedback trained the retriever, where that is another one; else "".
        encoder: that retrieves.
        strategy: with its selector, if any.
        seed: of the draw, or of the training.
        shots: number of demonstrations.
        round: mining rounds behind a retriever that is evaluated as it was during its training; None: all of them.
    """

    data: str
    data_seed: int
    lvlm: str
    trained_on: str
    encoder: str
    strategy: str
    seed: int
    shots: int
    round: int | None = None

    def __str__(self) -> str:
        trained = f", trained on {self.trained_on}" if self.trained_on else ""
        after = "" if self.round is None else f" after round {self.round}"
        return (
            f"{self.data}/{self.data_seed} {self.lvlm}{trained} {self.strategy} seed {self.seed}, "
            f"{self.shots} shots{after}"
        )


@dataclasses.dataclass(frozen=True)
class Values:
    """What a cell holds, a row a query.

    Attributes:
        query_ids: in the table's order.
        values: (queries,) float64, the metric.
        answers: the LVLM's.
        demonstrations: ids in the order shown.
        pairs: scored pairs behind the retriever, where it was trained.
    """

    query_ids: Sequence[str]
    values: np.ndarray
    answers: Sequence[str]
    demonstrations: Sequence[Sequence[str]]
    pairs: int | None = None


class CellFiles:
    """A folder of finished cells.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(cell: Cell, facts: Mapping[str, Any]) -> str:
        """Name of the cell's file: a hash of what it is and of all that could change its values, but of no label."""
        what = [cell.strategy, cell.seed, cell.shots, cell.round]
        return digest({"format": _FORMAT, "cell": what, "facts": facts})

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.parquet"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def write(self, key: str, values: Values) -> None:
        """Write a cell aside and move it into place: it is there whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: list[Any] = [
            values.query_ids,
            values.values,
            values.answers,
            [list(ids) for ids in values.demonstrations],
        ]
        schema = _columns().with_metadata({"pairs": json.dumps(values.pairs)})
        table = pa.table([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)
        with replacing_file(self.path(key)) as partial:
            pq.write_table(table, partial)

    def read(self, key: str) -> Values:
        """A finished cell.

        Raises:
            SavedFileError: the file is missing or broken.
        """
        import pyarrow as pa

        path = self.path(key)
        refuse_outside(path, self.folder)
        try:
            table = read_parquet(path).select(_columns().names)
            about = json.loads((table.schema.metadata or {})[b"pairs"])
            table = table.cast(_columns())
            if any(column.null_count for column in table.columns) or not (about is None or type(about) is int):
                raise ValueError("some of it is missing")
            columns = {name: table.column(name).to_pylist() for name in ("query_id", "answer", "demonstrations")}
            values = table.column("value").to_numpy()
            if not np.isfinite(values).all() or None in {id for ids in columns["demonstrations"] for id in ids}:
                raise ValueError("some of it is no number or no id")
        except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException) as error:
            raise SavedFileError(
                f"{path}: expected a cell of a suite ({error}); delete the file, and the next run makes it again"
            ) from error
        return Values(columns["query_id"], values, columns["answer"], columns["demonstrations"], about)


def _columns() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("query_id", pa.string()),
            ("value", pa.float64()),
            ("answer", pa.string()),
            ("demonstrations", pa.list_(pa.string())),
        ]
    )
