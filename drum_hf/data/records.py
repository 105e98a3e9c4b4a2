"""A table's rows without their pictures: in a list, or in a mapped file, from which they are read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

from ..types import texts_key

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

#: Rows read together when all of them are read.
_BATCH = 2000


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
