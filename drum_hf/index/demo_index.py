"""Which demonstrations are nearest: a FAISS index by id, that leaves out what a query must not be shown."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    DimensionMismatchError,
    DuplicateIdError,
    EmptySupportError,
    MissingIdError,
    NonFiniteEmbeddingError,
    TooFewDemonstrationsError,
)
from ..utils.files import read_folder, replacing_folder
from . import files as _index_files
from .faiss_kinds import KINDS, STORAGES, Flat, Graph, IndexKind, Lists, Storage, rebuilt

__all__ = ["DemoIndex", "SharedLock"]

#: As they are saved.
_OPTIONS = ("storage", "hnsw_m", "ef_construction", "ef_search", "pq_bytes", "nprobe", "refine")

#: Beyond these FAISS allocates or counts past what it can.
_MOST = {"dimension": 1 << 20, "hnsw_m": 1 << 10}

#: Two float32 dot products of unit vectors that differ by less may be one number, summed in another order.
_ROUNDING = 2e-6
#: Rows fetched beyond what was asked for, so that a tie at the end of the list can be seen.
_SLACK = 8
#: The longest list asked of FAISS (a GPU index has this limit); beyond it a plain matrix product is faster.
_MAX_FETCH = 2048
#: Floats in one block of host work (64 MiB).
_BLOCK = 1 << 24


#: Searches at once, over all indexes of the process. More than there are cores would take the interpreter from one
#: another in the middle: with 16 threads on two cores that costs up to a third.
SEARCHES = threading.BoundedSemaphore(os.cpu_count() or 1)


class SharedLock:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers = 0
        self._writers = 0  # waiting or writing
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._turn:
                self._readers -= 1
                if self._writers:
                    self._turn.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._turn:
            self._writers += 1
            self._turn.wait_for(lambda: not self._readers and not self._writing)
            self._writing = True
        try:
            yield
        finally:
            with self._turn:
                self._writing = False
                self._writers -= 1
                self._turn.notify_all()


@dataclasses.dataclass(frozen=True)
class _Excluded:
    """What each query of a batch must not get. Pairs are coded as `query * stride + row` (or `+ group`)."""

    counts: np.ndarray  # int64 (q,): living rows that the query loses
    rows: list[list[int]]
    groups: list[list[int]]
    row_pairs: np.ndarray
    group_pairs: np.ndarray


class DemoIndex:
    """Nearest neighbours by cosine, exact (`flat`) or approximate, with exclusion by id and by group.

    Vectors are scaled to unit length on the way in, so that a score is a dot product in [-1, 1]; higher is nearer.
    Scores are those of the vectors as they are stored. Searches may run in several threads at once; adding, removing
    and compacting wait for them.

    Args:
        dimension: width of the vectors.
        kind: "flat" compares every row and is exact; "hnsw" walks a graph: for hundreds of thousands of rows; "ivfpq"
            looks through some lists of short codes and then compares the most promising rows: quicker to build, slower
            to search. It compares every row until there are 9,984 to learn lists and codes from.
        storage: of the vectors: "float32", "float16" (half the memory), or "int8" (a quarter: 256 steps in each
            dimension, over the range of the first rows added; add a representative batch first).
        hnsw_m: neighbours a node of the graph keeps (FAISS's value).
        ef_construction: breadth of the search that builds the graph (our choice).
        ef_search: breadth of the search at query time, raised to the length of the list where that is more (our
            choice: recall@10 is 1.00 at 64 on data of intrinsic dimension 32; structureless data needs 1,024).
        pq_bytes: length of the codes of `ivfpq`, lowered until it divides the dimension (our choice).
        nprobe: lists that `ivfpq` looks through (our choice); it makes 4 sqrt(n) of them, the low end of FAISS's
            advice, and at most one for each 39 rows.
        refine: rows that `ivfpq` compares by their stored vectors for each query, at least (our choice); up to 2,048.

    `ef_search`, `nprobe` and `refine` may be set at any time.

    Raises:
        ValueError: an unknown kind or storage, or a number below 1 (below 2 for `hnsw_m`).
        DependencyError: FAISS is missing, or installed twice.

    Example:
        >>> index = DemoIndex(2)
        >>> index.add(["a", "b", "c"], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], groups=["p", "p", None])
        >>> ids, scores = index.search([[2.0, 0.0]], 2)
        >>> ids, [round(float(s), 3) for s in scores[0]]
        ([['a', 'b']], [1.0, 0.6])
        >>> index.search([[2.0, 0.0]], 2, exclude_groups=["p"])[0]
        [['c']]
    """

    def __init__(
        self,
        dimension: int,
        *,
        kind: IndexKind = "flat",
        storage: Storage = "float32",
        hnsw_m: int = 32,
        ef_construction: int = 200,
        ef_search: int = 128,
        pq_bytes: int = 64,
        nprobe: int = 32,
        refine: int = 128,
    ) -> None:
        for name, given, known in (("kind", kind, KINDS), ("storage", storage, STORAGES)):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {given!r}")
        numbers = {"hnsw_m": hnsw_m, "ef_construction": ef_construction, "ef_search": ef_search}
        numbers |= {"pq_bytes": pq_bytes, "nprobe": nprobe, "refine": refine}
        for name, value in {"dimension": dimension, **numbers}.items():
            least, most = 2 if name == "hnsw_m" else 1, _MOST.get(name, 1 << 24)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
                raise ValueError(f"{name} is a whole number from {least} to {most}, got {value!r}")
        self._dimension = int(dimension)
        self.kind, self.storage = kind, storage
        self.hnsw_m, self.ef_construction, self.ef_search = int(hnsw_m), int(ef_construction), int(ef_search)
        self.pq_bytes, self.nprobe, self.refine = int(pq_bytes), int(nprobe), int(refine)
        self._lock = SharedLock()
        self._structure = self._make()
        self._forget()

    def _make(self) -> Flat:
        if self.kind == "hnsw":
            sizes = {"neighbours": self.hnsw_m, "breadth": self.ef_construction}
            return Graph(self._dimension, self.storage, **sizes)
        if self.kind == "ivfpq":
            return Lists(self._dimension, self.storage, code_bytes=self.pq_bytes)
        return Flat(self._dimension, self.storage)

    def _forget(self) -> None:
        self._row_ids: list[str] = []
        self._rows: dict[str, int] = {}  # living ids only
        self._alive = np.zeros(0, bool)
        self._group_of_row = np.zeros(0, np.int64)  # 0: no group
        self._group_numbers: dict[str, int] = {}  # from 1
        self._group_sizes: list[int] = [0]
        self._living_bits: np.ndarray | None = None  # what FAISS may propose; None: all rows

    # What it holds

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._dimension

    @property
    def options(self) -> dict[str, Any]:
        """Name -> value of all that `DemoIndex` takes beside the dimension and the kind."""
        return {name: getattr(self, name) for name in _OPTIONS}

    @property
    def ids(self) -> list[str]:
        """Ids in the order they were added."""
        with self._lock.reading():
            return list(self._rows)

    @property
    def groups(self) -> list[str | None]:
        """Each id's group, or None, in the order of `ids`."""
        with self._lock.reading():
            return self._groups()

    @property
    def mapped(self) -> bool:
        """Whether the stored vectors are in their file rather than in memory."""
        return self._structure.mapped is not None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        return id in self._rows

    def __repr__(self) -> str:
        return f"DemoIndex({len(self)} x {self._dimension}, kind={self.kind!r}, storage={self.storage!r})"

    def vectors(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """The stored unit vectors: float32 of shape (len(ids), dimension), all of them in order where `ids` is None.

        Of unit length to within what `storage` keeps of them.

        Raises:
            MissingIdError: an id is not in the index.
        """
        with self._lock.reading():
            rows = list(self._rows.values()) if ids is None else self._find(ids)
            return self._structure.vectors(rows)

    def reconstruct(self, id: str) -> np.ndarray:
        """One stored unit vector: float32 of shape (dimension,); as `vectors`."""
        return self.vectors([id])[0]

    # Changing it

    def add(self, ids: Sequence[str], vectors: Any, groups: Sequence[str | None] | None = None) -> None:
        """Add rows; all of them, or none where one is refused.

        The graph of `hnsw` is built by one thread, so that the same rows always give the same graph; lists and codes
        of `ivfpq` are learned by one thread from a fixed seed.

        Args:
            ids: unique strings.
            vectors: shape (len(ids), dimension), any length but zero; stored as unit vectors.
            groups: each row's group or None; rows of one group can be excluded together.

        Raises:
            DimensionMismatchError: vectors of another shape.
            NonFiniteEmbeddingError: NaN, infinity or a vector of length zero; names the first ids.
            DuplicateIdError: an id comes twice, or is in the index already.
            ValueError: as many groups as ids were expected.
        """
        ids, unit, groups = self._checked(ids, vectors, groups)
        with self._lock.writing():
            self._add(ids, unit, groups)

    def _checked(
        self, ids: Sequence[str], vectors: Any, groups: Sequence[str | None] | None
    ) -> tuple[list[str], np.ndarray, list[str | None]]:
        """What `add` was given, vectors at unit length; or what is wrong with it."""
        ids = _strings(ids, "ids")
        groups = [None] * len(ids) if groups is None else list(groups)
        _strings([group for group in groups if group is not None], "groups")
        if len(groups) != len(ids):
            raise ValueError(f"expected one group (or None) for each of {len(ids)} ids, got {len(groups)}")
        unit = self._unit(vectors, ids)
        if len(unit) != len(ids):
            raise DimensionMismatchError(
                f"expected vectors of shape ({len(ids)}, {self._dimension}) for {len(ids)} ids, got {unit.shape}"
            )
        return ids, unit, groups

    def _add(self, ids: list[str], unit: np.ndarray, groups: Sequence[str | None]) -> None:
        twice = [id for id, count in Counter(ids).items() if count > 1 or id in self._rows]
        if twice:
            raise DuplicateIdError(
                f"expected ids that are new and unique, but {_first(twice)} came twice or are in the index; "
                "remove() the old rows first, or give the new ones other ids"
            )
        if ids and self.mapped:
            raise ValueError(
                "an index that was loaded with mmap=True takes no rows: load it without, or add to another shard of a "
                "ShardedIndex"
            )
        if ids:
            self._structure.add(unit)
            self._note(ids, groups)

    def _note(self, ids: list[str], groups: Sequence[str | None]) -> None:
        """Take down whose the newest rows are."""
        numbers = np.empty(len(ids), np.int64)
        for i, (id, group) in enumerate(zip(ids, groups, strict=True)):
            self._rows[id] = len(self._row_ids) + i
            numbers[i] = self._group_number(group)
            self._group_sizes[numbers[i]] += 1
        self._row_ids += ids
        self._alive = np.concatenate([self._alive, np.ones(len(ids), bool)])
        self._group_of_row = np.concatenate([self._group_of_row, numbers])
        self._mark_living()

    def _mark_living(self) -> None:
        whole = len(self._rows) == len(self._row_ids)
        self._living_bits = None if whole else np.packbits(self._alive, bitorder="little")

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows; all of them, or none where one is missing.

        `hnsw` and `ivfpq` keep a removed row, as a waypoint that no search returns, until more than half of the rows
        are such and the index is built anew (`compact`).

        Raises:
            MissingIdError: an id is not in the index.
        """
        with self._lock.writing():
            rows = sorted(set(self._find(_strings(ids, "ids"))))
            if not rows:
                return
            for row in rows:
                del self._rows[self._row_ids[row]]
                self._group_sizes[self._group_of_row[row]] -= 1
            self._alive[rows] = False
            if self._structure.remove(np.asarray(rows, np.int64)):
                self._row_ids = list(self._rows)
                self._rows = {id: row for row, id in enumerate(self._row_ids)}
                self._group_of_row = self._group_of_row[self._alive]
                self._alive = np.ones(len(self._rows), bool)
            elif 2 * len(self._rows) < len(self._row_ids) and not self.mapped:
                self._compact()
            self._mark_living()

    def compact(self) -> None:
        """Build the index anew without its removed rows, in memory; nothing to do where none was removed."""
        with self._lock.writing():
            if len(self._rows) < len(self._row_ids):
                self._compact()

    def _compact(self) -> None:
        ids, groups = list(self._rows), self._groups()
        self._structure = rebuilt(self._structure, np.flatnonzero(self._alive))
        self._forget()
        self._note(ids, groups)

    def to_gpu(self, device: int = 0) -> DemoIndex:
        """Have a GPU search it (`flat` and `ivfpq`; needs faiss-gpu). Returns itself.

        The stored vectors stay in memory, and decide: on `flat` the results are those of the CPU. Removed rows are
        kept until `compact`, also on `flat`: a GPU can't leave rows out, so that more are fetched from it, and those
        that a query must not get are left out here. Searches of several threads take turns; send queries in batches.

        Raises:
            DependencyError: faiss has no GPU support, or there is no such GPU.
            ValueError: an `hnsw` index, or one loaded with `mmap=True`.
        """
        from .gpu import OnGpu, transfer

        with self._lock.writing():
            self._structure = OnGpu(self._host(), transfer(device))
        return self

    def to_cpu(self) -> DemoIndex:
        """Have the CPU search it again. Returns itself."""
        with self._lock.writing():
            self._structure = self._host()
        return self

    def _host(self) -> Flat:
        return getattr(self._structure, "host", self._structure)

    # Searching it

    def search(
        self,
        vectors: Any,
        k: int,
        *,
        exclude_ids: Sequence[str | Collection[str] | None] | None = None,
        exclude_groups: Sequence[str | Collection[str] | None] | None = None,
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """The k nearest rows of each query, nearest first.

        A query gets fewer than k only where its exclusions leave fewer. On `flat` the result is exact for the vectors
        as they are stored, rows of equal score come in the order they were added, and a query's result does not depend
        on the others of its batch.

        Args:
            vectors: shape (q, dimension), any length but zero.
            k: how many rows for each query.
            exclude_ids: for each query an id it must not get, several (a set or tuple), or None.
            exclude_groups: for each query a group it must not get rows of, several, or None. Ids and groups that
                are not in the index exclude nothing.

        Returns:
            For each query its ids, and a float32 array of their scores in [-1, 1].

        Raises:
            ValueError: k is below 1, or as many exclusions as queries were expected.
            EmptySupportError: the index is empty.
            TooFewDemonstrationsError: k is more than the index holds.
            DimensionMismatchError: vectors of another shape.
            NonFiniteEmbeddingError: NaN, infinity or a vector of length zero.
        """
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}; for no demonstrations, do not search")
        with self._lock.reading(), SEARCHES:  # in this order: who waits for a change must not hold up other indexes
            queries = self._unit(vectors, None)
            if not self._rows:
                raise EmptySupportError("the index is empty: add() demonstrations before searching it")
            if k > len(self._rows):
                raise TooFewDemonstrationsError(
                    f"{k} demonstrations were asked for, the index holds {len(self._rows)}; "
                    f"ask for at most {len(self._rows)}, or add() more"
                )
            excluded = self._excluded(len(queries), exclude_ids, exclude_groups)
            wanted = np.minimum(k, len(self._rows) - excluded.counts)
            nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
            found: list[tuple[np.ndarray, np.ndarray]] = [nothing] * len(queries)
            left = self._by_faiss(queries, wanted, excluded, found)
            self._by_product(queries, wanted, excluded, left, found)
            ids = [[self._row_ids[row] for row in rows.tolist()] for rows, _ in found]
        return ids, [np.clip(scores, -1.0, 1.0) for _, scores in found]

    def _by_faiss(self, queries: np.ndarray, wanted: np.ndarray, excluded: _Excluded, found: list) -> list[int]:
        """Fill `found` from FAISS; returns the queries that it could not answer for certain."""
        structure, total = self._structure, len(self._row_ids)
        left: list[int] = []
        breadth, least = {"hnsw": (self.ef_search, 0), "ivfpq": (self.nprobe, self.refine)}.get(self.kind, (0, 0))
        least = 0 if structure.exact else least
        # More than FAISS may be asked for are compared one and all: for what is wanted, not for what is refined.
        refined = np.minimum(least + excluded.counts, _MAX_FETCH)
        fetch = np.maximum(wanted + _SLACK + excluded.counts, refined)
        if not structure.filters and total > len(self._rows):  # removed rows are among what comes
            most = np.maximum(fetch, _MAX_FETCH)
            fetch = np.minimum(np.ceil(fetch * (total / len(self._rows))).astype(np.int64), most)
        fetch = np.minimum(fetch, total)
        # Queries that lose as many rows, to a power of two, go together: one large group must not slow all others.
        sizes = np.ceil(np.log2(fetch)).astype(int)
        for size in np.unique(sizes[wanted > 0]):
            members = np.flatnonzero((sizes == size) & (wanted > 0))
            length = int(fetch[members].max())
            if length > _MAX_FETCH:
                left += members.tolist()
                continue
            step = max(1, _BLOCK // (length * self._dimension))
            for part in np.split(members, range(step, len(members), step)):
                raw, rows = structure.propose(queries[part], length, living=self._living_bits, breadth=breadth)
                scores = np.einsum("qfd,qd->qf", structure.vectors(rows), queries[part])
                scores[self._is_excluded(part, rows, excluded) | (rows < 0)] = -np.inf
                # FAISS's own order of ties depends on heaps and on blocks of the matrix product.
                line, order = np.arange(len(part)), np.lexsort((rows, -scores))
                rows, scores = rows[line[:, None], order], scores[line[:, None], order]
                last = scores[line, wanted[part] - 1]
                sure = np.isfinite(last)
                if structure.exact and length < total:
                    sure &= last > raw[:, -1] + _ROUNDING
                for i, query in enumerate(part.tolist()):
                    if sure[i]:
                        found[query] = rows[i, : wanted[query]], scores[i, : wanted[query]]
                    else:
                        left.append(query)
        return left

    def _by_product(
        self, queries: np.ndarray, wanted: np.ndarray, excluded: _Excluded, left: list[int], found: list
    ) -> None:
        """Fill `found` for the queries `left` by comparing every row on the host."""
        structure, total = self._structure, len(self._row_ids)
        step, height = max(1, _BLOCK // total), max(1, _BLOCK // self._dimension)
        for start in range(0, len(left), step):
            part = left[start : start + step]
            products = np.empty((len(part), total), np.float32)
            for top in range(0, total, height):
                rows = slice(top, min(top + height, total))
                np.matmul(queries[part], structure.vectors(rows).T, out=products[:, rows])
            products[:, ~self._alive] = -np.inf
            for query, row in zip(part, products, strict=True):
                row[excluded.rows[query]] = -np.inf
                if excluded.groups[query]:
                    row[np.isin(self._group_of_row, excluded.groups[query])] = -np.inf
                last = np.partition(row, -wanted[query])[-wanted[query]]
                near = np.flatnonzero(row >= last - _ROUNDING)
                scores = np.einsum("fd,d->f", structure.vectors(near), queries[query])
                order = np.lexsort((near, -scores))[: wanted[query]]
                found[query] = near[order], scores[order]

    def _excluded(
        self,
        count: int,
        exclude_ids: Sequence[str | Collection[str] | None] | None,
        exclude_groups: Sequence[str | Collection[str] | None] | None,
    ) -> _Excluded:
        counts = np.zeros(count, np.int64)
        rows, groups = [], []
        per_id = _per_query(exclude_ids, count, "exclude_ids")
        per_group = _per_query(exclude_groups, count, "exclude_groups")
        for query, (ids, names) in enumerate(zip(per_id, per_group, strict=True)):
            out = {self._group_numbers[name] for name in names if name in self._group_numbers}
            gone = {self._rows[id] for id in ids if id in self._rows}
            outside = sum(int(self._group_of_row[row]) not in out for row in gone)
            counts[query] = outside + sum(self._group_sizes[number] for number in out)
            rows.append(list(gone))
            groups.append(list(out))
        row_pairs, group_pairs = _pairs(rows, len(self._row_ids)), _pairs(groups, len(self._group_sizes))
        return _Excluded(counts, rows, groups, row_pairs, group_pairs)

    def _is_excluded(self, queries: np.ndarray, rows: np.ndarray, excluded: _Excluded) -> np.ndarray:
        numbers = queries[:, None].astype(np.int64)
        mask = ~self._alive[rows]
        if len(excluded.row_pairs):
            mask |= np.isin(numbers * len(self._row_ids) + rows, excluded.row_pairs)
        if len(excluded.group_pairs):
            mask |= np.isin(numbers * len(self._group_sizes) + self._group_of_row[rows], excluded.group_pairs)
        return mask

    # Files

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `vectors.safetensors` and `index.json`; removed rows are not in them (the index is compacted first).

        The graph of `hnsw`, and lists and codes of `ivfpq`, are among the tensors, so that loading builds nothing. An
        earlier index there is replaced at once: `load` gives the old one or the new, also after a kill.

        Raises:
            SavedFileError: the disk is full, or the folder can't be written.
        """
        with replacing_folder(directory, owns=_index_files.INDEX_FILES) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """As `save`, file by file, into a folder that nobody reads yet."""
        while True:
            self.compact()
            with self._lock.reading():
                if self._living_bits is not None:  # rows were removed in between
                    continue
                entries = {"dimension": self._dimension, "kind": self.kind, **self.options}
                entries |= {"ids": self._row_ids, "groups": self._groups()}
                _index_files.write(folder, self._structure.codes(), self._structure.state(), entries)
                return

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, mmap: bool = False) -> DemoIndex:
        """Read what `save` wrote; searches give the same results as before.

        Args:
            mmap: leave the stored vectors in their file, and read from it what a search looks at: every row of
                `flat`, some hundred of `ivfpq`, whose lists and codes are in memory. Rows can be removed, but not
                added.

        Raises:
            SavedFileError: a file is missing or altered, does not fit the other, or has an unknown format version.
            ValueError: `mmap` of an `hnsw` index, which walks over its vectors.
        """
        return read_folder(directory, _index_files.META, lambda folder: cls._read(folder, mmap))

    @classmethod
    def _read(cls, folder: Path, mmap: bool) -> DemoIndex:
        with _index_files.reading(folder) as saved:
            meta = saved.meta
            try:
                index = cls(meta["dimension"], kind=meta["kind"], **{name: meta[name] for name in _OPTIONS})
            except ValueError as error:
                raise _index_files.broken(folder / _index_files.META, str(error)) from error
            if mmap and index.kind == "hnsw":
                raise ValueError(
                    f"mmap=True is for flat and ivfpq, {folder} holds 'hnsw': load it without mmap, or build it as "
                    "ivfpq"
                )
            try:
                index._structure.restore(saved.blocks(), saved.state(), saved.mapped() if mmap else None)
            except ValueError as error:
                raise _index_files.broken(folder / _index_files.VECTORS, str(error)) from error
            index._note(meta["ids"], meta["groups"])
        return index

    # Helpers

    def __getstate__(self) -> dict[str, Any]:
        with self._lock.reading():
            return {**self.__dict__, "_lock": None, "_structure": self._host()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=SharedLock())

    def _groups(self) -> list[str | None]:
        names = [None, *self._group_numbers]
        return [names[number] for number in self._group_of_row[self._alive].tolist()]

    def _group_number(self, group: str | None) -> int:
        if group is None:
            return 0
        number = self._group_numbers.setdefault(group, len(self._group_sizes))
        if number == len(self._group_sizes):
            self._group_sizes.append(0)
        return number

    def _find(self, ids: Sequence[str]) -> list[int]:
        missing = [id for id in ids if id not in self._rows]
        if missing:
            raise MissingIdError(
                f"expected ids that are in the index, but {_first(missing)} are not; it holds {len(self._rows)} ids "
                "(see .ids)"
            )
        return [self._rows[id] for id in ids]

    def _unit(self, vectors: Any, ids: Sequence[str] | None) -> np.ndarray:
        """Checked, contiguous float32 unit vectors."""
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(vectors, dtype=np.float32)
        if array.size == 0 and ids is not None and not len(ids):
            return np.zeros((0, self._dimension), np.float32)
        if array.ndim != 2 or array.shape[1] != self._dimension:
            raise DimensionMismatchError(
                f"expected vectors of shape (n, {self._dimension}), got {array.shape}; the index and the encoder must "
                "be of one model: build the index anew where the encoder changed"
            )
        unit = np.empty_like(array)
        height = max(1, _BLOCK // self._dimension)
        bad: list[int] = []
        for start in range(0, len(array), height):
            rows = slice(start, start + height)
            wide = array[rows].astype(np.float64)
            norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            wrong = ~np.isfinite(norms) | (norms == 0.0)
            bad += (np.flatnonzero(wrong) + start).tolist()
            unit[rows] = wide / np.where(wrong, 1.0, norms)[:, None]
        if bad:
            who = [f"query {i}" if ids is None or i >= len(ids) else ids[i] for i in bad[:4]]
            raise NonFiniteEmbeddingError(
                f"expected finite vectors that are not zero, but {len(bad)} of {len(array)} hold NaN or infinity or "
                f"are zero, the first {_first(who)}; check those rows' images, and the encoder's precision"
            )
        return unit


def _strings(ids: Sequence[str], name: str) -> list[str]:
    if isinstance(ids, str):
        raise TypeError(f"{name} is a list of ids, got the one string {ids!r}; write [{ids!r}]")
    for id in ids:
        if not isinstance(id, str):
            raise TypeError(f"{name} are strings, got {id!r} of type {type(id).__name__}; write str(...)")
    return list(ids)


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _per_query(entries: Sequence[str | Collection[str] | None] | None, count: int, name: str) -> list[Collection[str]]:
    """Each query's exclusions as a collection."""
    if entries is None:
        return [()] * count
    if isinstance(entries, str) or len(entries) != count:
        got = f"the one string {entries!r}" if isinstance(entries, str) else f"{len(entries)} entries"
        raise ValueError(f"{name} has one entry (or None) for each of {count} queries, got {got}")
    return [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in entries]


def _pairs(numbers: list[list[int]], stride: int) -> np.ndarray:
    pairs = (query * stride + number for query, several in enumerate(numbers) for number in several)
    return np.fromiter(pairs, np.int64)
