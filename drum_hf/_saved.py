"""The files of a saved retriever: written, found, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ._compat import resolve_name
from ._files import leads_outside, refuse_special
from .errors import SavedFileError
from .model_card import render_card

if TYPE_CHECKING:
    from .retriever import DemoRetriever

__all__ = [
    "CARD",
    "CONFIG",
    "ENCODER",
    "INDEX",
    "SUPPORT",
    "checksum",
    "locate",
    "move_into_place",
    "read_config",
    "write",
]

_FORMAT_VERSION = 1
#: Part of a setting's name -> the most that it may be; "" for every other (vocabularies have a million entries).
_LARGEST = {
    "layers": 1 << 10,
    "height": 1 << 12,
    "width": 1 << 12,
    "edge": 1 << 12,
    "image_size": 1 << 12,
    "": 1 << 24,
}
#: What an encoder and an index are saved as. None of it is a pickle, and torch would read one where it found one.
_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
CONFIG, CARD, SUPPORT, ENCODER, INDEX = "drum_config.json", "README.md", "support.parquet", "encoder", "index"


def write(retriever: DemoRetriever, folder: Path, *, include_support: bool, repo_id: str | None) -> None:
    """Write every file of a retriever into an empty folder."""
    retriever.encoder.save(os.fspath(folder / ENCODER), create_model_card=False)
    retriever.index.save(folder / INDEX)
    if include_support:
        retriever.support.save(folder / SUPPORT)
    config = {
        "format_version": _FORMAT_VERSION,
        "drum_hf_version": _version(),
        "strategy": retriever.strategy,
        "weights": retriever.weights,
        "base_model": retriever.base_model,
        "base_revision": retriever.base_revision,
        "adapter": retriever.encoder[0].has_adapter,
        "index": {"kind": retriever.index_kind, "options": retriever.index_options},
        "support": {
            "rows": len(retriever),
            "fingerprint": retriever.support.fingerprint,
            "included": include_support,
        },
        "teacher": retriever.teacher,
        "top_k": retriever.top_k,
        "card": retriever.card_data,
        "files": {
            path.relative_to(folder).as_posix(): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / CARD).write_text(_card(retriever, config, repo_id), encoding="utf-8")


def _card(retriever: DemoRetriever, config: Mapping[str, Any], repo_id: str | None) -> str:
    teacher = dict(retriever.teacher or {})
    if teacher.get("name") and os.path.isdir(resolve_name(teacher["name"])):
        teacher["name"] = f"a local model ({Path(teacher['name']).name})"  # folders are nobody else's business
    data = {
        "repo_id": repo_id,
        "base_model": None if os.path.isdir(resolve_name(retriever.base_model)) else retriever.base_model,
        "base_revision": retriever.base_revision,
        "strategy": config["strategy"],
        "weights": config["weights"],
        "adapter": config["adapter"],
        "dimension": retriever.encoder.get_embedding_dimension(),
        "index": retriever.index_kind,
        "support": config["support"],
        "teacher": teacher,
        "version": config["drum_hf_version"],
    }
    return render_card(data | retriever.card_data)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_into_place(partial: Path, folder: Path) -> None:
    """Replace an earlier save, file by file; the list of files goes last, so that a mixture does not load."""
    try:
        earlier = set(_read_json(folder / CONFIG)["files"])
    except (SavedFileError, KeyError, TypeError):
        earlier = set()
    made = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    for name in sorted(made, key=lambda name: name.name == CONFIG):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    for gone in earlier - {name.as_posix() for name in made}:
        if _is_inside(gone):
            (folder / gone).unlink(missing_ok=True)


def _is_inside(name: Any) -> bool:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    return not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)


def locate(name_or_path: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder, or a snapshot of the repository."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [CONFIG, CARD, SUPPORT, f"{ENCODER}/*", f"{INDEX}/*"]
    try:
        return Path(snapshot_download(os.fspath(name_or_path), allow_patterns=patterns, **hub))
    except (OSError, HFValidationError) as error:
        raise SavedFileError(
            f"expected a folder written by DemoRetriever.save_pretrained, or a repository on the Hub, but "
            f"{os.fspath(name_or_path)!r} is no folder and can't be fetched ({error}); check the name, the "
            "connection, and for a private repository the token"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        refuse_special(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedFileError(f"{path}: the file is missing: not a folder that save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SavedFileError(f"{path}: the file can't be read as JSON ({error}); save the retriever again") from error
    if not isinstance(content, dict):
        raise SavedFileError(
            f"{path}: expected a JSON object, came {type(content).__name__}; save the retriever again"
        )
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration, once every file has been found to be what was saved."""
    path = folder / CONFIG
    config = _read_json(path)
    if config.get("format_version") != _FORMAT_VERSION:
        raise SavedFileError(
            f"{path}: expected format version {_FORMAT_VERSION}, came {config.get('format_version')!r}; update "
            "drum-hf, or save the retriever again"
        )
    shape: dict[str, Any] = {
        "files": dict,
        "support": dict,
        "index": dict,
        "card": dict,
        "teacher": (dict, type(None)),
        "base_model": str,
        "base_revision": (str, type(None)),
        "adapter": bool,
        "top_k": int,
    }
    nested: dict[str, dict[str, type]] = {
        "support": {"rows": int, "fingerprint": str, "included": bool},
        "index": {"kind": str, "options": dict},
    }
    wrong = [key for key, kind in shape.items() if key not in config or not isinstance(config[key], kind)]
    for key, entries in nested.items():
        wrong += [
            f"{key}.{e}"
            for e, kind in entries.items()
            if key not in wrong and not isinstance(config[key].get(e), kind)
        ]
    if not wrong and (isinstance(config["top_k"], bool) or config["top_k"] < 1):
        wrong = ["top_k"]
    if wrong:
        raise SavedFileError(f"{path}: the entry {wrong[0]!r} is missing or of another type; save the retriever again")
    needed = {f"{INDEX}/vectors.safetensors", f"{INDEX}/index.json", f"{ENCODER}/sentence_bert_config.json"}
    needed |= {SUPPORT} if config["support"]["included"] else set()
    for name in sorted(needed | config["files"].keys()):
        if not _is_inside(name):
            raise SavedFileError(f"{path}: it lists {name!r}, which is not inside the folder; do not use this folder")
        file = folder / name
        remedy = "download or copy the folder again, or save the retriever again"
        if leads_outside(file, folder):
            raise SavedFileError(f"{file}: a link that leads out of the folder; do not use this folder, or {remedy}")
        if not file.is_file():
            raise SavedFileError(f"{file}: the file is missing; {remedy}")
        if config["files"].get(name) != checksum(file):
            raise SavedFileError(f"{file}: the file was altered since it was saved (its SHA-256 differs); {remedy}")
    stray = sorted(_strays(folder, config["files"].keys()))
    if stray:
        raise SavedFileError(
            f"{folder / stray[0]}: this file is none of those that {CONFIG} lists, or none that a retriever is made "
            "of; remove it, or download the folder again"
        )
    for name in ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json"):
        if f"{ENCODER}/{name}" in config["files"]:
            _check_sizes(folder / ENCODER / name, _read_json(folder / ENCODER / name))
    return config


