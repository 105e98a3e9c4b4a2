"""The two files of a saved `DemoIndex`: its vectors, and the ids, groups and parameters that belong to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import SavedFileError

_FORMAT_VERSION = 1
VECTORS, META = "vectors.safetensors", "index.json"
_ENTRIES: dict[str, type] = dict.fromkeys(("kind", "vectors_sha256"), str)
_ENTRIES |= dict.fromkeys(("dimension", "hnsw_m", "ef_construction", "ef_search"), int)
_ENTRIES |= dict.fromkeys(("ids", "groups", "batches"), list)


def write(directory: str | os.PathLike[str], vectors: np.ndarray, entries: dict[str, Any]) -> None:
    """Write float32 vectors of shape (n, dimension), and what belongs to them as JSON.

    Each file is written aside and renamed, so that a killed save leaves whole files; should it leave a new one beside
    an old one, `read` says so.
    """
    from safetensors.numpy import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format_version": _FORMAT_VERSION, "vectors_sha256": _checksum(vectors), **entries}
    with _replacing(folder / VECTORS) as path:
        save_file({"vectors": vectors}, path)
    with _replacing(folder / META) as path:
        path.write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read(directory: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors and entries that `write` wrote, checked against one another."""
    folder = Path(directory)
    meta = _read_meta(folder / META)
    ids, groups, rows = meta["ids"], meta["groups"], sum(meta["batches"])
    vectors = _read_vectors(folder / VECTORS, len(ids), meta["dimension"])
    if _checksum(vectors) != meta["vectors_sha256"]:
        raise broken(folder / VECTORS, f"its content is not what {META} was saved with")
    if len(groups) != len(ids) or rows != len(ids) or len(set(ids)) != len(ids):
        fault = f"{len(ids)} ids ({len(set(ids))} unique) stand beside {len(groups)} groups and {rows} rows"
        raise broken(folder / META, fault)
    return vectors, meta


def broken(path: Path, fault: str) -> SavedFileError:
    return SavedFileError(f"{path}: {fault}; restore the folder from where it was saved, or build the index anew")


def _checksum(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()


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
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, ValueError) as error:
        raise broken(path, f"the file can't be read as JSON ({error})") from error
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != _FORMAT_VERSION:
        raise SavedFileError(
            f"{path}: expected format version {_FORMAT_VERSION}, got {version!r}; update drum-hf, or build "
            "the index anew"
        )
    sound = (
        all(type(meta.get(key)) is expected for key, expected in _ENTRIES.items())
        and all(isinstance(id, str) for id in meta["ids"])
        and all(group is None or isinstance(group, str) for group in meta["groups"])
        and all(type(size) is int and size >= 0 for size in meta["batches"])
    )
    if not sound:
        raise broken(path, "an entry is missing or has another type than DemoIndex.save wrote")
    return meta


def _read_vectors(path: Path, rows: int, dimension: int) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors = load_file(path).get("vectors")
    except FileNotFoundError as error:
        raise broken(path, "the file is missing") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise broken(path, f"the file is truncated or not safetensors ({error})") from error
    if vectors is None or vectors.dtype != np.float32 or vectors.shape != (rows, dimension):
        came = "none" if vectors is None else f"{vectors.dtype} of shape {vectors.shape}"
        fault = f"expected a float32 tensor 'vectors', with the {rows} ids of dimension {dimension} that {META} lists"
        raise broken(path, f"{fault}; got {came}")
    return vectors
