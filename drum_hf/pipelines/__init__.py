"""The tasks `icl-vqa`, `icl-image-classification` and `icl-image-captioning`."""

from .pipelines import (
    DEFAULT_LVLM,
    ICLImageCaptioningPipeline,
    ICLImageClassificationPipeline,
    ICLPipeline,
    ICLVQAPipeline,
    pipeline,
)

__all__ = [
    "DEFAULT_LVLM",
    "ICLImageCaptioningPipeline",
    "ICLImageClassificationPipeline",
    "ICLPipeline",
    "ICLVQAPipeline",
    "pipeline",
]
