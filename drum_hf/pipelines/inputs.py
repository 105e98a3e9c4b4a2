"""What a pipeline is given: one input or many, in any of the shapes that users have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import GeneratorType
from typing import Any

import torch

from ..errors import ColumnError
from ..retriever.queries import as_rows, is_single

__all__ = ["as_inputs", "pairs"]


def pairs(image: Any, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """An input for each prompt, on its own image or on the one image of all."""
    images = image if isinstance(image, (list, tuple)) else [image] * len(prompts)
    if len(images) != len(prompts):
        raise ValueError(f"expected a prompt for each image, got {len(images)} images and {len(prompts)} prompts")
    return [{"image": im, "prompt": prompt} for im, prompt in zip(images, prompts, strict=True)]


class _Rows(torch.utils.data.Dataset):
    """A `datasets.Dataset` as what Pipeline takes for one."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def as_inputs(inputs: Any) -> Any:
    """Inputs as Pipeline knows them: one, a list, a torch Dataset, or a generator.

    Raises:
        ColumnError: it is neither an input nor several.
    """
    import datasets

    inputs = as_rows(inputs)
    if isinstance(inputs, (list, GeneratorType, torch.utils.data.Dataset)) or is_single(inputs):
        return inputs
    if isinstance(inputs, tuple):
        return list(inputs)
    if isinstance(inputs, datasets.Dataset):
        return _Rows(inputs)
    if isinstance(inputs, Iterable):
        return (item for item in inputs)
    raise ColumnError(
        f"expected an image, a dict with 'image' and 'prompt', a Query, or several, got {type(inputs).__name__}"
    )
