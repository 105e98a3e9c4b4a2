"""Processors of vision-language models: loaded without their parts for videos, and told how closely to look."""

from __future__ import annotations

import copy
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import DependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageBudget", "coarsest", "default_budget", "image_only", "image_tokens", "load_processor", "with_budget"]

logger = logging.getLogger(__name__)

#: Tokens an image, or arguments of the family's image processor; "published": as the processor was saved.
ImageBudget = int | str | Mapping[str, Any]

#: Shots that fit by default, and the tokens of text in each turn that are set aside for it. Our choice.
_SHOTS = 8
_TEXT_TOKENS = 64

#: Settings of image processors that say how many tokens an image takes.
_NAMES = (
    *("size", "patch_size", "merge_size", "do_image_splitting", "crop_to_patches", "slice_mode", "do_pan_and_scan"),
    *("max_image_tiles", "max_patches", "min_patches", "max_tiles", "min_tiles"),
    *("max_slice_nums", "max_image_size", "max_soft_tokens", "max_image_tokens", "min_image_tokens"),
)

#: (width, height) of the pictures that a budget must hold for: of usual shapes, and wide.
_SHAPES = ((640, 480), (480, 480), (480, 640), (960, 320))


# ---- without videos ----


def _no_numbers(number: int) -> str:
    raise ImportError("videos need num2words and torchvision: pip install num2words torchvision")


class _NoVideos:
    """Stands where a processor reads settings of its part for videos."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def image_only(processor_class: Any) -> Any:
    """The processor's class without its video processor, which needs torchvision; images don't."""
    from transformers import ProcessorMixin

    class ImageOnly(processor_class):
        _without = False

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [n for n in processor_class.get_attributes() if not (cls._without and n == "video_processor")]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            cls._without = True
            try:
                arguments = super()._get_arguments_from_pretrained(*args, **kwargs)
            finally:
                cls._without = False
            arguments.insert(processor_class.get_attributes().index("video_processor"), None)
            return arguments

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            try:
                return super().from_args_and_dict(args, processor_dict, **kwargs)
            except AttributeError:  # it copies settings of its video processor
                filled = [_NoVideos() if part is None else part for part in args]
                return super().from_args_and_dict(filled, processor_dict, **kwargs)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            return {name: value for name, value in super().to_dict().items() if name != "video_processor"}

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            type(self)._without = True
            try:
                return super().save_pretrained(*args, **kwargs)
            finally:
                type(self)._without = False

    if processor_class.__name__ == "SmolVLMProcessor":
        # Its own asks the video processor for its frame rate, and then calls this one.
        ImageOnly.apply_chat_template = ProcessorMixin.apply_chat_template
        # It refuses to be made without num2words, by which it spells out how many frames a video has.
        module: Any = sys.modules[processor_class.__module__]
        module.num2words = module.num2words or _no_numbers
    ImageOnly.__name__ = processor_class.__name__  # what save_pretrained writes down
    return ImageOnly


def load_processor(name_or_path: str | os.PathLike[str], config: Any, **kwargs: Any) -> Any:
    """`AutoProcessor.from_pretrained`; without torchvision, a processor loads without its part for videos.

    Args:
        name_or_path: directory or Hub id.
        config: of the model that the processor belongs to.
        kwargs: for the processor's `from_pretrained`.

    Raises:
        DependencyError: the family's processor for images needs a package that is not installed, as Lfm2-VL's,
            Mistral 3's and Llama 4's need torchvision.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    maker: Any = AutoProcessor
    try:
        with_videos = processor_class is not None and "video_processor" in processor_class.get_attributes()
        if with_videos and not is_torchvision_available():
            logger.info("torchvision is not installed: %s loads without its video processor", processor_class.__name__)
            maker = image_only(processor_class)
        processor = maker.from_pretrained(name_or_path, **kwargs)
        if not kwargs.get("trust_remote_code"):
            _try_out(processor)
        return processor
    except ImportError as error:
        package = next((p for p in ("torchvision", "num2words", "timm", "mistral_common") if p in str(error)), None)
        if package is None or isinstance(error, DependencyError):
            raise
        raise DependencyError(
            f"the processor of {os.fspath(name_or_path)!r} (of the family {getattr(config, 'model_type', '?')}) needs "
            f"the package {package!r}, which is not installed; run: pip install {package}"
        ) from error


def _try_out(processor: Any) -> None:
    """Process a blank picture: settings that fit no picture fail here, and not at the first request."""
    from PIL.Image import new

    images = getattr(processor, "image_processor", None)
    if images is not None:
        images(images=[new("RGB", (224, 224))], return_tensors="pt")


# ---- how closely to look ----


def image_tokens(processor: Any, image: Image) -> int:
    """Tokens that a processor makes of an image that is one of several of its conversation."""
    out = processor(text=[processor.image_token * 2], images=[[image, image]], padding=True, return_tensors="pt")
    bare = processor.tokenizer("", return_tensors=None)["input_ids"]
    return (int(out["attention_mask"].sum()) - len(bare)) // 2


