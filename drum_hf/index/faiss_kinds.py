"""What FAISS holds for a `DemoIndex`: the vectors as they are stored, and what proposes the nearest of them.

Rows are numbered in the order they were added. A structure only proposes: the index compares the proposals with the
stored vectors itself, and leaves out what a query must not get.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from ..utils.optional import require_faiss

IndexKind = Literal["flat", "hnsw", "ivfpq"]
Storage = Literal["float32", "float16", "int8"]
KINDS, STORAGES = get_args(IndexKind), get_args(Storage)

#: What a saved tensor of vectors holds, for each storage.
CODES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.uint8}
#: Rows that pass through the host at once where a structure is built from another.
_BLOCK = 1 << 15
#: Fewest points that FAISS wants for a centre, and so fewest rows that 256 codes a part are learned from.
_PER_CENTRE = 39
_LEAST = _PER_CENTRE * 256
#: Most rows that codes are learned from (FAISS's limit of 256 points a centroid), and rows for each list's centre
#: (FAISS advises 30 to 256).
_SAMPLE, _POINTS = 256 * 256, 64
#: Lists for n rows: 4 sqrt(n), the low end of what FAISS advises.
_LISTS = 4
#: Lists and codes are learned anew when the rows have become so many times those that they were learned from.
_GROWTH = 4
#: An int8 dimension's range is that of the first rows. Where these are fewer than so many, it is at least so many
#: standard deviations of a random unit vector's entry (our choice; too wide a range costs recall).
_ENOUGH, _DEVIATIONS = 10_000, 5.0
#: An entry of a unit vector is in [-1, 1], so that a range has at most twice that extent; and a little for rounding.
_WIDEST = 2.001


class Flat:
    """The stored vectors alone; every row is compared.

    Args:
        dimension: width of the vectors.
        storage: float32; float16; or int8, that is 256 steps between a smallest and a largest value of each dimension.
    """

    def __init__(self, dimension: int, storage: Storage) -> None:
        self.dimension, self.storage = dimension, storage
        self.mapped: np.ndarray | None = None  # the stored vectors, where they stay in their file
        self.index = self._make()

    def _make(self) -> Any:
        faiss = require_faiss()
        if self.storage == "float32":
            return faiss.IndexFlatIP(self.dimension)
        return faiss.IndexScalarQuantizer(self.dimension, _quantizer(self.storage), faiss.METRIC_INNER_PRODUCT)

    @property
    def table(self) -> Any:
        """The FAISS index that holds the vectors."""
        return self.index

    @property
    def size(self) -> int:
        return self.table.ntotal if self.mapped is None else len(self.mapped)

    @property
    def exact(self) -> bool:
        """Whether the proposals are the nearest stored vectors, but for rounding."""
        return True

    @property
    def filters(self) -> bool:
        """Whether removed rows are never proposed."""
        return True

    def empty(self) -> Flat:
        """A structure without rows that stores vectors just as this one does."""
        fresh = self._like()
        if self.storage == "int8" and self.index.is_trained:
            fresh._set_ranges(self.ranges())
        return fresh

    def _like(self) -> Flat:
        return Flat(self.dimension, self.storage)

    # The vectors

    def codes(self) -> np.ndarray:
        """The rows as stored, (size, dimension) of the storage's type; a view, valid until the next change."""
        if self.mapped is not None:
            return self.mapped
        if not self.size:
            return np.zeros((0, self.dimension), CODES[self.storage])
        table = self.table
        raw = require_faiss().rev_swig_ptr(table.codes.data(), self.size * table.code_size)
        return raw.view(CODES[self.storage]).reshape(self.size, self.dimension)

    def vectors(self, rows: Any) -> np.ndarray:
        """The stored vectors of these rows (any shape, or a slice), float32 with an axis more; -1 gives row 0.

        Of a slice they may be a view, to be read only, and before the next change.
        """
        if not isinstance(rows, slice):
            rows = np.maximum(np.asarray(rows, np.int64), 0)
        codes = self.codes()[rows]
        if self.storage != "int8":
            return codes.astype(np.float32, copy=False)
        flat = np.ascontiguousarray(codes).reshape(-1, self.dimension)
        values = self.table.sa_decode(flat) if len(flat) else flat.astype(np.float32)
        return values.reshape(codes.shape)

    def ranges(self) -> np.ndarray:
        """Smallest value and extent of each dimension of int8: float32 (2, dimension)."""
        return require_faiss().vector_to_array(self.table.sq.trained).reshape(2, self.dimension)

    def _set_ranges(self, ranges: np.ndarray) -> None:
        require_faiss().copy_array_to_vector(np.ascontiguousarray(ranges, np.float32).ravel(), self.table.sq.trained)
        self.table.is_trained = self.index.is_trained = True

    def _learn(self, unit: np.ndarray) -> None:
        if not self.index.is_trained:
            low, high = unit.min(axis=0), unit.max(axis=0)
            if len(unit) < _ENOUGH:
                least = min(1.0, _DEVIATIONS / math.sqrt(self.dimension))
                low, high = np.minimum(low, -least), np.maximum(high, least)
            self._set_ranges(np.stack([low, high - low]))

    # Changing and asking

    def add(self, unit: np.ndarray) -> None:
        self._learn(unit)
        self.index.add(unit)

    def remove(self, rows: np.ndarray) -> bool:
        """Take rows out; the others close up, in order. False: this structure can't, and must be built anew."""
        if self.mapped is not None:
            return False
        self.index.remove_ids(rows)
        return True

    def propose(
        self, queries: np.ndarray, length: int, *, living: np.ndarray | None, breadth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each query its `length` nearest rows, as far as this structure can tell.

        Args:
            living: bits of the rows that may be proposed, None for all.
            breadth: how far the search goes, in the structure's own terms.

        Returns:
            float32 scores and int64 rows, both (q, length), the best first; row -1 where there are fewer.
        """
        if self.mapped is not None:
            return self._compare(queries, length, living)
        parameters = None if living is None else require_faiss().SearchParameters(sel=_selector(living))
        return self.index.search(queries, length, params=parameters)

    def _compare(self, queries: np.ndarray, length: int, living: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As `propose`, by products with some rows at a time."""
        best = np.full((len(queries), length), -np.inf, np.float32)
        rows = np.full((len(queries), length), -1, np.int64)
        for start in range(0, self.size, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.size))
            products = queries @ self.vectors(block).T
            if living is not None:
                products[:, ~_unpacked(living, block)] = -np.inf
            kept = min(length, products.shape[1])
            near = np.argpartition(-products, kept - 1, axis=1)[:, :kept]
            best = np.concatenate([best, np.take_along_axis(products, near, 1)], axis=1)
            rows = np.concatenate([rows, near + start], axis=1)
            first = np.argsort(-best, axis=1, kind="stable")[:, :length]
            best, rows = np.take_along_axis(best, first, 1), np.take_along_axis(rows, first, 1)
        rows[np.isneginf(best)] = -1
        return best, rows

    # Its state, as plain arrays

    def state(self) -> dict[str, np.ndarray]:
        """All that `restore` needs beside the vectors themselves."""
        return {"ranges": self.ranges()} if self.storage == "int8" and self.size else {}

    def restore(
        self, codes: Iterator[np.ndarray], state: Mapping[str, np.ndarray], mapped: np.ndarray | None = None
    ) -> None:
        """Become what was saved.

        Args:
            codes: the stored vectors, some rows at a time.
            state: what `state` gave.
            mapped: all stored vectors in their file, where they shall stay; `codes` is not read then.

        Raises:
            ValueError: the arrays do not fit one another; nothing is read or written out of bounds.
        """
        if "ranges" in state:
            ranges = _checked(state, "ranges", np.float32, (2, self.dimension))
            if not (np.abs(ranges) <= _WIDEST).all() or (ranges[1] < 0).any():
                raise ValueError("'ranges' are none of unit vectors")
            self._set_ranges(ranges)
        if mapped is not None:
            if len(mapped) and not self.table.is_trained:
                raise ValueError("'ranges' are missing")
            self.mapped = mapped
            return
        for block in codes:
            if not self.table.is_trained:
                raise ValueError("'ranges' are missing")
            self.table.add_sa_codes(np.ascontiguousarray(block).view(np.uint8))


