"""Processors of vision-language models, loaded without their parts for videos where torchvision is missing."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

__all__ = ["load_processor"]

logger = logging.getLogger(__name__)


def _no_numbers(number: int) -> str:
    raise ImportError("videos need num2words and torchvision: pip install num2words torchvision")


def image_only(processor_class: Any) -> Any:
    """The processor's class without its video processor, which needs torchvision; images don't."""
    from transformers import ProcessorMixin

    class ImageOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            arguments = super()._get_arguments_from_pretrained(*args, **kwargs)
            arguments.insert(processor_class.get_attributes().index("video_processor"), None)
            return arguments

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
        ImportError: the family's processor for images needs torchvision, too (Lfm2-VL's).
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if (
        is_torchvision_available()
        or processor_class is None
        or "video_processor" not in processor_class.get_attributes()
    ):
        return AutoProcessor.from_pretrained(name_or_path, **kwargs)
    logger.info("torchvision is not installed: %s loads without its video processor", processor_class.__name__)
    return image_only(processor_class).from_pretrained(name_or_path, **kwargs)
