"""Kinds of index by name: those that ship, and those that you register."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..types import VectorIndex
from ..utils.files import read_folder
from .faiss_kinds import IndexKind

__all__ = ["check_index", "index_kinds", "load_index", "loader", "make_index", "register_index", "ships"]

#: What makes an empty index: `factory(dimension, **options)`.
IndexFactory = Callable[..., VectorIndex]


def _faiss(kind: IndexKind) -> IndexFactory:
    def make(dimension: int, *, shard_rows: int | None = None, **options: Any) -> VectorIndex:
        if shard_rows is None:
            from .demo_index import DemoIndex

            return DemoIndex(dimension, kind=kind, **options)  # type: ignore[arg-type]  # one of the three below
        from .sharded import ShardedIndex

        return ShardedIndex(dimension, shard_rows=shard_rows, kind=kind, **options)

    return make


#: The kinds of FAISS index; their options may come from a file.
_SHIPPED: tuple[IndexKind, ...] = ("flat", "hnsw", "ivfpq")
_FACTORIES: dict[str, IndexFactory] = {kind: _faiss(kind) for kind in _SHIPPED}


def register_index(name: str, factory: IndexFactory) -> None:
    """Add a kind of index, for `index_kind=` and `drum-hf index --kind`.

    Args:
        name: of the kind; one that is registered already is replaced.
        factory: a class that fulfils [`VectorIndex`][drum_hf.types.VectorIndex], or a function;
            `factory(dimension, **options)` makes an empty index. Where indexes have `save(folder)` and the factory
            has `load(folder, mmap=False)`, the vectors are saved with a retriever; else they are embedded anew.

    Raises:
        ValueError: the name is that of a kind that ships.

    Example:
        >>> import functools
        >>> from drum_hf.index import DemoIndex, index_kinds, register_index
        >>> register_index("half", functools.partial(DemoIndex, storage="float16"))
        >>> index_kinds()
        ('flat', 'hnsw', 'ivfpq', 'half')
    """
    if name in _SHIPPED:
        raise ValueError(f"expected a new name for a kind of index, got {name!r}, which ships with drum-hf")
    _FACTORIES[name] = factory


def index_kinds() -> tuple[str, ...]:
    """Names for `index_kind=`."""
    return tuple(_FACTORIES)


def _factory(kind: str) -> IndexFactory:
    if not isinstance(kind, str) or kind not in _FACTORIES:
        raise ValueError(
            f"kind is one of {', '.join(map(repr, _FACTORIES))}, got {kind!r}; add others with register_index"
        )
    return _FACTORIES[kind]


def make_index(dimension: int, *, kind: str = "flat", **options: Any) -> VectorIndex:
    """An empty index.

    Args:
        dimension: width of the vectors.
        kind: one of `index_kinds`.
        options: of the kind: for those that ship, of [`DemoIndex`][drum_hf.index.demo_index.DemoIndex], and
            `shard_rows`, which makes it a [`ShardedIndex`][drum_hf.index.sharded.ShardedIndex].

    Raises:
        ValueError, TypeError: an unknown kind, or options that it doesn't take.
    """
    return _factory(kind)(dimension, **options)


def check_index(kind: str, options: Mapping[str, Any]) -> None:
    """Raise what `make_index` would; an index that may have effects, one that you registered, is not made."""
    _factory(kind)
    if kind in _SHIPPED:
        make_index(1, kind=kind, **options)


def ships(kind: str | None) -> bool:
    """Whether it is a kind of ours."""
    return kind in _SHIPPED


def loader(kind: str | None) -> Callable[..., VectorIndex] | None:
    """What reads a saved index of this kind; None where nothing does."""
    return _load_faiss if ships(kind) else getattr(_FACTORIES.get(kind or ""), "load", None)


def load_index(directory: str | os.PathLike[str], *, mmap: bool = False) -> VectorIndex:
    """Read a `DemoIndex` or `ShardedIndex` that was saved.

    Args:
        mmap: leave the stored vectors in their files; see [`DemoIndex.load`][drum_hf.index.demo_index.DemoIndex.load].

    Raises:
        SavedFileError: a file is missing or altered.
        ValueError: `mmap` of an `hnsw` index.
    """
    return _load_faiss(directory, mmap=mmap)


def _load_faiss(directory: str | os.PathLike[str], *, mmap: bool = False) -> VectorIndex:
    from .demo_index import DemoIndex
    from .files import SHARDS
    from .sharded import ShardedIndex

    def read(folder: Path) -> VectorIndex:
        kind = ShardedIndex if os.path.lexists(folder / SHARDS) else DemoIndex
        return kind.load(folder, mmap=mmap)

    return read_folder(directory, SHARDS, read)
