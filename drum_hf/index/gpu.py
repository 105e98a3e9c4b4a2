"""A structure whose proposals come from a GPU; the stored vectors, and the last word on scores, stay on the host.

A GPU index takes no selector, so that removed rows are proposed like all others: the index fetches more and leaves
them out itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import DependencyError
from ..utils.optional import require_faiss
from .faiss_kinds import Flat, Graph, Lists

__all__ = ["OnGpu", "transfer"]

#: Rows copied at once.
_BLOCK = 1 << 16


def transfer(device: int) -> Callable[[Any], Any]:
    """What copies a FAISS index to a GPU.

    Raises:
        DependencyError: this FAISS has no GPU support, or there is no such GPU.
    """
    faiss = require_faiss()
    count = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else None
    if count is None or device >= count:
        got = "this faiss is built for CPUs alone" if count is None else f"faiss sees {count} GPUs"
        raise DependencyError(
            f"expected faiss with GPU support and GPU {device}, but {got}; install it by: pip uninstall faiss-cpu && "
            "pip install faiss-gpu-cu12"
        )
    resources = faiss.StandardGpuResources()

    def copy(index: Any) -> Any:
        options = faiss.GpuClonerOptions()
        # Tables of 64 codes don't fit a GPU's shared memory as float32. They only propose.
        options.useFloat16 = isinstance(index, faiss.IndexIVFPQ)
        on_gpu = faiss.index_cpu_to_gpu(resources, device, index, options)
        on_gpu.referenced = resources  # must live as long as what uses it
        return on_gpu

    return copy


class OnGpu(Flat):
    """A `Flat` or `Lists` that a GPU searches.

    Float16 and int8 rows are copied as the float32 numbers they stand for: the GPU ranks what the host compares.

    Args:
        host: what holds the vectors, and is saved.
        copy: brings a FAISS index to the GPU; see `transfer`.

    Raises:
        ValueError: `host` is a graph, or leaves its vectors in their file.
    """

    def __init__(self, host: Flat, copy: Callable[[Any], Any]) -> None:
        if isinstance(host, Graph) or host.mapped is not None:
            raise ValueError(
                "expected a flat or ivfpq index with its vectors in memory; a GPU searches no hnsw graph, and no "
                "vectors in a file"
            )
        super().__init__(host.dimension, host.storage)
        self.host, self._copy = host, copy
        self._device: Any = None
        self._of: Any = None  # the lists that were copied
        self._lock = threading.Lock()  # a GPU index answers one call at a time
        self._renew()

    def _renew(self) -> None:
        if isinstance(self.host, Lists) and self.host.lists is not None:
            self._of, self._device = self.host.lists, self._copy(self.host.lists)
            return
        self._of, self._device = None, self._copy(require_faiss().IndexFlatIP(self.dimension))
        for start in range(0, self.size, _BLOCK):
            self._device.add(self.host.vectors(slice(start, start + _BLOCK)))

    @property
    def table(self) -> Any:
        return self.host.table

    @property
    def exact(self) -> bool:
        return self.host.exact

    @property
    def filters(self) -> bool:
        return False

    @property
    def size(self) -> int:
        return self.host.size

    def empty(self) -> OnGpu:
        return OnGpu(self.host.empty(), self._copy)

    def codes(self) -> np.ndarray:
        return self.host.codes()

    def vectors(self, rows: Any) -> np.ndarray:
        return self.host.vectors(rows)

    def add(self, unit: np.ndarray) -> None:
        before = self.size
        self.host.add(unit)
        if getattr(self.host, "lists", None) is not self._of:
            self._renew()  # learned anew
            return
        # As they are stored, which the host's int8 rounds.
        self._device.add(self.host.vectors(slice(before, self.size)))

    def remove(self, rows: np.ndarray) -> bool:
        return False

    def propose(
        self, queries: np.ndarray, length: int, *, living: np.ndarray | None, breadth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._of is not None:
                self._device.nprobe = min(breadth, self._of.nlist)
            return self._device.search(queries, length)

    def state(self) -> dict[str, np.ndarray]:
        return self.host.state()

    def restore(
        self, codes: Iterator[np.ndarray], state: Mapping[str, np.ndarray], mapped: np.ndarray | None = None
    ) -> None:
        self.host.restore(codes, state, mapped)
        self._renew()
