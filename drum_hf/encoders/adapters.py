"""LoRA adapters on an encoder: several beside one another, one of them in use, or merged into the weights."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DrumError, SavedFileError
from ..utils.files import leads_outside, refuse_special
from ..utils.optional import adapting, resolve_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .joint import JointEncoder

__all__ = [
    "ADAPTER_CONFIG",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "attach",
    "merge_adapter",
    "plain_copy",
    "reading_adapter",
    "use",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Settings by which peft would import a module that the file names, or make layers without end.
_NEVER = ("megatron_config", "layer_replication")
#: Settings that peft takes for regular expressions, in their values or keys.
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
)
#: A regular expression that may take longer than anybody waits: repetitions in one another, or many in a row.
_ENDLESS = re.compile(r"\)[*+{]|(?:[*+{][^*+{]*){7}")
#: How transformers renames weights when it saves a model. Loading an adapter puts the adapter's way in its place, by
#: which a merged model would be saved under names that nobody reads; the model's own is kept beside it.
_RENAMING, _RENAMING_ASIDE = "_weight_conversions", "_weight_conversions_without_adapter"


def adapter_names(module: JointEncoder) -> list[str]:
    """Names of the adapters that are loaded, in the order in which they came."""
    return list(getattr(module.model, "peft_config", None) or ()) if _has_any(module) else []


def active_adapter(module: JointEncoder) -> str | None:
    """Name of the adapter in use, or None: the base model alone."""
    if not _has_any(module):
        return None
    layers = list(_layers(module))
    if not layers or layers[0][1].disable_adapters:
        return None
    return layers[0][1].active_adapters[0]


def add_adapter(module: JointEncoder, folder: Path, name: str) -> list[float] | None:
    """Load what `JointEncoder.save` wrote of an encoder with an adapter, beside those that are there.

    Returns:
        Logs of the parts' weights that were saved with it, or None where the folder has none.

    Raises:
        SavedFileError: the folder holds no adapter, or one of another base model.
        ValueError: the name is taken.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise SavedFileError(
            f"{folder}: expected a LoRA adapter, there is no {ADAPTER_CONFIG}: an encoder that was saved whole can't "
            "be swapped in; load it with DemoRetriever.from_pretrained"
        )
    noted = _checked(folder)
    theirs = str(noted.get("base_model_name_or_path")), noted.get("revision")
    ours = module.base_model, module.base_revision
    if not _same_base(theirs, ours):
        raise SavedFileError(
            f"{folder}: the adapter is for {_told(*theirs)}, the encoder is {_told(*ours)}: load the adapter's own "
            "retriever with DemoRetriever.from_pretrained"
        )
    if name in adapter_names(module):
        raise ValueError(f"expected a new name for the adapter, {name!r} is taken; pass another name=")
    weights = _noted_weights(module, folder)
    used = active_adapter(module)
    try:
        attach(module.model, os.fspath(folder), name)
    except BaseException:
        _forget(module, name)
        use(module, used)
        raise
    for config in module.model.peft_config.values():  # peft looks there when it saves
        config.base_model_name_or_path = resolve_name(module.base_model)
    module.eval()
    return weights


def _noted_weights(module: JointEncoder, folder: Path) -> list[float] | None:
    try:
        noted = module.load_config(os.fspath(folder)).get("log_weights")
        weights = None if noted is None else [-math.inf if value is None else float(value) for value in noted]
        if weights is not None and (len(weights) != len(module.log_weight_list) or max(weights) == -math.inf):
            raise ValueError(f"{noted} are no weights of its parts")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SavedFileError(
            f"{folder}: expected what was saved with the adapter ({error}); download or save it again"
        ) from error
    return weights


def attach(model: Any, folder: str, name: str) -> None:
    """Load an adapter from a folder onto a transformers model.

    Raises:
        SavedFileError: the folder holds no adapter, lacks some of its weights, or has others.
    """
    if not hasattr(model, _RENAMING_ASIDE):
        setattr(model, _RENAMING_ASIDE, getattr(model, _RENAMING, None))
    reporting = logging.getLogger("transformers.integrations.peft")
    reporting.addFilter(_is_no_report)
    try:
        with reading_adapter(folder):
            found = model.load_adapter(folder, adapter_name=name, is_trainable=True)
    finally:
        reporting.removeFilter(_is_no_report)
    if found is not None:
        amiss = [key for key in found.missing_keys if f".{name}." in key] or list(found.unexpected_keys)
        if amiss:
            raise SavedFileError(
                f"{folder}: expected the weights of the adapter that {ADAPTER_CONFIG} describes; {min(amiss)!r} is "
                "missing from them, or too much; save the retriever again"
            )


