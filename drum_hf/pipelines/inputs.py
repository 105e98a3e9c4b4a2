"""What a pipeline is given: one input or many, in any of the shapes that users have them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from transformers.image_utils import load_image

from ..errors import ImageError, RowError
from ..types import Demonstration, Query

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["as_inputs", "pairs", "read_query"]


def read_query(given: Any, default_prompt: Callable[[], str], timeout: float | None) -> Query:
    """An input as a query.

    Args:
        given: a `Query`, a `Demonstration`, a dict, or a picture.
        default_prompt: gives what is asked where the input asks nothing.
        timeout: seconds to wait for an image from the web.

    Raises:
        RowError: the input can't be used.
        ImageError: its image can't be read.
    """
    if isinstance(given, Query):
        return given
    if isinstance(given, Demonstration):
        return Query(given.image, given.prompt, None, given.id, given.group)
    row = given if isinstance(given, Mapping) else {"image": given}
    if "image" not in row and "question" not in row and "prompt" not in row:
        raise RowError(f"expected an input with 'image' and 'prompt' (or 'question'), got the keys {list(row)}")
    asked = next((row[key] for key in ("question", "prompt") if row.get(key) is not None), None)
    asked = default_prompt() if asked is None else asked
    draft = row.get("draft")
    for name, text in (("prompt", asked), ("draft", draft)):
        if text is not None and not isinstance(text, str):
            raise RowError(f"{_named(row)}: expected {name!r} as text, got {type(text).__name__}")
    image = row.get("image")
    if image is not None:
        image = _read_image(image, _named(row), timeout)
    elif not asked:
        raise RowError(f"{_named(row)}: expected an image or a prompt, both are empty")
    id, group = (None if row.get(key) is None else str(row[key]) for key in ("id", "group"))
    return Query(image, asked, draft, id, group)


def _named(row: Mapping[str, Any]) -> str:
    return "input" if row.get("id") is None else f"input with id {row['id']!r}"


def _read_image(image: Any, where: str, timeout: float | None) -> Image:
    source = os.fspath(image) if isinstance(image, os.PathLike) else image
    try:
        return load_image(source, timeout=timeout)
    # Decoders and the network raise nearly anything, and transformers repeats a whole base64 text in its message.
    except Exception as error:
        got = f"{source[:80]!r}" if isinstance(source, str) else type(source).__name__
        raise ImageError(
            f"{where}: expected an image as a PIL image, a path, an address or base64 text, got {got}, which can't "
            f"be read ({type(error).__name__})"
        ) from error


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
    """Inputs as Pipeline knows them: one, a list, a torch Dataset, or a generator."""
    import datasets

    if isinstance(inputs, (list, GeneratorType, torch.utils.data.Dataset, str, os.PathLike, Mapping)):
        return inputs
    if isinstance(inputs, tuple):
        return list(inputs)
    if isinstance(inputs, datasets.Dataset):
        return _Rows(inputs)
    return (item for item in inputs) if isinstance(inputs, Iterable) else inputs
