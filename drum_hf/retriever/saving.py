"""The files of a saved retriever: written, found, brought up to date, and checked when they are read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from ..encoders.loading import plain_copy
from ..errors import SavedFileError
from ..utils import hub as _hub
from ..utils.files import checksum, leads_outside, refuse_special
from ..utils.manifest import package_version, write_manifest
from ..utils.model_card import render_card
from ..utils.optional import is_folder, public_name, resolve_name
from ..utils.safe_models import ADAPTER_CONFIG, check_sizes

if TYPE_CHECKING:
    from .retriever import DemoRetriever

__all__ = [
    "CARD",
    "CONFIG",
    "ENCODER",
    "PARTS",
    "SavedForm",
    "INDEX",
    "Images",
    "PLOT",
    "SUPPORT",
    "SUPPORT_ENCODER",
    "locate",
    "move_into_place",
    "patterns",
    "plot",
    "read_config",
    "write",
]

logger = logging.getLogger("drum_hf.retriever.retriever")

SavedForm = Literal["adapter", "full"]
Images = Literal["embedded", "reference"]

#: 1 always held the index, and a support set with its images in it.
_FORMAT_VERSION = 2
#: What an encoder and an index are saved as. None of it is a pickle, and torch would read one where it found one.
_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
CONFIG, CARD, SUPPORT, ENCODER, INDEX = "drum_config.json", "README.md", "support.parquet", "encoder", "index"
SUPPORT_ENCODER, PLOT = "support_encoder", "plot.png"
#: What a folder consists of, the configuration and the card aside.
_FOLDERS = (ENCODER, SUPPORT_ENCODER, INDEX)
PARTS = (*_FOLDERS, SUPPORT, PLOT)
#: By these sentence-transformers finds the encoder in the folder, which it takes for a model of one module.
_MODULES, _ST_CONFIG = "modules.json", "config_sentence_transformers.json"


def _from_1(config: dict[str, Any]) -> dict[str, Any]:
    more = {"index": {"included": True}, "support": {"images": "embedded"}}
    return config | {key: config[key] | new for key, new in more.items() if isinstance(config.get(key), dict)}


#: Format version -> what makes a configuration of it into one of the next version.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def write(
    retriever: DemoRetriever,
    folder: Path,
    *,
    form: SavedForm | None = None,
    include_support: bool = True,
    include_index: bool = True,
    images: Images = "embedded",
    image_root: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    published: bool = False,
) -> None:
    """Write every file of a retriever into an empty folder; see `DemoRetriever.save_pretrained`.

    Args:
        published: others will read it, who have none of this machine's folders: models that lie in one are called by
            its last name, and an adapter on such a base model is merged into it unless `form` says otherwise.
    """
    encoder = retriever.encoder
    has_adapter = retriever.active_adapter is not None
    if form not in (None, "adapter", "full") or images not in ("embedded", "reference"):
        raise ValueError(
            f"expected form 'adapter', 'full' or None and images 'embedded' or 'reference', got {form!r} and "
            f"{images!r}"
        )
    if form == "adapter" and not has_adapter:
        raise ValueError(
            "expected an adapter in use to save as form='adapter', there is none: train one with lora=True, choose "
            "one with set_adapter, or save the whole encoder with form='full'"
        )
    if published and form is None and has_adapter and is_folder(retriever.base_model):
        form = "full"
        logger.info("the base model is a folder of this machine, so the whole encoder goes: see form=")
    if retriever.adapters and (form == "full" or not has_adapter):
        encoder, has_adapter = plain_copy(encoder), False
    encoder.save(os.fspath(folder / ENCODER), create_model_card=False)
    if retriever.support_encoder is not None:
        side = plain_copy(retriever.support_encoder) if form == "full" else retriever.support_encoder
        side.save(os.fspath(folder / SUPPORT_ENCODER), create_model_card=False)
    base_model, teacher = retriever.base_model, dict(retriever.teacher or {})
    if published:
        base_model = public_name(base_model)
        if teacher.get("name"):
            teacher["name"] = public_name(teacher["name"])
        for adapter in folder.glob(f"*/{ADAPTER_CONFIG}"):
            noted = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
            adapter.write_text(json.dumps(noted, indent=2, sort_keys=True), encoding="utf-8")
    modules = [{"idx": 0, "name": "0", "path": ENCODER, "type": "drum_hf.encoders.joint.JointEncoder"}]
    (folder / _MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")
    (folder / _ST_CONFIG).write_bytes((folder / ENCODER / _ST_CONFIG).read_bytes())
    if include_index:
        retriever.index.save(folder / INDEX)
    if include_support:
        retriever.support.save(folder / SUPPORT, images=images, image_root=image_root)
    if retriever.plot is not None:
        (folder / PLOT).write_bytes(retriever.plot)
    config = {
        "format_version": _FORMAT_VERSION,
        "drum_hf_version": package_version("drum-hf"),
        "strategy": retriever.strategy,
        "weights": retriever.weights,
        "base_model": base_model,
        "base_revision": retriever.base_revision,
        "adapter": has_adapter,
        "support_encoder": retriever.support_encoder is not None,
        "index": {"kind": retriever.index_kind, "options": retriever.index_options, "included": include_index},
        "support": {
            "rows": len(retriever),
            "fingerprint": retriever.support.fingerprint,
            "included": include_support,
            "images": images,
        },
        "teacher": teacher or None,
        "top_k": retriever.top_k,
        "card": retriever.card_data,
        "files": {
            path.relative_to(folder).as_posix(): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / CARD).write_text(_card(retriever, config, repo_id), encoding="utf-8")
    write_manifest(
        folder,
        seed=retriever.card_data.get("training", {}).get("seed"),
        data={"support": retriever.support.fingerprint},
        lvlm=retriever.teacher,
    )


def _card(retriever: DemoRetriever, config: Mapping[str, Any], repo_id: str | None) -> str:
    teacher = dict(retriever.teacher or {})
    if teacher.get("name"):
        teacher["name"] = _shown(teacher["name"], is_local=is_folder(teacher["name"]))
    # Without an owner it is what was published of somebody's folder.
    base_is_local = is_folder(retriever.base_model) or "/" not in retriever.base_model
    data = {
        "repo_id": repo_id,
        "base_model": _shown(retriever.base_model, is_local=base_is_local),
        "base_is_local": base_is_local,
        "base_revision": retriever.base_revision,
        "strategy": config["strategy"],
        "weights": config["weights"],
        "adapter": config["adapter"],
        "dimension": retriever.encoder.get_embedding_dimension(),
        "index": retriever.index_kind if config["index"]["included"] else None,
        "support": config["support"],
        "teacher": teacher,
        "plot": PLOT if retriever.plot is not None else None,
        "version": config["drum_hf_version"],
    }
    return render_card(data | retriever.card_data)


def _shown(model: str, *, is_local: bool) -> str:
    """A model's name on the card: a Hub id as it is; folders are nobody else's business."""
    if is_local:
        return f"a local model ({public_name(model)})"
    return model if resolve_name(model) == model else f"{model}, which ships with drum-hf"


def plot(folder: Path) -> bytes | None:
    """The plot of the card, where there is one."""
    path = folder / PLOT
    return path.read_bytes() if path.is_file() else None


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


def patterns(parts: Iterable[str]) -> list[str]:
    """What of a repository belongs to these of the `PARTS`."""
    return [CONFIG, *(f"{part}/*" if part in _FOLDERS else part for part in parts)]


def locate(name_or_path: str | os.PathLike[str], *, parts: Iterable[str] = PARTS, **hub: Any) -> Path:
    """The folder, or a snapshot of the repository.

    Raises:
        HubError: it is no folder, and can't be fetched.
        SavedFileError: the repository is of something else, or the retriever is a folder further down.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        inner = folder / "retriever"
        if not (folder / CONFIG).exists() and (inner / CONFIG).exists():
            raise SavedFileError(f"{folder}: expected a retriever, got the output of drum-hf; give {inner}")
        return folder
    wanted = [*patterns(parts), CARD, _MODULES, _ST_CONFIG]
    folder = _hub.fetch_snapshot(os.fspath(name_or_path), patterns=wanted, **hub)
    if not (folder / CONFIG).exists():
        raise SavedFileError(
            f"expected a retriever, got {os.fspath(name_or_path)!r}, a repository without {CONFIG}; give the id that "
            "push_to_hub or drum-hf push was given"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        refuse_special(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedFileError(f"{path}: the file is missing: not a folder that save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SavedFileError(f"{path}: the file can't be read as JSON ({error}); save the retriever again") from error
    if not isinstance(content, dict):
        raise SavedFileError(f"{path}: expected a JSON object, got {type(content).__name__}; save the retriever again")
    return content


def read_config(folder: Path, *, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """The configuration, as of the present format version, once every file has been found to be what was saved.

    Args:
        parts: whose files are looked at.
    """
    path = folder / CONFIG
    config = _brought_up_to_date(path, _read_json(path))
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
        "support": {"rows": int, "fingerprint": str, "included": bool, "images": str},
        "index": {"kind": str, "options": dict, "included": bool},
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
    needed = {f"{ENCODER}/sentence_bert_config.json"}
    of_index = {"shards.json"} if "shard_rows" in config["index"]["options"] else {"vectors.safetensors", "index.json"}
    needed |= {f"{INDEX}/{name}" for name in of_index} if config["index"]["included"] else set()
    needed |= {SUPPORT} if config["support"]["included"] else set()
    needed |= {f"{SUPPORT_ENCODER}/sentence_bert_config.json"} if config.get("support_encoder") else set()
    parts = tuple(parts)
    for name in sorted(needed | config["files"].keys()):
        if not _is_inside(name):
            raise SavedFileError(f"{path}: it lists {name!r}, which is not inside the folder; do not use this folder")
        if name.partition("/")[0] not in parts:
            continue
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
        for part in (ENCODER, SUPPORT_ENCODER):
            if part in parts and f"{part}/{name}" in config["files"]:
                check_sizes(folder / part / name, _read_json(folder / part / name))
    return config


def _brought_up_to_date(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    version = config.get("format_version")
    if version != _FORMAT_VERSION and version not in _MIGRATIONS:
        newer = isinstance(version, int) and version > _FORMAT_VERSION
        remedy = "update drum-hf: pip install --upgrade drum-hf" if newer else "save the retriever again"
        raise SavedFileError(
            f"{path}: expected a format version of at most {_FORMAT_VERSION}, got {version!r}; {remedy}"
        )
    while version != _FORMAT_VERSION:
        config, version = _MIGRATIONS[version](config), version + 1
    return config | {"format_version": version}


def _strays(folder: Path, listed: Collection[str]) -> Iterator[str]:
    """Files that the loaders of encoder and index would read, though they were not saved as a part of them."""
    for part in _FOLDERS:
        for place, folders, files in os.walk(folder / part):
            for name in (Path(place, file).relative_to(folder).as_posix() for file in files):
                if not name.rpartition("/")[2].startswith(".") and name not in listed:
                    yield name
            if any(os.path.islink(os.path.join(place, inner)) for inner in folders):
                yield Path(place).relative_to(folder).as_posix()
    for name in listed:
        if name.partition("/")[0] in _FOLDERS and PurePosixPath(name).suffix.lower() not in _SUFFIXES:
            yield name