@contextlib.contextmanager
def reading_adapter(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Check an adapter's files before peft reads them, and say what was read where it fails.

    Raises:
        SavedFileError: in place of nearly anything that peft, transformers and torch raise of a file that is none.
    """
    _checked(Path(folder))
    try:
        with adapting():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            yield
    except DrumError:
        raise
    except Exception as error:
        raise SavedFileError(
            f"{os.fspath(folder)}: the adapter can't be put on this model ({error}); expected one that was trained on "
            "it; download or save it again"
        ) from error


def _checked(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter, whose numbers and patterns are such that it can be loaded."""
    from safetensors import SafetensorError, safe_open

    remedy = "do not use it, or download or save it again"
    for path in (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS):
        if leads_outside(path, folder):
            raise SavedFileError(f"{path}: a link that leads out of the folder; {remedy}")
    try:
        refuse_special(folder / ADAPTER_CONFIG)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise SavedFileError(f"{folder / ADAPTER_CONFIG}: expected a JSON object ({error}); {remedy}") from error
    try:
        refuse_special(folder / ADAPTER_WEIGHTS)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            widest = max([0, *(side for key in file.keys() for side in file.get_slice(key).get_shape())])  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SavedFileError(
            f"{folder / ADAPTER_WEIGHTS}: expected the adapter's weights ({error}); {remedy}"
        ) from error
    for name in _NEVER:
        if config.get(name):
            raise SavedFileError(f"{folder / ADAPTER_CONFIG}: {name!r} is not supported; {remedy}")
    for name in _PATTERNS:
        for text in _texts(config.get(name)):
            if _ENDLESS.search(text):
                raise SavedFileError(
                    f"{folder / ADAPTER_CONFIG}: the pattern {text[:80]!r} in {name!r} may match without end; {remedy}"
                )
    ranks = config.get("rank_pattern")
    for rank in [config.get("r"), *(ranks.values() if isinstance(ranks, dict) else ())]:
        if isinstance(rank, (int, float)) and not 0 <= rank <= widest:
            raise SavedFileError(
                f"{folder / ADAPTER_CONFIG}: the rank {rank:.3g} is none of the adapter's weights, which have at most "
                f"{widest}; {remedy}"
            )
    return config


def _texts(value: Any) -> list[str]:
    """A text, or those in a list, or the keys of an object."""
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
    return [text for text in values if isinstance(text, str)]


def _is_no_report(record: logging.LogRecord) -> bool:
    """Not transformers' report on an adapter's weights: it takes those of the adapters beside it for missing."""
    return "LOAD REPORT" not in record.getMessage()


def use(module: JointEncoder, name: str | None) -> None:
    """Put one adapter to use, or, with None, the base model alone.

    Raises:
        ValueError: no adapter of that name is loaded.
    """
    if name is None:
        if _has_any(module):
            module.model.disable_adapters()
        return
    names = adapter_names(module)
    if name not in names:
        raise ValueError(
            f"expected one of the adapters {', '.join(names) or '(none is loaded)'}, got {name!r}; load it first, "
            "with load_adapter"
        )
    module.model.enable_adapters()
    module.model.set_adapter(name)


def _forget(module: JointEncoder, name: str) -> None:
    """Take out an adapter, also one that was put on only some of the layers."""
    others = [key for key in adapter_names(module) if key != name]
    for place, layer in list(_layers(module)):
        with adapting():
            layer.delete_adapter(name)
        if not others:
            _put_back(module, place, layer)
    getattr(module.model, "peft_config", {}).pop(name, None)
    if _has_any(module) and not others:
        _without_any(module)


def merge_adapter(module: JointEncoder) -> None:
    """Put the adapter in use into the weights and forget all adapters; without one in use, only forget them."""
    if not _has_any(module):
        return
    active = active_adapter(module)
    for name, layer in list(_layers(module)):
        if active is not None:
            layer.merge(safe_merge=True, adapter_names=[active])
        _put_back(module, name, layer)
    _without_any(module)


def _put_back(module: JointEncoder, place: str, layer: Any) -> None:
    above, _, own = place.rpartition(".")
    setattr(module.model.get_submodule(above), own, layer.get_base_layer())


def _without_any(module: JointEncoder) -> None:
    model = module.model
    if hasattr(model, _RENAMING_ASIDE):
        setattr(model, _RENAMING, getattr(model, _RENAMING_ASIDE))
        delattr(model, _RENAMING_ASIDE)
    model._hf_peft_config_loaded = False
    if hasattr(model, "peft_config"):
        del model.peft_config


def plain_copy(encoder: SentenceTransformer) -> SentenceTransformer:
    """A copy without adapters: the one in use is in its weights."""
    copied = copy.deepcopy(encoder)
    merge_adapter(copied[0])  # type: ignore[arg-type]
    return copied


def _has_any(module: JointEncoder) -> bool:
    return bool(getattr(module.model, "_hf_peft_config_loaded", False))


def _layers(module: JointEncoder) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.model.named_modules() if isinstance(layer, BaseTunerLayer)]


def _same_base(one: Sequence[str | None], other: Sequence[str | None]) -> bool:
    places = [resolve_name(name or "") for name, _ in (one, other)]
    if all(map(os.path.isdir, places)):
        return os.path.realpath(places[0]) == os.path.realpath(places[1])
    return one[0] == other[0] and (one[1] == other[1] or None in (one[1], other[1]))


def _told(name: str | None, revision: str | None) -> str:
    return f"{name!r} at {revision}" if revision else repr(name)
