"""The two files of a saved `DemoIndex`: its tensors, and the ids, groups and parameters that belong to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SavedFileError
from ..utils.files import leads_outside, read_json, refuse_special
from .faiss_kinds import CODES

_FORMAT_VERSION = 2
VECTORS, META = "vectors.safetensors", "index.json"
FILES = (VECTORS, META)
#: The list of an index in shards, and what an index of either kind consists of.
SHARDS = "shards.json"
INDEX_FILES = (*FILES, SHARDS, "shard-[0-9][0-9][0-9][0-9][0-9]")
_ENTRIES: dict[str, type] = dict.fromkeys(("kind", "storage", "vectors_sha256", "entries_sha256"), str)
_ENTRIES |= dict.fromkeys(("format_version", "dimension", "hnsw_m", "ef_construction", "ef_search"), int)
_ENTRIES |= dict.fromkeys(("pq_bytes", "nprobe", "refine"), int)
_ENTRIES |= dict.fromkeys(("ids", "groups"), list)
#: Bytes of the JSON file, at most, in any case and for each row: its id and its group.
_MOST_META, _MOST_OF_ROW = 1 << 20, 8 << 10
_DTYPES = {np.float32: "F32", np.float16: "F16", np.uint8: "U8", np.int32: "I32", np.int64: "I64"}
#: Rows read at once, so that a large file is never in memory beside the index that is made of it.
_BLOCK = 1 << 16
#: How far a stored vector's length may be from 1. Half precision gets it right to 5e-4.
_ROUNDING = 1e-2


def write(folder: Path, vectors: np.ndarray, state: Mapping[str, np.ndarray], entries: dict[str, Any]) -> None:
    """Write stored vectors of shape (n, dimension), further tensors, and what belongs to them as JSON."""
    tensors = {"vectors": vectors, **state}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    sums = {"vectors_sha256": digest.hexdigest(), "entries_sha256": entries_sum(entries)}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / VECTORS, tensors)
    meta = {"format_version": _FORMAT_VERSION, **sums, **entries}
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def entries_sum(meta: Mapping[str, Any]) -> str:
    """SHA-256 of all that stands in the JSON file, its other checksum and its version aside."""
    entries = {key: meta[key] for key in meta.keys() - {"format_version", "vectors_sha256", "entries_sha256"}}
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

    def vectors(self) -> np.ndarray:
        """All stored vectors: (n, dimension)."""
        return self._file.get_tensor("vectors")

    def mapped(self) -> np.ndarray:
        """As `vectors`, read from the file only where they are looked at."""
        dtype = CODES[self.meta["storage"]]
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
def reading(folder: Path) -> Iterator[Saved]:
    """What `write` wrote, its parts checked against one another."""
    from safetensors import SafetensorError, safe_open

    path = folder / VECTORS
    for name in FILES:
        if leads_outside(folder / name, folder):
            raise broken(folder / name, "it is a link that leads out of the folder")
    try:
        refuse_special(path)
        file = safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise broken(path, f"the file is truncated or not safetensors ({error})") from error
    with file:
        shape = file.get_slice("vectors").get_shape() if "vectors" in file.keys() else []  # noqa: SIM118
        meta = _read_meta(folder / META, rows=shape[0] if shape else 0)
        ids, groups = meta["ids"], meta["groups"]
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
        if len(groups) != len(ids) or len(set(ids)) != len(ids):
            fault = f"{len(ids)} ids ({len(set(ids))} unique) stand beside {len(groups)} groups"
            raise broken(folder / META, fault)
        if meta["entries_sha256"] != entries_sum(meta):
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


def _read_meta(path: Path, *, rows: int) -> dict[str, Any]:
    try:
        meta = read_json(path, limit=_MOST_META + _MOST_OF_ROW * rows)
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, ValueError) as error:
        raise broken(path, f"the file can't be read as JSON ({error})") from error
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != _FORMAT_VERSION:
        raise SavedFileError(
            f"{path}: expected format version {_FORMAT_VERSION}, got {version!r:.80}; update drum-hf, or build the "
            "index anew"
        )
    sound = (
        meta.keys() == _ENTRIES.keys()
        and all(type(meta[key]) is expected for key, expected in _ENTRIES.items())
        and all(_is_text(id) for id in meta["ids"])
        and all(group is None or _is_text(group) for group in meta["groups"])
    )
    if not sound:
        raise broken(path, "an entry is missing, unknown, or has another type than DemoIndex.save wrote")
    return meta


def _is_text(value: Any) -> bool:
    """Whether it can be written again: JSON may hold halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_vectors(path: Path, file: Any, meta: dict[str, Any]) -> None:
    flat = [name for name in file.keys() if not file.get_slice(name).get_shape()]  # noqa: SIM118
    if flat:
        raise broken(path, f"its tensor {flat[0]!r} has no rows")
    wanted = CODES.get(meta["storage"], np.float32)
    names = {np.float32: "F32", np.float16: "F16", np.uint8: "U8"}
    shape = [len(meta["ids"]), meta["dimension"]]
    tensor = file.get_slice("vectors") if "vectors" in file.keys() else None  # noqa: SIM118
    if tensor is None or tensor.get_dtype() != names[wanted] or tensor.get_shape() != shape:
        got = "none" if tensor is None else f"{tensor.get_dtype()} of shape {tensor.get_shape()}"
        fault = f"expected a {names[wanted]} tensor 'vectors', with the {shape[0]} ids of dimension {shape[1]} that"
        raise broken(path, f"{fault} {META} lists; got {got}")
