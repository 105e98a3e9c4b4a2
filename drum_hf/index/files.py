"""The two files of a saved `DemoIndex`: its tensors, and the ids, groups and parameters that belong to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SavedFileError
from ..utils.files import refuse_special, writing
from .faiss_kinds import CODES

#: 1 held float32 vectors alone and the sizes of the batches that a graph is built from; 2 holds the graph.
_FORMAT_VERSION = 2
VECTORS, META = "vectors.safetensors", "index.json"
#: Of ids, groups and parameters; earlier files have none.
_ENTRIES_SUM = "entries_sha256"
_ENTRIES: dict[str, type] = dict.fromkeys(("kind", "vectors_sha256"), str)
_ENTRIES |= dict.fromkeys(("dimension", "hnsw_m", "ef_construction", "ef_search"), int)
_ENTRIES |= dict.fromkeys(("ids", "groups"), list)
#: What either version has beside these.
_MORE: dict[int, dict[str, type]] = {
    1: {"batches": list},
    2: {"storage": str} | dict.fromkeys(("pq_bytes", "nprobe", "refine"), int),
}
_DTYPES = {np.float32: "F32", np.float16: "F16", np.uint8: "U8", np.int32: "I32", np.int64: "I64"}
#: Rows read at once, so that a large file is never in memory beside the index that is made of it.
_BLOCK = 1 << 16
#: How far a stored vector's length may be from 1. Half precision gets it right to 5e-4.
_ROUNDING = 1e-2


def write(
    directory: str | os.PathLike[str], vectors: np.ndarray, state: Mapping[str, np.ndarray], entries: dict[str, Any]
) -> None:
    """Write stored vectors of shape (n, dimension), further tensors, and what belongs to them as JSON.

    Each file is written aside and renamed, so that a killed save leaves whole files; should it leave a new one beside
    an old one, `reading` says so.
    """
    folder = Path(directory)
    tensors = {"vectors": vectors, **state}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    sums = {"vectors_sha256": digest.hexdigest(), _ENTRIES_SUM: entries_sum(entries)}
    meta = {"format_version": _FORMAT_VERSION, **sums, **entries}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / VECTORS) as path:
            _write_tensors(path, tensors)
        with _replacing(folder / META) as path:
            path.write_text(json.dumps(meta, indent=1), encoding="utf-8")


def entries_sum(meta: Mapping[str, Any]) -> str:
    """SHA-256 of all that stands in the JSON file, its other checksum and its version aside."""
    entries = {key: meta[key] for key in meta.keys() - {"format_version", "vectors_sha256", _ENTRIES_SUM}}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, written from the arrays themselves: the library's own `save_file` copies them all first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that every tensor is aligned
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype.type], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name])
            file.write(array.data if array.size else b"")


class Saved:
    """What `write` wrote, checked; tensors are read when they are asked for."""

    def __init__(self, meta: dict[str, Any], file: Any, path: Path) -> None:
        self.meta, self._file, self._path = meta, file, path

    @property
    def version(self) -> int:
        return self.meta["format_version"]

    def vectors(self) -> np.ndarray:
        """All stored vectors: (n, dimension)."""
        return self._file.get_tensor("vectors")

    def mapped(self) -> np.ndarray:
        """As `vectors`, read from the file only where they are looked at."""
        dtype = CODES[self.meta.get("storage", "float32")]
        rows = len(self.meta["ids"])
        if not rows:
            return self.vectors()
        with self._path.open("rb") as file:  # its header was checked when it was opened
            length = int.from_bytes(file.read(8), "little")
            start = json.loads(file.read(length))["vectors"]["data_offsets"][0]
        shape = (rows, self.meta["dimension"])
        return np.memmap(self._path, dtype, mode="r", offset=8 + length + start, shape=shape)

    def blocks(self, name: str = "vectors") -> Iterator[np.ndarray]:
        """The rows of a tensor, some at a time."""
        tensor = self._file.get_slice(name)
        rows = tensor.get_shape()[0]
        for start in range(0, rows, _BLOCK):
            yield tensor[start : min(start + _BLOCK, rows)]

    def state(self) -> dict[str, np.ndarray]:
        """The further tensors, by name."""
        return {name: self._file.get_tensor(name) for name in self._file.keys() if name != "vectors"}  # noqa: SIM118


@contextlib.contextmanager
def reading(directory: str | os.PathLike[str]) -> Iterator[Saved]:
    """What `write` wrote, its parts checked against one another."""
    from safetensors import SafetensorError, safe_open

    folder = Path(directory)
    meta = _read_meta(folder / META)
    path, ids, groups = folder / VECTORS, meta["ids"], meta["groups"]
    try:
        refuse_special(path)
        file = safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise broken(path, f"the file is truncated or not safetensors ({error})") from error
    with file:
        saved = Saved(meta, file, path)
        _check_vectors(path, file, meta)
        digest, sound = hashlib.sha256(), True
        for name in sorted(file.keys()):
            for block in saved.blocks(name):
                digest.update(np.ascontiguousarray(block).data)
                sound = sound and (name != "vectors" or _are_unit(block))
        if digest.hexdigest() != meta["vectors_sha256"]:
            raise broken(path, f"its content is not what {META} was saved with")
        if not sound:
            raise broken(path, "its vectors are not all finite and of length 1")
        rows = sum(meta["batches"]) if saved.version == 1 else len(ids)
        if len(groups) != len(ids) or rows != len(ids) or len(set(ids)) != len(ids):
            fault = f"{len(ids)} ids ({len(set(ids))} unique) stand beside {len(groups)} groups and {rows} rows"
            raise broken(folder / META, fault)
        noted = meta.get(_ENTRIES_SUM)
        if noted is not None and noted != entries_sum(meta):
            raise broken(folder / META, "an id, a group or a parameter is not what was saved")
        yield saved


def _are_unit(block: np.ndarray) -> bool:
    """Whether stored vectors are of unit length, as far as half precision goes; int8 is bounded by its ranges."""
    if block.dtype == np.uint8:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(block.astype(np.float32), axis=1)
    return bool((np.abs(lengths - 1.0) < _ROUNDING).all())


def broken(path: Path, fault: str) -> SavedFileError:
    return SavedFileError(f"{path}: {fault}; restore the folder from where it was saved, or build the index anew")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, flushed and renamed over it when the block ends well."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        refuse_special(path)
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, f"the file can't be read as JSON ({error})") from error
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if not isinstance(version, int) or version not in _MORE:
        raise SavedFileError(
            f"{path}: expected format version {_FORMAT_VERSION} or an older one, got {version!r}; update drum-hf, or "
            "build the index anew"
        )
    sound = (
        all(type(meta.get(key)) is expected for key, expected in (_ENTRIES | _MORE[version]).items())
        and all(isinstance(id, str) for id in meta["ids"])
        and all(group is None or isinstance(group, str) for group in meta["groups"])
        and all(type(size) is int and size >= 0 for size in meta.get("batches", []))
    )
    if not sound:
        raise broken(path, "an entry is missing or has another type than DemoIndex.save wrote")
    return meta


def _check_vectors(path: Path, file: Any, meta: dict[str, Any]) -> None:
    flat = [name for name in file.keys() if not file.get_slice(name).get_shape()]  # noqa: SIM118
    if flat:
        raise broken(path, f"its tensor {flat[0]!r} has no rows")
    wanted = CODES.get(meta.get("storage", "float32"), np.float32)
    names = {np.float32: "F32", np.float16: "F16", np.uint8: "U8"}
    shape = [len(meta["ids"]), meta["dimension"]]
    tensor = file.get_slice("vectors") if "vectors" in file.keys() else None  # noqa: SIM118
    if tensor is None or tensor.get_dtype() != names[wanted] or tensor.get_shape() != shape:
        got = "none" if tensor is None else f"{tensor.get_dtype()} of shape {tensor.get_shape()}"
        fault = f"expected a {names[wanted]} tensor 'vectors', with the {shape[0]} ids of dimension {shape[1]} that"
        raise broken(path, f"{fault} {META} lists; got {got}")