class Graph(Flat):
    """A graph of neighbours over the vectors (HNSW), built by one thread: the same adds give the same graph."""

    def __init__(self, dimension: int, storage: Storage, *, neighbours: int, breadth: int) -> None:
        self.neighbours, self.breadth = neighbours, breadth
        super().__init__(dimension, storage)

    def _make(self) -> Any:
        faiss = require_faiss()
        if self.storage == "float32":
            index = faiss.IndexHNSWFlat(self.dimension, self.neighbours, faiss.METRIC_INNER_PRODUCT)
        else:
            kind = _quantizer(self.storage)
            index = faiss.IndexHNSWSQ(self.dimension, kind, self.neighbours, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.breadth
        return index

    @property
    def table(self) -> Any:
        return require_faiss().downcast_index(self.index.storage)

    @property
    def exact(self) -> bool:
        return False

    def _like(self) -> Graph:
        return Graph(self.dimension, self.storage, neighbours=self.neighbours, breadth=self.breadth)

    def add(self, unit: np.ndarray) -> None:
        self._learn(unit)
        # Levels are drawn from the number of rows, not from how they came to be here: a loaded graph grows as the
        # saved one would have.
        self.index.hnsw.rng = require_faiss().RandomGenerator(12345 + self.size)
        with _one_thread():
            self.index.add(unit)

    def remove(self, rows: np.ndarray) -> bool:
        return False

    def propose(
        self, queries: np.ndarray, length: int, *, living: np.ndarray | None, breadth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        options = {} if living is None else {"sel": _selector(living)}
        parameters = require_faiss().SearchParametersHNSW(efSearch=max(breadth, length), **options)
        return self.index.search(queries, length, params=parameters)

    def state(self) -> dict[str, np.ndarray]:
        faiss, hnsw = require_faiss(), self.index.hnsw
        if not self.size:
            return {}
        graph = {"levels": hnsw.levels, "neighbours": hnsw.neighbors}
        entry = np.asarray([hnsw.entry_point], np.int32)
        return super().state() | {name: faiss.vector_to_array(v) for name, v in graph.items()} | {"entry": entry}

    def restore(
        self, codes: Iterator[np.ndarray], state: Mapping[str, np.ndarray], mapped: np.ndarray | None = None
    ) -> None:
        super().restore(codes, state, mapped)
        faiss, hnsw, size = require_faiss(), self.index.hnsw, self.size
        if not size:
            return
        slots = faiss.vector_to_array(hnsw.cum_nneighbor_per_level).astype(np.int64)  # of a node, by its level
        levels = _checked(state, "levels", np.int32, (size,))
        entry = int(_checked(state, "entry", np.int32, (1,))[0])
        if levels.min() < 1 or levels.max() >= len(slots):
            raise ValueError("'levels' are out of range")
        offsets = np.concatenate([[0], np.cumsum(slots[levels])])
        neighbours = _checked(state, "neighbours", np.int32, (int(offsets[-1]),))
        if neighbours.min() < -1 or neighbours.max() >= size:
            raise ValueError("'neighbours' name rows that are not there")
        if not 0 <= entry < size or levels[entry] != levels.max():
            raise ValueError("'entry' is no row of the highest level")
        for level in range(1, int(levels.max())):
            owners = np.flatnonzero(levels > level)
            places = (offsets[owners] + slots[level])[:, None] + np.arange(slots[level + 1] - slots[level])
            linked = neighbours[places]
            if (levels[linked[linked >= 0]] <= level).any():
                raise ValueError(f"'neighbours' of level {level} are not all of that level")
        faiss.copy_array_to_vector(levels, hnsw.levels)
        faiss.copy_array_to_vector(offsets.astype(np.uint64), hnsw.offsets)
        faiss.copy_array_to_vector(neighbours, hnsw.neighbors)
        hnsw.entry_point, hnsw.max_level = entry, int(levels.max()) - 1
        self.index.ntotal = size


class Lists(Flat):
    """Rows in lists by their nearest centre, each with a short code (IVF-PQ), beside the vectors.

    Until there are enough rows to learn centres and codes from (9,984), every row is compared. They are learned anew
    when the rows have quadrupled. Both from a sample, by one thread and from a fixed seed.
    """

    def __init__(self, dimension: int, storage: Storage, *, code_bytes: int) -> None:
        super().__init__(dimension, storage)
        self.code_bytes = next(m for m in range(min(code_bytes, dimension), 0, -1) if dimension % m == 0)
        self.lists: Any = None
        self.learned_from = 0

    @property
    def exact(self) -> bool:
        return self.lists is None

    def _like(self) -> Lists:
        return Lists(self.dimension, self.storage, code_bytes=self.code_bytes)

    def add(self, unit: np.ndarray) -> None:
        super().add(unit)
        if self.size >= max(_LEAST, _GROWTH * self.learned_from):
            self._build()
        elif self.lists is not None:
            self.lists.add(unit)

    def _empty_lists(self, count: int) -> Any:
        faiss = require_faiss()
        centres = faiss.IndexFlatIP(self.dimension)
        metric = faiss.METRIC_INNER_PRODUCT
        lists = faiss.IndexIVFPQ(centres, self.dimension, count, self.code_bytes, 8, metric)
        lists.own_fields = True
        centres.this.disown()
        lists.cp.max_points_per_centroid = _POINTS  # the seeds are FAISS's own, and fixed
        return lists

    def _build(self) -> None:
        count = max(1, min(round(_LISTS * math.sqrt(self.size)), self.size // _PER_CENTRE))
        sample = min(self.size, max(_SAMPLE, _POINTS * count))
        rows = np.sort(np.random.default_rng(self.size).choice(self.size, sample, replace=False))
        lists = self._empty_lists(count)
        with _one_thread():
            lists.train(self.vectors(rows))
        for start in range(0, self.size, _BLOCK):
            lists.add(self.vectors(slice(start, start + _BLOCK)))
        self.lists, self.learned_from = lists, self.size

    def remove(self, rows: np.ndarray) -> bool:
        return False

    def propose(
        self, queries: np.ndarray, length: int, *, living: np.ndarray | None, breadth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.lists is None:
            return super().propose(queries, length, living=living, breadth=breadth)
        options = {} if living is None else {"sel": _selector(living)}
        parameters = require_faiss().SearchParametersIVF(nprobe=min(breadth, self.lists.nlist), **options)
        return self.lists.search(queries, length, params=parameters)

    def state(self) -> dict[str, np.ndarray]:
        if self.lists is None:
            return super().state()
        faiss, inverted = require_faiss(), self.lists.invlists
        places = np.empty(self.size, np.int32)
        codes = np.empty((self.size, self.code_bytes), np.uint8)
        for number in range(self.lists.nlist):
            if length := inverted.list_size(number):
                rows = faiss.rev_swig_ptr(inverted.get_ids(number), length)
                places[rows] = number
                raw = faiss.rev_swig_ptr(inverted.get_codes(number), length * self.code_bytes)
                codes[rows] = raw.reshape(length, self.code_bytes)
        return super().state() | {
            "centres": faiss.downcast_index(self.lists.quantizer).reconstruct_n(0, self.lists.nlist),
            "codebooks": faiss.vector_to_array(self.lists.pq.centroids).reshape(-1, self.dimension // self.code_bytes),
            "lists": places,
            "codes": codes,
            "learned_from": np.asarray([self.learned_from], np.int64),
        }

    def restore(
        self, codes: Iterator[np.ndarray], state: Mapping[str, np.ndarray], mapped: np.ndarray | None = None
    ) -> None:
        super().restore(codes, state, mapped)
        if "centres" not in state:
            return
        faiss, size = require_faiss(), self.size
        centres = _checked(state, "centres", np.float32, (len(state["centres"]), self.dimension))
        width = self.dimension // self.code_bytes
        codebooks = _checked(state, "codebooks", np.float32, (self.code_bytes * 256, width))
        places = _checked(state, "lists", np.int32, (size,))
        short = _checked(state, "codes", np.uint8, (size, self.code_bytes))
        if not len(centres) or not (np.isfinite(centres).all() and np.isfinite(codebooks).all()):
            raise ValueError("'centres' or 'codebooks' are empty or not finite")
        if size and (places.min() < 0 or places.max() >= len(centres)):
            raise ValueError("'lists' name lists that are not there")
        lists = self._empty_lists(len(centres))
        lists.quantizer.add(centres)
        faiss.copy_array_to_vector(codebooks.ravel(), lists.pq.centroids)
        lists.is_trained = True
        order = np.argsort(places, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
            if len(rows):
                chosen, ids = np.ascontiguousarray(short[rows]), np.ascontiguousarray(rows, np.int64)
                pointers = faiss.swig_ptr(ids), faiss.swig_ptr(chosen)
                lists.invlists.add_entries(int(places[rows[0]]), len(rows), *pointers)
        lists.ntotal = size
        learned_from = int(_checked(state, "learned_from", np.int64, (1,))[0])
        if not 0 < learned_from <= size:
            raise ValueError("'learned_from' is no number of rows that there were")
        self.lists, self.learned_from = lists, learned_from


def rebuilt(structure: Flat, rows: np.ndarray) -> Flat:
    """A structure of the same kind that holds these rows alone, as they are stored."""
    fresh = structure.empty()
    for start in range(0, len(rows), _BLOCK):
        fresh.add(structure.vectors(rows[start : start + _BLOCK]))
    return fresh


def _quantizer(storage: Storage) -> int:
    quantizer = require_faiss().ScalarQuantizer
    return {"float16": quantizer.QT_fp16, "int8": quantizer.QT_8bit}[storage]


def _unpacked(living: np.ndarray, block: slice) -> np.ndarray:
    """Of rows of a block that begins at a whole byte, whether they live."""
    count = block.stop - block.start
    return np.unpackbits(living[block.start // 8 : -(-block.stop // 8)], count=count, bitorder="little").astype(bool)


def _selector(living: np.ndarray) -> Any:
    return require_faiss().IDSelectorBitmap(living)


def _checked(state: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = state.get(name)
    if array is None or array.dtype != dtype or array.shape != shape:
        got = "none" if array is None else f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"expected {name!r} to be {np.dtype(dtype)} of shape {shape}, got {got}")
    return array


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS links the nodes of a graph, and sums the points of a centre, in an order that depends on its threads."""
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