def _check_sizes(path: Path, content: Any, name: str = "") -> None:
    """Refuse numbers that would have the loader make a model, or pictures, larger than any machine's memory."""
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else ((name, value) for value in content):
            _check_sizes(path, value, str(key))
    elif isinstance(content, (int, float)):
        most = next((limit for part, limit in _LARGEST.items() if part in name), _LARGEST[""])
        if not abs(content) <= most:
            raise SavedFileError(f"{path}: {name!r} is {content:.3g}, far beyond what any encoder has; do not use it")


def _strays(folder: Path, listed: Collection[str]) -> Iterator[str]:
    """Files that the loaders of encoder and index would read, though they were not saved as a part of them."""
    for part in (ENCODER, INDEX):
        for place, folders, files in os.walk(folder / part):
            for name in (Path(place, file).relative_to(folder).as_posix() for file in files):
                if not name.rpartition("/")[2].startswith(".") and name not in listed:
                    yield name
            if any(os.path.islink(os.path.join(place, inner)) for inner in folders):
                yield Path(place).relative_to(folder).as_posix()
    for name in listed:
        if name.startswith((f"{ENCODER}/", f"{INDEX}/")) and PurePosixPath(name).suffix.lower() not in _SUFFIXES:
            yield name


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("drum-hf")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