def with_budget(processor: Any, budget: ImageBudget) -> Any:
    """A copy of a processor that makes no more of an image than a budget allows; itself where it is "published".

    Args:
        budget: tokens an image, at most: the finest setting of the family that stays below. Or arguments of the image
            processor, such as `{"do_image_splitting": False}` or `{"max_pixels": 401408}`.

    Raises:
        ValueError: the family can't make so few tokens of an image, or knows no such argument.
    """
    if isinstance(budget, Mapping):
        return _changed(processor, dict(budget))
    if budget == "published":
        return processor
    if isinstance(budget, str) or budget < 1:
        raise ValueError(
            'expected image_budget as "auto", "published", a number of tokens, or arguments of the image processor, '
            f"got {budget!r}"
        )
    least = None
    for settings in _settings(_cuts(processor), budget):
        candidate = _changed(processor, settings) if settings else processor
        needed = _most_tokens(candidate)
        if needed <= budget:
            return candidate
        least = needed if least is None else min(least, needed)
    raise ValueError(
        f"expected an image_budget of at least {least} tokens, which is the least that "
        f"{type(processor.image_processor).__name__} makes of an image, got {budget}; raise it"
    )


def default_budget(processor: Any, context: int | None) -> ImageBudget:
    """ "published" where eight shots fit the context so; else pictures aren't cut into tiles, or are made smaller.

    Args:
        context: tokens that fit the LVLM's context, or None for no limit.
    """
    if context is None or not hasattr(processor, "image_processor") or not getattr(processor, "image_token", None):
        return "published"
    parts = _cuts(processor)
    room = context // (_SHOTS + 1) - _TEXT_TOKENS
    if room < 1:
        return "published"
    area = _pixels_a_token(parts)
    if area is not None:
        return "published" if parts.size["longest_edge"] <= room * area else {"max_pixels": room * area}
    whole = _whole(parts)
    if whole is None or _most_tokens(processor) <= room:
        return "published"
    return whole


def coarsest(processor: Any) -> dict[str, Any] | None:
    """Settings by which a picture isn't cut into tiles; None where the family doesn't cut or has no such setting."""
    return _whole(_cuts(processor)) if hasattr(processor, "image_processor") else None


def _changed(processor: Any, settings: dict[str, Any]) -> Any:
    parts = processor.image_processor
    known = set(getattr(type(parts).valid_kwargs, "__annotations__", {})) | {*parts.to_dict(), "size"}
    known -= {"image_grid_pinpoints"}  # the model's configuration says it, too (LLaVA-NeXT, LLaVA-OneVision)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(
            f"expected arguments of {type(parts).__name__} as image_budget, got {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(known))}"
        )
    changed = copy.copy(processor)
    given = {key: value for key, value in parts.to_dict().items() if key not in settings}
    changed.image_processor = type(parts).from_dict(given, **settings)
    usual = getattr(processor, "images_kwargs", None) or {}  # the family's own, which the image processor gets
    if settings.keys() & usual.keys():
        changed.images_kwargs = {**usual, **{key: settings[key] for key in settings.keys() & usual.keys()}}
    return changed


def _most_tokens(processor: Any) -> int:
    from PIL import Image

    return max(image_tokens(processor, Image.new("RGB", shape)) for shape in _SHAPES)


def _cuts(processor: Any) -> Any:
    """The image processor's settings, with those that the family's processor overrules."""
    parts = processor.image_processor
    usual = getattr(processor, "images_kwargs", None) or {}
    return types.SimpleNamespace(**{**{name: getattr(parts, name, None) for name in _NAMES}, **usual})


def _pixels_a_token(parts: Any) -> int | None:
    """Pixels that become one token, where a picture keeps its size up to a limit (Qwen-VL, GLM-V and others)."""
    size, merge = dict(parts.size or {}), parts.merge_size
    if merge is None or not (size.get("longest_edge") and size.get("shortest_edge")):
        return None
    return int(parts.patch_size * merge) ** 2


def _whole(parts: Any) -> dict[str, Any] | None:
    """Settings by which a picture isn't cut into tiles; None where it isn't anyway, or the family knows no such."""
    if getattr(parts, "do_image_splitting", False):
        return {"do_image_splitting": False}
    if getattr(parts, "crop_to_patches", False):
        return {"crop_to_patches": False}
    if getattr(parts, "slice_mode", False):
        return {"slice_mode": False}
    if getattr(parts, "do_pan_and_scan", False):
        return {"do_pan_and_scan": False}
    if (getattr(parts, "max_image_tiles", None) or 1) > 1:
        return {"max_image_tiles": 1}
    return None


def _settings(parts: Any, budget: int) -> Iterator[dict[str, Any]]:
    """Settings of an image processor, from the published one to the coarsest."""
    yield {}
    area = _pixels_a_token(parts)
    if area is not None:
        most = budget * area
        yield {"max_pixels": most, "min_pixels": min(parts.size["shortest_edge"], most)}
    for name in ("max_patches", "max_tiles", "max_slice_nums", "max_image_tiles"):
        if (count := getattr(parts, name, None)) and _whole(parts):
            least = max(2, getattr(parts, name.replace("max", "min"), 0) or 0)
            yield from ({name: count} for count in range(int(count) - 1, least - 1, -1))
    largest, tile = getattr(parts, "size", None), getattr(parts, "max_image_size", None)
    if getattr(parts, "do_image_splitting", False) and largest and tile and not isinstance(tile, int):
        side = tile["longest_edge"]
        yield from ({"size": {"longest_edge": side * k}} for k in range(largest["longest_edge"] // side - 1, 1, -1))
    if (soft := getattr(parts, "max_soft_tokens", None)) is not None:
        yield from ({"max_soft_tokens": n} for n in (1120, 560, 280, 140, 70) if n < soft)
    if (limit := getattr(parts, "max_image_tokens", None)) is not None and budget < limit:
        fewest = min(getattr(parts, "min_image_tokens", budget), budget)
        yield {**(_whole(parts) or {}), "max_image_tokens": budget, "min_image_tokens": fewest}
    if (whole := _whole(parts)) is not None:
        yield whole
