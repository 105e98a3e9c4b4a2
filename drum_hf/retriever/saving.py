"""The files of a saved retriever: written, found, and checked before anything else reads them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data import TripletTable
from ..encoders.adapters import active_adapter, adapter_names, use
from ..encoders.loading import add_adapter, load_encoder, plain_copy
from ..errors import CardError, DimensionMismatchError, SavedFileError
from ..index.registry import check_index, loader, ships
from ..types import VectorIndex
from ..utils import hub as _hub
from ..utils.files import checksum, leads_outside, read_folder, read_json
from ..utils.manifest import package_version, write_manifest
from ..utils.optional import is_folder, public_name, resolve_name
from ..utils.safe_models import ADAPTER_CONFIG, check_sizes, read_object
from .card import check_card, render_card

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = [
    "CONFIG",
    "Adapter",
    "Images",
    "RETRIEVER_FILES",
    "SavedForm",
    "SavedRetriever",
    "load",
    "load_adapter",
    "locate",
    "patterns",
    "read_config",
    "write",
]

logger = logging.getLogger("drum_hf.retriever.retriever")

SavedForm = Literal["adapter", "full"]
Images = Literal["embedded", "reference"]

_FORMAT_VERSION = 2
CONFIG, CARD, SUPPORT, ENCODER, INDEX = "drum_config.json", "README.md", "support.parquet", "encoder", "index"
SUPPORT_ENCODER, PLOT, MANIFEST = "support_encoder", "plot.png", "manifest.json"
#: By these sentence-transformers finds the encoder in the folder, which it takes for a model of one module.
_MODULES, _ST_CONFIG = "modules.json", "config_sentence_transformers.json"
_FOLDERS = (ENCODER, SUPPORT_ENCODER, INDEX)
#: What a folder consists of, the configuration and the card aside.
SAVED_PARTS = (*_FOLDERS, SUPPORT, PLOT)
#: All that a save may write, at the top of the folder.
RETRIEVER_FILES = (*SAVED_PARTS, CONFIG, CARD, MANIFEST, _MODULES, _ST_CONFIG)
#: Files that a retriever may list: at the top, as its index (of a kind that ships), and in a folder at all. Which
#: files an encoder consists of, its loader knows.
_AT_TOP = frozenset({SUPPORT, PLOT, _MODULES, _ST_CONFIG})
_OF_INDEX = re.compile(r"shards\.json|(shard-\d{5}/)?(index\.json|vectors\.safetensors)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
#: What an encoder's files may be. None of it is a pickle.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")
_TEACHER = ("name", "revision", "fingerprint", "task")
#: Entry of the configuration -> its type. There are no others.
_ENTRIES: dict[str, Any] = {
    "format_version": int,
    "drum_hf_version": str,
    "strategy": str,
    "weights": dict,
    "base_model": str,
    "base_revision": (str, type(None)),
    "adapter": bool,
    "support_encoder": bool,
    "index": {"kind": (str, type(None)), "options": dict, "included": bool},
    "support": {"rows": int, "fingerprint": str, "included": bool, "images": str},
    "teacher": (dict, type(None)),
    "top_k": int,
    "card": dict,
    "files": dict,
}
#: Bytes of a plot, and characters of a name; our choice.
_MOST_PLOT, _LONGEST = 32 << 20, 1_000
_REMEDY = "download or copy the folder again, or save the retriever again"


@dataclasses.dataclass
class SavedRetriever:
    """What is written of a retriever, and read of one.

    Attributes:
        index: the support set's vectors; None: they are not saved, or have to be embedded anew.
        strategy, weights: what the encoder compares, for those who read the files.
        others: as in `DemoRetriever`.
    """

    encoder: SentenceTransformer
    support_encoder: SentenceTransformer | None
    support: TripletTable
    index: VectorIndex | None
    index_kind: str | None
    index_options: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    strategy: str
    weights: Mapping[str, float]
    teacher: dict[str, Any] | None
    top_k: int
    card_data: dict[str, Any]
    plot: bytes | None


@dataclasses.dataclass
class Adapter:
    """What belongs to an adapter beside its weights: of the parts compared, and what the card says of it."""

    log_weights: Sequence[float]
    teacher: dict[str, Any] | None = None
    card_data: dict[str, Any] = dataclasses.field(default_factory=dict)
    plot: bytes | None = None


# Writing


def write(
    saved: SavedRetriever,
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
        published: others will read it, who have none of this machine's folders: models that are in one are called by
            its last name, and an adapter on such a base model is merged into it unless `form` says otherwise.
    """
    encoder, base_model = saved.encoder, saved.base_model or ""
    adapters, has_adapter = adapter_names(encoder[0]), active_adapter(encoder[0]) is not None  # type: ignore[arg-type]
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
    check_card(saved.card_data)
    if not _is_teacher(saved.teacher):
        raise CardError(f"expected a teacher with {', '.join(_TEACHER)}, each a text or None, got {saved.teacher!r}")
    if published and form is None and has_adapter and is_folder(base_model):
        form = "full"
        logger.info("the base model is a folder of this machine, so the whole encoder goes: see form=")
    if adapters and (form == "full" or not has_adapter):
        encoder, has_adapter = plain_copy(encoder), False
    encoder.save(os.fspath(folder / ENCODER), create_model_card=False)
    if saved.support_encoder is not None:
        side = plain_copy(saved.support_encoder) if form == "full" else saved.support_encoder
        side.save(os.fspath(folder / SUPPORT_ENCODER), create_model_card=False)
    teacher = dict(saved.teacher or {})
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
    save_index = getattr(saved.index, "save", None) if loader(saved.index_kind) is not None else None
    include_index = include_index and save_index is not None
    if include_index and save_index is not None:
        save_index(folder / INDEX)
    if include_support:
        saved.support.save(folder / SUPPORT, images=images, image_root=image_root)
    if saved.plot is not None:
        (folder / PLOT).write_bytes(saved.plot)
    config = {
        "format_version": _FORMAT_VERSION,
        "drum_hf_version": package_version("drum-hf"),
        "strategy": saved.strategy,
        "weights": dict(saved.weights),
        "base_model": base_model,
        "base_revision": saved.base_revision,
        "adapter": has_adapter,
        "support_encoder": saved.support_encoder is not None,
        "index": {
            "kind": saved.index_kind,
            # those of a class of the user's may be addresses, or anything
            "options": saved.index_options if ships(saved.index_kind) else {},
            "included": include_index,
        },
        "support": {
            "rows": len(saved.support),
            "fingerprint": saved.support.fingerprint,
            "included": include_support,
            "images": images,
        },
        "teacher": teacher or None,
        "top_k": saved.top_k,
        "card": saved.card_data,
        "files": {
            path.relative_to(folder).as_posix(): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / CARD).write_text(_card(saved, config, repo_id), encoding="utf-8")
    write_manifest(
        folder,
        seed=(saved.card_data.get("training") or {}).get("seed"),
        data={"support": saved.support.fingerprint},
        lvlm=saved.teacher,
    )


def _card(saved: SavedRetriever, config: Mapping[str, Any], repo_id: str | None) -> str:
    teacher, base_model = dict(saved.teacher or {}), saved.base_model or ""
    if teacher.get("name"):
        teacher["name"] = _shown(teacher["name"], is_local=is_folder(teacher["name"]))
    # Without an owner it is what was published of somebody's folder.
    base_is_local = is_folder(base_model) or "/" not in base_model
    about = {
        "repo_id": repo_id,
        "base_model": _shown(base_model, is_local=base_is_local),
        "base_is_local": base_is_local,
        "base_revision": saved.base_revision,
        "strategy": saved.strategy,
        "weights": saved.weights,
        "adapter": config["adapter"],
        "dimension": saved.encoder.get_embedding_dimension(),
        "index": saved.index_kind if config["index"]["included"] else None,
        "support": config["support"],
        "teacher": teacher,
        "plot": PLOT if saved.plot is not None else None,
        "version": config["drum_hf_version"],
    }
    return render_card(saved.card_data, about)


def _shown(model: str, *, is_local: bool) -> str:
    """A model's name on the card: a Hub id as it is; folders are nobody else's business."""
    if is_local:
        return f"a local model ({public_name(model)})"
    return model if resolve_name(model) == model else f"{model}, which ships with drum-hf"


# Finding


def patterns(parts: Iterable[str] = SAVED_PARTS) -> list[str]:
    """What of a repository belongs to these of the `SAVED_PARTS`."""
    return [CONFIG, *(f"{part}/*" if part in _FOLDERS else part for part in parts)]


def locate(name_or_path: str | os.PathLike[str], *, parts: Iterable[str] = SAVED_PARTS, **hub: Any) -> Path:
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


# Reading


def read_config(folder: Path) -> dict[str, Any]:
    """What `CONFIG` holds, all of one save, once every file has been found to be what was saved.

    Raises:
        SavedFileError: a file is missing, altered, or none that a retriever has.
    """
    return read_folder(folder, CONFIG, _read_config)


def load(
    folder: Path,
    *,
    support: TripletTable | None = None,
    index: VectorIndex | None = None,
    image_root: str | os.PathLike[str] | None = None,
    mmap: bool = False,
    base_model: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SavedRetriever:
    """Read a retriever, all of one save; see `DemoRetriever.from_pretrained`.

    Args:
        options: of `load_encoder`.
    """

    def read(place: Path) -> SavedRetriever:
        return _read(place, support, index, image_root, mmap, {"base_model": base_model, **options})

    return read_folder(folder, CONFIG, read)


def _read(
    folder: Path,
    support: TripletTable | None,
    index: VectorIndex | None,
    image_root: str | os.PathLike[str] | None,
    mmap: bool,
    options: Mapping[str, Any],
) -> SavedRetriever:
    config = _read_config(folder)
    about = config["index"]
    table = _read_support(folder, config, image_root, mmap=mmap) if support is None else support
    found = None if index is not None else _read_index(folder, about, mmap=mmap)
    encoder = _read_encoder(folder, ENCODER, config, options)
    support_encoder = _read_encoder(folder, SUPPORT_ENCODER, config, options) if config["support_encoder"] else None
    width = encoder.get_embedding_dimension()
    if found is not None and found.dimension != width:
        raise DimensionMismatchError(
            f"{folder}: the index holds vectors of {found.dimension} dimensions, the encoder gives {width}: they "
            "are not of one retriever; save it again"
        )
    if table.fingerprint != config["support"]["fingerprint"]:
        if support is None:
            raise SavedFileError(f"{folder / SUPPORT}: it is not the table that {CONFIG} names; save it again")
        logger.info("the support set given is not the one saved: it is embedded when first needed")
        found = None
    elif found is not None and found.ids != table.ids:
        raise SavedFileError(
            f"{folder / INDEX}: its {len(found)} ids are not those of the {len(table)} demonstrations; "
            "save the retriever again"
        )
    moved = bool(options["base_model"] and config["adapter"])  # the encoder then knows what it was loaded from
    return SavedRetriever(
        encoder=encoder,
        support_encoder=support_encoder,
        support=table,
        index=found if index is None else index,
        index_kind=about["kind"],
        index_options=about["options"],
        base_model=None if moved else config["base_model"],
        base_revision=None if moved else config["base_revision"],
        strategy=config["strategy"],
        weights=config["weights"],
        teacher=config["teacher"],
        top_k=config["top_k"],
        card_data=config["card"],
        plot=_read_plot(folder, config),
    )


def load_adapter(folder: Path, base: Any, name: str) -> Adapter:
    """Put the adapter of a saved retriever onto an encoder, beside those that are there.

    Args:
        base: the encoder's `JointEncoder`.

    Returns:
        What belongs to the adapter.
    """

    def read(place: Path) -> tuple[Path, dict[str, Any], bytes | None]:
        config = _read_config(place, parts=(ENCODER, PLOT))
        return place, config, _read_plot(place, config)

    place, config, plot = read_folder(folder, CONFIG, read)
    if config["support_encoder"]:
        raise SavedFileError(
            f"{folder}: expected an adapter for queries and demonstrations, got one that was trained on the "
            "queries' side alone; load that retriever with DemoRetriever.from_pretrained"
        )
    used = active_adapter(base)
    weights = add_adapter(base, place / ENCODER, name)
    use(base, used)  # loading may have put it to use
    return Adapter(weights or base.log_weight_list, config["teacher"], config["card"], plot)


def _read_support(
    folder: Path, config: Mapping[str, Any], image_root: str | os.PathLike[str] | None, *, mmap: bool
) -> TripletTable:
    about = config["support"]
    if not about["included"]:
        raise SavedFileError(
            f"{folder}: the retriever was saved without its {about['rows']} demonstrations; pass them with support="
        )
    return TripletTable.load(folder / SUPPORT, image_root=image_root, mmap=mmap)


def _read_index(folder: Path, about: Mapping[str, Any], *, mmap: bool) -> VectorIndex | None:
    read = loader(about["kind"])
    if about["kind"] is None or (about["included"] and read is None):
        name = "of a class of its own" if about["kind"] is None else f"of kind {about['kind']!r}"
        raise SavedFileError(
            f"{folder}: the retriever was saved with an index {name}; pass index=, or register the kind with "
            "drum_hf.index.register_index"
        )
    try:
        check_index(about["kind"], about["options"])
    except (TypeError, ValueError) as error:
        raise SavedFileError(
            f"{folder / CONFIG}: its 'index' is none that can be made ({error}); save the retriever again"
        ) from error
    return read(folder / INDEX, mmap=mmap) if about["included"] and read is not None else None


def _read_encoder(folder: Path, part: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    try:
        return load_encoder(folder / part, **options)
    except BaseException as error:
        # A file that is no model makes transformers raise nearly anything, and its tokenizers panic.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        needs, remedy = "", ""
        if config["adapter"]:
            needs = f", which needs its base model {os.fspath(options['base_model'] or config['base_model'])!r}"
            remedy = "pass base_model= with where the base model is on this machine, or "
        raise SavedFileError(
            f"{folder / part}: the encoder can't be loaded{needs} ({error}); {remedy}save the retriever again"
        ) from error


def _read_plot(folder: Path, config: Mapping[str, Any]) -> bytes | None:
    """The plot of the card, where there is one."""
    if PLOT not in config["files"]:
        return None
    with (folder / PLOT).open("rb") as file:
        data = file.read(_MOST_PLOT + 1)
    if len(data) > _MOST_PLOT or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise SavedFileError(f"{folder / PLOT}: expected a PNG of at most {_MOST_PLOT:,} bytes; {_REMEDY}")
    return data


# Checks


def _read_config(folder: Path, *, parts: Collection[str] = SAVED_PARTS) -> dict[str, Any]:
    """The configuration, once every file has been found to be one that a retriever has, and what was saved.

    Args:
        parts: whose files are looked at.
    """
    path = folder / CONFIG
    if leads_outside(path, folder):
        raise SavedFileError(f"{path}: a link that leads out of the folder; do not use this folder")
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise SavedFileError(f"{path}: the file is missing: not a folder that save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise SavedFileError(f"{path}: the file can't be read as JSON ({error}); save the retriever again") from error
    _check_config(path, config)
    _check_files(folder, config, parts)
    return config


def _check_config(path: Path, config: Any) -> None:
    """Refuse a configuration that `write` can't have written."""
    if not isinstance(config, dict):
        raise SavedFileError(f"{path}: expected a JSON object, got {type(config).__name__}; save the retriever again")
    version = config.get("format_version")
    if type(version) is not int or version != _FORMAT_VERSION:
        newer = type(version) is int and version > _FORMAT_VERSION
        remedy = "update drum-hf: pip install --upgrade drum-hf" if newer else "save the retriever again"
        raise SavedFileError(f"{path}: expected format version {_FORMAT_VERSION}, got {version!r:.80}; {remedy}")
    wrong = [f"the entry {name!r} {fault}" for name, fault in _faults(config, _ENTRIES)]
    if not wrong:
        weights, support = config["weights"], config["support"]
        checks = {
            "weights": all(_is_share(value) for value in weights.values()),
            "support": 1 <= support["rows"] < 1 << 63 and support["images"] in ("embedded", "reference"),
            "teacher": _is_teacher(config["teacher"]),
            "top_k": 1 <= config["top_k"] < 1 << 31,
            "files": all(isinstance(value, str) for value in config["files"].values()),
            "base_model": _is_name(config["base_model"]),
            "base_revision": _is_name(config["base_revision"] or ""),
            "strategy": _is_name(config["strategy"]),
        }
        wrong = [f"the entry {name!r} is missing or of another type" for name, right in checks.items() if not right]
    if wrong:
        raise SavedFileError(f"{path}: {wrong[0]}; save the retriever again")
    try:
        check_card(config["card"])
    except CardError as error:
        raise SavedFileError(f"{path}: {error}; or save the retriever again") from error


def _faults(config: Mapping[str, Any], entries: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name in config.keys() - entries.keys():
        yield f"{above}{name[:80]}", "is unknown"
    for name, kind in entries.items():
        value = config.get(name)
        if isinstance(kind, dict):
            if isinstance(value, dict):
                yield from _faults(value, kind, f"{name}.")
                continue
            kind = dict
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if name not in config or wrong:
            yield f"{above}{name}", "is missing or of another type"


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_name(value: Any) -> bool:
    """Whether it is a short text that can be printed."""
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()


def _is_teacher(teacher: Any) -> bool:
    return teacher is None or (
        isinstance(teacher, Mapping)
        and teacher.keys() <= set(_TEACHER)
        and all(value is None or _is_name(value) for value in teacher.values())
    )


def _check_files(folder: Path, config: Mapping[str, Any], parts: Collection[str]) -> None:
    path, listed = folder / CONFIG, config["files"]
    needed = {f"{ENCODER}/sentence_bert_config.json"}
    needed |= {SUPPORT} if config["support"]["included"] else set()
    needed |= {f"{SUPPORT_ENCODER}/sentence_bert_config.json"} if config["support_encoder"] else set()
    if config["index"]["included"] and ships(config["index"]["kind"]):
        in_shards = "shard_rows" in config["index"]["options"]
        of_index = {"shards.json"} if in_shards else {"vectors.safetensors", "index.json"}
        needed |= {f"{INDEX}/{name}" for name in of_index}
    for name in sorted(needed | listed.keys()):
        if not _is_listable(name, config):
            raise SavedFileError(
                f"{path}: it lists {name[:200]!r}, which is not inside the folder, or no file that a retriever is "
                "made of; do not use this folder"
            )
        if name.partition("/")[0] not in parts:
            continue
        file = folder / name
        if leads_outside(file, folder):
            raise SavedFileError(f"{file}: a link that leads out of the folder; do not use this folder, or {_REMEDY}")
        if not file.is_file():
            raise SavedFileError(f"{file}: the file is missing; {_REMEDY}")
        if listed.get(name) != checksum(file):
            raise SavedFileError(f"{file}: the file was altered since it was saved (its SHA-256 differs); {_REMEDY}")
    stray = sorted(_strays(folder, listed.keys(), parts))
    if stray:
        raise SavedFileError(
            f"{folder / stray[0]}: this file is none of those that {CONFIG} lists; remove it, or download the folder "
            "again"
        )
    for name in ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json"):
        for part in (ENCODER, SUPPORT_ENCODER):
            if part in parts and f"{part}/{name}" in listed:
                check_sizes(folder / part / name, read_object(folder / part / name))


def _is_listable(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a retriever may have such a file."""
    part, _, inner = name.partition("/")
    if not _PLAIN_NAME.fullmatch(name):
        return False
    if not inner:
        return name in _AT_TOP
    if part == INDEX:
        return not ships(config["index"]["kind"]) or _OF_INDEX.fullmatch(inner) is not None
    return part in _FOLDERS and inner.endswith(_SUFFIXES)


def _strays(folder: Path, listed: Collection[str], parts: Collection[str]) -> Iterator[str]:
    """Files that the loaders of encoder and index would read, though they were not saved as a part of them."""
    for part in (part for part in _FOLDERS if part in parts):
        for place, folders, files in os.walk(folder / part):
            for name in (Path(place, file).relative_to(folder).as_posix() for file in files):
                if not name.rpartition("/")[2].startswith(".") and name not in listed:
                    yield name
            if any(os.path.islink(os.path.join(place, inner)) for inner in folders):
                yield Path(place).relative_to(folder).as_posix()
