"""LoRA adapters on an encoder: several beside one another, one of them in use, or merged into the weights."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._compat import adapting, resolve_name
from .errors import SavedFileError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .encoder import JointEncoder

__all__ = [
    "ADAPTER_CONFIG",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "attach",
    "merge_adapter",
    "plain_copy",
    "use",
]

ADAPTER_CONFIG = "adapter_config.json"
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
    noted = json.loads(path.read_text(encoding="utf-8"))
    theirs = str(noted.get("base_model_name_or_path")), noted.get("revision")
    ours = module.base_model, module.base_revision
    if not _same_base(theirs, ours):
        raise SavedFileError(
            f"{folder}: the adapter is for {_told(*theirs)}, the encoder is {_told(*ours)}: load the adapter's own "
            "retriever with DemoRetriever.from_pretrained"
        )
    if name in adapter_names(module):
        raise ValueError(f"expected a new name for the adapter, {name!r} is taken; pass another name=")
    attach(module.model, os.fspath(folder), name)
    for config in module.model.peft_config.values():  # peft looks there when it saves
        config.base_model_name_or_path = resolve_name(module.base_model)
    module.eval()
    saved = module.load_config(os.fspath(folder)).get("log_weights")
    return None if saved is None else [-math.inf if value is None else value for value in saved]


def attach(model: Any, folder: str, name: str) -> None:
    """Load an adapter from a folder onto a transformers model.

    Raises:
        SavedFileError: the folder lacks some of the adapter's weights, or has others.
    """
    if not hasattr(model, _RENAMING_ASIDE):
        setattr(model, _RENAMING_ASIDE, getattr(model, _RENAMING, None))
    reporting = logging.getLogger("transformers.integrations.peft")
    reporting.addFilter(_is_no_report)
    try:
        with adapting():
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
            f"expected one of the adapters {', '.join(names) or '(none is loaded)'}, came {name!r}; load it first, "
            "with load_adapter"
        )
    module.model.enable_adapters()
    module.model.set_adapter(name)


def merge_adapter(module: JointEncoder) -> None:
    """Put the adapter in use into the weights and forget all adapters; without one in use, only forget them."""
    if not _has_any(module):
        return
    active = active_adapter(module)
    for name, layer in list(_layers(module)):
        if active is not None:
            layer.merge(safe_merge=True, adapter_names=[active])
        above, _, own = name.rpartition(".")
        setattr(module.model.get_submodule(above), own, layer.get_base_layer())
    model = module.model
    if hasattr(model, _RENAMING_ASIDE):
        setattr(model, _RENAMING, getattr(model, _RENAMING_ASIDE))
        delattr(model, _RENAMING_ASIDE)
    model._hf_peft_config_loaded = False
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
