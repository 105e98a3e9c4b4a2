"""Which parts of an LVLM are trained: its decoder and its projector, whatever the family calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..utils.optional import adapting

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_lora", "freeze_vision", "lora_targets", "part_of"]

Part = Literal["decoder", "projector", "vision", "head"]

#: What families that keep their projector inside the vision tower call it (Qwen-VL).
_INNER_PROJECTORS = {"merger", "deepstack_merger_list"}


def part_of(model: Any) -> dict[str, Part]:
    """Module name -> the part of the LVLM it belongs to, for every module below the parts' roots.

    The decoder and the vision tower are what the model itself says; the projector is the rest, and the modules inside
    the tower that map to the decoder's width.

    Raises:
        ValueError: the model doesn't tell them apart.
    """
    decoder, tower, head = model.get_decoder(), model.get_encoder(modality="image"), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if decoder is None or tower is model or not {id(decoder), id(tower)} <= set(names) or decoder is tower:
        raise ValueError(
            f"expected a model whose decoder and vision tower are known, and {type(model).__name__} tells neither by "
            "get_decoder() nor get_encoder('image'); name what to train with target_modules="
        )
    roots = {names[id(decoder)]: "decoder", names[id(tower)]: "vision"}
    if head is not None:
        roots[names[id(head)]] = "head"
    parts: dict[str, Part] = {}
    for name, module in model.named_modules():
        root = next((root for root in roots if name == root or name.startswith(f"{root}.")), None)
        part: Any = roots[root] if root is not None else "projector"
        if part == "vision" and root is not None and _INNER_PROJECTORS & set(name[len(root) :].split(".")):
            part = "projector"
        holds_a_part = any(root.startswith(f"{name}.") for root in roots) or not name
        if not holds_a_part or any(True for _ in module.parameters(recurse=False)):
            parts[name] = part
    return parts


def lora_targets(model: Any) -> tuple[list[str], list[str]]:
    """Names of the linear layers of decoder and projector, and of the projector's matrices that are in no layer.

    Raises:
        ValueError: see `part_of`.
    """
    from torch import nn

    parts = part_of(model)
    modules, parameters = [], []
    for name, module in model.named_modules():
        part = parts.get(name)
        if part not in ("decoder", "projector"):
            continue
        if isinstance(module, nn.Linear):
            modules.append(name)
        elif part == "projector":
            own = module.named_parameters(recurse=False)
            parameters += [f"{name}.{key}" for key, value in own if value.ndim == 2 and key != "weight"]
    return modules, parameters


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: str | Sequence[str] | None,
    base: str,
    revision: str | None,
) -> Any:
    """The model with fresh adapters, everything else frozen; the adapter's configuration names its base.

    Args:
        target_modules: as peft's; None for the linear layers of decoder and projector.
        base, revision: what the adapter belongs to.
    """
    from peft import LoraConfig, get_peft_model

    parameters: list[str] = []
    if target_modules is None:
        target_modules, parameters = lora_targets(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        # peft can't drop out the input of a bare matrix: without it that one stays as it is.
        target_parameters=parameters if parameters and not dropout else None,
        task_type="CAUSAL_LM",
    )
    with adapting():
        tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.peft_config["default"].revision = revision
    return tuned


def freeze_vision(model: nn.Module) -> None:
    """Train everything but the vision tower.

    Raises:
        ValueError: see `part_of`.
    """
    parts = part_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, module in model.named_modules():
        if parts.get(name) == "vision":
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
