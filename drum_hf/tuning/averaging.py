"""Between a tuned LVLM and one that was not: the weights of two, averaged."""

from __future__ import annotations

import copy
import itertools

import torch

from ..lvlm.local.model import TransformersLVLM

__all__ = ["average_weights"]


def average_weights(base: TransformersLVLM, tuned: TransformersLVLM, *, share: float) -> TransformersLVLM:
    """The LVLM whose weights lie between those of two of one architecture, such as an LVLM before and after tuning.

    A share below 1 gives back some of what tuning cost on other questions, for some of what it gained. Both are left
    as they are; processor, prompts and batch size are the tuned one's.

    Args:
        base, tuned: as loaded, an adapter merged; `ICLTuner.lvlm()` gives a tuner's own.
        share: of `tuned`'s weights, between 0 and 1; the rest is `base`'s.

    Returns:
        An LVLM; `lvlm.model.save_pretrained(folder)` and `lvlm.processor.save_pretrained(folder)` write it.

    Raises:
        ValueError: another share, or two that don't have the same weights by name and shape.

    Source: WiSE-FT (Wortsman et al., arXiv 2109.01903), there for CLIP.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"expected a share between 0 and 1, got {share}")
    model = copy.deepcopy(tuned.model)
    others, weights = base.model.state_dict(), model.state_dict()
    differing = sorted(
        name
        for name in others.keys() | weights.keys()
        if name not in others or name not in weights or others[name].shape != weights[name].shape
    )
    if differing:
        raise ValueError(
            f"expected two LVLMs of one architecture, and {base.name} and {tuned.name} differ in {len(differing)} "
            f"weights, the first {differing[0]!r}; give the LVLM that was tuned, and the tuned one"
        )
    with torch.no_grad():
        # parameters and buffers rather than the state: there a tied weight stands under each of its names
        for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name in others and weight.is_floating_point():
                other = others[name].to(weight.device, torch.float32)
                weight.copy_(torch.lerp(other, weight.float(), share))
    return TransformersLVLM(
        model,
        tuned.processor,
        name=f"{share:g} of {tuned.name} and {1 - share:g} of {base.name}",
        batch_size=tuned.batch_size,
        image_position=tuned.format.image_position,
        system=tuned.format.system,
        score_end_of_turn=tuned.format.score_end_of_turn,
        chat_template_kwargs=tuned.format.template_kwargs,
        image_budget="published",  # the processor has its budget already
    )
