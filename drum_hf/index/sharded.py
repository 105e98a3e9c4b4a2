"""`ShardedIndex`: several `DemoIndex` files searched as one, built one after another in bounded memory."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    DimensionMismatchError,
    DuplicateIdError,
    EmptySupportError,
    MissingIdError,
    SavedFileError,
    TooFewDemonstrationsError,
)
from ..utils.files import leads_outside, read_folder, read_json, replacing_folder
from .demo_index import DemoIndex, SharedLock
from .files import INDEX_FILES, SHARDS

__all__ = ["SHARD_ROWS", "ShardedIndex"]

#: Rows of a shard: a million 1,536-d vectors are 1.5 GB as int8, 3 GB as float16 (our choice).
SHARD_ROWS = 1_000_000
_FORMAT_VERSION = 1
_ENTRIES = {"format_version": int, "dimension": int, "shard_rows": int, "options": dict, "shards": list}


class ShardedIndex:
    """Nearest neighbours over several indexes, merged: the same interface and the same results as one `DemoIndex`.

    On `flat` the result is exact, as that of one index over all rows. The others search every shard as thoroughly as
    they would search one of its size, so that recall does not fall with the number of shards, and time grows with it.

    Args:
        dimension: width of the vectors.
        shard_rows: rows that a shard takes before the next one is begun, removed ones included.
        options: of each shard's [`DemoIndex`][drum_hf.index.demo_index.DemoIndex].

    Raises:
        ValueError: `shard_rows` is below 1, or an option is none of `DemoIndex`'s.

    Example:
        >>> index = ShardedIndex(2, shard_rows=2)
        >>> index.add(["a", "b", "c"], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> index
        ShardedIndex(3 x 2 in 2 shards, kind='flat', storage='float32')
        >>> index.search([[0.0, 2.0]], 2)[0]
        [['c', 'b']]
    """

    def __init__(self, dimension: int, *, shard_rows: int = SHARD_ROWS, **options: Any) -> None:
        if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
            raise ValueError(f"shard_rows is a whole number and at least 1, got {shard_rows!r}")
        self._empty = DemoIndex(dimension, **options)  # no shard; it knows what a row must be
        self._dimension = self._empty.dimension
        self.kind, self.storage = self._empty.kind, self._empty.storage
        self.shard_rows, self.options = shard_rows, dict(options)
        self.shards: list[DemoIndex] = []
        self._taken: list[int] = []  # rows ever added to each shard
        self._lock = SharedLock()

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._dimension

    @property
    def ids(self) -> list[str]:
        """Ids in the order they were added."""
        return [id for shard in self.shards for id in shard.ids]

    @property
    def groups(self) -> list[str | None]:
        """Each id's group, or None, in the order of `ids`."""
        return [group for shard in self.shards for group in shard.groups]

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __contains__(self, id: object) -> bool:
        return any(id in shard for shard in self.shards)

    def __repr__(self) -> str:
        size = f"{len(self)} x {self._dimension} in {len(self.shards)} shards"
        return f"ShardedIndex({size}, kind={self.kind!r}, storage={self.storage!r})"

    def vectors(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """The stored unit vectors: float32 of shape (len(ids), dimension), all of them in order where `ids` is None.

        Raises:
            MissingIdError: an id is in no shard.
        """
        with self._lock.reading():
            wanted = self.ids if ids is None else list(ids)
            found = np.empty((len(wanted), self._dimension), np.float32)
            for shard, rows in self._by_shard(wanted):
                found[rows] = shard.vectors([wanted[row] for row in rows])
            return found

    def reconstruct(self, id: str) -> np.ndarray:
        """One stored unit vector: float32 of shape (dimension,)."""
        return self.vectors([id])[0]

    def _by_shard(self, ids: Sequence[str]) -> list[tuple[DemoIndex, list[int]]]:
        """Each shard that holds some of these ids, with their positions."""
        left = list(range(len(ids)))
        parts: list[tuple[DemoIndex, list[int]]] = []
        for shard in self.shards:
            here = [position for position in left if ids[position] in shard]
            if here:
                parts.append((shard, here))
                gone = set(here)
                left = [position for position in left if position not in gone]
        if left:
            missing = ", ".join(repr(ids[position]) for position in left[:3])
            raise MissingIdError(
                f"expected ids that are in the index, but {missing} {'is' if len(left) == 1 else 'are'} not; it holds "
                f"{len(self)} ids (see .ids)"
            )
        return parts

    # Changing it

    def add(self, ids: Sequence[str], vectors: Any, groups: Sequence[str | None] | None = None) -> None:
        """Add rows, to the last shard as long as it has room; all of them, or none where one is refused.

        Errors as in `DemoIndex.add`.
        """
        with self._lock.writing():
            ids = list(ids)
            twice = [id for id in ids if any(id in shard for shard in self.shards)]
            if twice or len(set(ids)) < len(ids):
                raise DuplicateIdError(
                    f"expected ids that are new and unique, but {twice[0] if twice else 'one'!r} came twice or is in "
                    "the index; remove() the old rows first, or give the new ones other ids"
                )
            vectors = np.asarray(vectors, dtype=np.float32)
            if len(vectors) != len(ids) or (groups is not None and len(groups) != len(ids)):
                raise DimensionMismatchError(
                    f"expected a vector and a group (or None) for each of {len(ids)} ids, got {len(vectors)} vectors"
                    + ("" if groups is None else f" and {len(groups)} groups")
                )
            room = 0
            if self.shards and not self.shards[-1].mapped:
                room = max(0, self.shard_rows - self._taken[-1])
            starts = ([0] if room else []) + list(range(room, len(ids), self.shard_rows))
            parts = [slice(*bounds) for bounds in itertools.pairwise([*starts, len(ids)])]
            for rows in parts:  # all are looked at before any is added
                self._empty._checked(ids[rows], vectors[rows], None if groups is None else groups[rows])
            for rows in parts:
                if rows.start or not room:
                    self.shards.append(DemoIndex(self._dimension, **self.options))
                    self._taken.append(0)
                self.shards[-1].add(ids[rows], vectors[rows], None if groups is None else groups[rows])
                self._taken[-1] += len(ids[rows])

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows; all of them, or none where one is missing (MissingIdError). See `DemoIndex.remove`."""
        with self._lock.writing():
            for shard, rows in self._by_shard(ids):
                shard.remove([ids[row] for row in rows])

    def compact(self) -> None:
        """Build each shard that has removed rows anew without them, in memory; shards without rows go."""
        with self._lock.writing():
            for shard in self.shards:
                shard.compact()
            kept = [(shard, taken) for shard, taken in zip(self.shards, self._taken, strict=True) if len(shard)]
            self.shards, self._taken = [shard for shard, _ in kept], [len(shard) for shard, _ in kept]

    # Searching it

    def search(
        self,
        vectors: Any,
        k: int,
        *,
        exclude_ids: Sequence[str | Collection[str] | None] | None = None,
        exclude_groups: Sequence[str | Collection[str] | None] | None = None,
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """The k nearest rows of each query over all shards; arguments, results and errors as in `DemoIndex.search`."""
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}; for no demonstrations, do not search")
        with self._lock.reading():
            total = len(self)
            if not total:
                raise EmptySupportError("the index is empty: add() demonstrations before searching it")
            if k > total:
                raise TooFewDemonstrationsError(
                    f"{k} demonstrations were asked for, the index holds {total}; "
                    f"ask for at most {total}, or add() more"
                )
            exclusions: dict[str, Any] = {"exclude_ids": exclude_ids, "exclude_groups": exclude_groups}
            parts = [shard.search(vectors, min(k, len(shard)), **exclusions) for shard in self.shards if len(shard)]
        ids, scores = [], []
        for query in range(len(parts[0][0])):
            values = np.concatenate([found[1][query] for found in parts])
            names = [id for found in parts for id in found[0][query]]
            best = np.argsort(-values, kind="stable")[:k]  # ties: the earlier shard's rows were added first
            ids.append([names[place] for place in best.tolist()])
            scores.append(values[best])
        return ids, scores

    # Files

    @classmethod
    def build(
        cls,
        directory: str | os.PathLike[str],
        blocks: Iterable[tuple[Sequence[str], Any, Sequence[str | None] | None]],
        dimension: int,
        *,
        shard_rows: int = SHARD_ROWS,
        **options: Any,
    ) -> None:
        """Write an index shard by shard: no more is in memory than one shard, a block and all ids.

        Args:
            directory: a new or empty folder; for `load`.
            blocks: (ids, vectors, groups or None) of some rows each, read once.
            dimension, shard_rows, options: as in the class.

        Raises:
            SavedFileError: the folder holds files.
            DimensionMismatchError, DuplicateIdError, NonFiniteEmbeddingError: as in `DemoIndex.add`.
        """
        target = Path(directory)
        if target.exists() and any(target.iterdir()):
            raise SavedFileError(f"expected a new or empty folder to build into; {target} holds files")
        current, number = cls(dimension, shard_rows=shard_rows, **options), 0
        seen: set[str] = set()
        with replacing_folder(target, owns=INDEX_FILES) as folder:
            for ids, vectors, groups in blocks:
                twice = [id for id in ids if id in seen]
                if twice:
                    raise DuplicateIdError(
                        f"expected ids that are unique, but {twice[0]!r} came twice; give it another id"
                    )
                seen.update(ids)
                current.add(ids, vectors, groups)
                while len(current.shards) > 1 or (current.shards and current._taken[0] == shard_rows):
                    current.shards.pop(0).write(folder / _shard_name(number))
                    current._taken.pop(0)
                    number += 1
            for shard in current.shards:
                shard.write(folder / _shard_name(number))
                number += 1
            current._write_meta(folder, number)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write each shard as `DemoIndex.save` does into a separate folder, and `shards.json`, which lists them.

        An earlier index there is replaced at once, as by `DemoIndex.save`.

        Raises:
            SavedFileError: the disk is full, or the folder can't be written.
        """
        self.compact()
        with self._lock.reading(), replacing_folder(directory, owns=INDEX_FILES) as folder:
            for number, shard in enumerate(self.shards):
                shard.write(folder / _shard_name(number))
            self._write_meta(folder, len(self.shards))

    def _write_meta(self, folder: Path, count: int) -> None:
        meta: dict[str, Any] = {"format_version": _FORMAT_VERSION, "dimension": self._dimension}
        meta |= {
            "shard_rows": self.shard_rows,
            "options": self.options | {"kind": self.kind, "storage": self.storage},
            "shards": [_shard_name(number) for number in range(count)],
        }
        (folder / SHARDS).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, mmap: bool = False) -> ShardedIndex:
        """Read what `save` or `build` wrote.

        Args:
            mmap: leave the stored vectors in their files; see `DemoIndex.load`. New rows go to a shard of their own.

        Raises:
            SavedFileError: a file is missing or altered, or two shards hold the same id.
            ValueError: `mmap` of an `hnsw` index.
        """
        return read_folder(directory, SHARDS, lambda folder: cls._read(folder, mmap))

    @classmethod
    def _read(cls, folder: Path, mmap: bool) -> ShardedIndex:
        path = folder / SHARDS
        remedy = "restore the folder from where it was saved, or build the index anew"
        try:
            meta = read_json(path)
            if not isinstance(meta, dict) or meta.keys() != _ENTRIES.keys():
                raise ValueError(f"expected the entries {', '.join(_ENTRIES)}")
            wrong = [key for key, kind in _ENTRIES.items() if type(meta[key]) is not kind]
            if wrong:
                raise ValueError(f"{wrong[0]!r} is of another type")
            if meta["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format version {meta['format_version']!r}")
            names = meta["shards"]
            if names != [_shard_name(number) for number in range(len(names))]:  # nothing outside the folder is read
                raise ValueError("shards of other names")
            if any(leads_outside(folder / name, folder) for name in names):
                raise ValueError("a shard is a link that leads out of the folder")
            index = cls(meta["dimension"], shard_rows=meta["shard_rows"], **meta["options"])
        except (OSError, ValueError, TypeError) as error:
            raise SavedFileError(
                f"{path}: expected what ShardedIndex.save wrote, in format version {_FORMAT_VERSION}; reading it "
                f"failed ({error}); {remedy}"
            ) from error
        index.shards = [DemoIndex.load(folder / name, mmap=mmap) for name in names]
        index._taken = [len(shard) for shard in index.shards]
        for name, shard in zip(names, index.shards, strict=True):
            if (shard.dimension, shard.kind, shard.storage) != (index.dimension, index.kind, index.storage):
                raise SavedFileError(f"{folder / name}: {shard!r} is no shard of {index!r}; {remedy}")
        ids = index.ids
        if len(set(ids)) < len(ids):
            raise SavedFileError(f"{path}: an id is in two shards; {remedy}")
        return index

    def __getstate__(self) -> dict[str, Any]:
        with self._lock.reading():
            return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=SharedLock())


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"
