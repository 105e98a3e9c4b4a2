"""Nearest neighbours by id: FAISS in one file, in shards, and on GPUs."""

from .demo_index import DemoIndex
from .sharded import ShardedIndex, load_index, make_index

__all__ = ["DemoIndex", "ShardedIndex", "load_index", "make_index"]
