"""Nearest neighbours by id: FAISS in one file, in shards, and on GPUs; other kinds by registration."""

from .demo_index import DemoIndex
from .registry import index_kinds, load_index, make_index, register_index
from .sharded import ShardedIndex

__all__ = ["DemoIndex", "ShardedIndex", "index_kinds", "load_index", "make_index", "register_index"]
