"""LoRA adapters on a model: several beside one another, one of them in use, or merged into the weights.

By peft's own functions, not transformers' integration, which in some versions asks for a peft that doesn't exist.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SavedFileError
from ..utils.optional import adapting
from ..utils.safe_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, reading_adapter

if TYPE_CHECKING:
    from peft import LoraConfig
    from sentence_transformers.base.modules import Transformer

__all__ = [
    "active_adapter",
    "adapter_names",
    "attach",
    "forget_adapter",
    "inject",
    "lora_config",
    "merge_adapter",
    "save_adapter",
    "use",
]

#: What adapters' weights are called in a file, before the names of the model's own modules.
_PREFIX = "base_model.model."
# The towers' own attention only: the projection in SigLIP's pooling head is read as a bare weight, past any adapter.
_TARGETS = r".*encoder\.layers\..*\.(q_proj|k_proj|v_proj|out_proj)"


def lora_config() -> LoraConfig:
    """Rank 16, alpha 32 on the query, key, value and output projections of both towers' attention; our choice."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=_TARGETS)


def adapter_names(module: Transformer) -> list[str]:
    """Names of the adapters that are loaded, in the order in which they came."""
    return list(getattr(module.model, "peft_config", None) or ())


def active_adapter(module: Transformer) -> str | None:
    """Name of the adapter in use, or None: the base model alone."""
    layers = [layer for _, layer in _layers(module)] if adapter_names(module) else []
    if not layers or layers[0].disable_adapters or not layers[0].active_adapters:
        return None
    return layers[0].active_adapters[0]


def inject(module: Transformer, config: LoraConfig, name: str = "default") -> None:
    """Put a fresh adapter on a model and to use, in float32 whatever the model's dtype; the rest is frozen.

    In half precision the adapter's small steps would be rounded away.
    """
    from peft import inject_adapter_in_model

    with adapting():
        inject_adapter_in_model(config, module.model, name)
    module.model._hf_peft_config_loaded = True  # transformers and its trainer look there
    use(module, name)
    for parameter in module.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def attach(module: Transformer, folder: str | os.PathLike[str], name: str) -> None:
    """Load an adapter from a folder onto a model, and put it to use; it can be trained further.

    Raises:
        SavedFileError: the folder holds no adapter, lacks some of its weights, or has others.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    with reading_adapter(folder):
        config: Any = LoraConfig.from_pretrained(os.fspath(folder))
        config.inference_mode = False
        inject(module, config, name)
        weights = load_file(Path(folder) / ADAPTER_WEIGHTS)
        found: Any = set_peft_model_state_dict(
            module.model, {key.removeprefix(_PREFIX): value for key, value in weights.items()}, adapter_name=name
        )
    amiss = [key for key in found.missing_keys if f".{name}." in key] or list(found.unexpected_keys)
    if amiss:
        raise SavedFileError(
            f"{folder}: expected the weights of the adapter that {ADAPTER_CONFIG} describes; {min(amiss)!r} is "
            "missing from them, or too much; save the retriever again"
        )


def save_adapter(module: Transformer, folder: Path, *, base_model: str, base_revision: str | None) -> None:
    """Write the adapter in use; its configuration names the base model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = active_adapter(module)
    assert name is not None
    weights = get_peft_model_state_dict(module.model, adapter_name=name, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {_PREFIX + key: value.detach().cpu().contiguous() for key, value in weights.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config: Any = copy.copy(module.model.peft_config[name])
    config.base_model_name_or_path, config.revision = base_model, base_revision
    config.save_pretrained(os.fspath(folder))


def use(module: Transformer, name: str | None) -> None:
    """Put one adapter to use, or, with None, the base model alone.

    Raises:
        ValueError: no adapter of that name is loaded.
    """
    if name is None:
        for _, layer in _layers(module):
            layer.enable_adapters(False)
        return
    names = adapter_names(module)
    if name not in names:
        raise ValueError(
            f"expected one of the adapters {', '.join(names) or '(none is loaded)'}, got {name!r}; load it first, "
            "with load_adapter"
        )
    for _, layer in _layers(module):
        layer.enable_adapters(True)
        layer.set_adapter(name)


def forget_adapter(module: Transformer, name: str) -> None:
    """Take out an adapter, also one that was put on only some of the layers."""
    others = [key for key in adapter_names(module) if key != name]
    for place, layer in list(_layers(module)):
        with adapting():
            layer.delete_adapter(name)
        if not others:
            _put_back(module, place, layer, None)
    getattr(module.model, "peft_config", {}).pop(name, None)
    if not others:
        _without_any(module)


def merge_adapter(module: Transformer) -> None:
    """Put the adapter in use into the weights and forget all adapters; without one in use, only forget them."""
    active = active_adapter(module)
    for place, layer in list(_layers(module)):
        if active is not None and hasattr(layer, "merge"):
            layer.merge(safe_merge=True, adapter_names=[active])
        _put_back(module, place, layer, active)
    _without_any(module)


def _put_back(module: Transformer, place: str, layer: Any, active: str | None) -> None:
    """The module that an adapter's layer stands for; of one that is trained whole, the adapter's copy."""
    if hasattr(layer, "get_base_layer"):
        plain = layer.get_base_layer()
    else:
        copies = layer.modules_to_save  # by adapter; a ModuleDict, which has no `get`
        plain = copies[active] if active is not None and active in copies else layer.original_module
    above, _, own = place.rpartition(".")
    setattr(module.model.get_submodule(above), own, plain)


def _without_any(module: Transformer) -> None:
    module.model._hf_peft_config_loaded = False
    if hasattr(module.model, "peft_config"):
        del module.model.peft_config


def _layers(module: Transformer) -> list[tuple[str, Any]]:
    """The layers of adapters, and the modules that LoraConfig's `modules_to_save` names, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [(name, layer) for name, layer in module.model.named_modules() if isinstance(layer, kinds)]
