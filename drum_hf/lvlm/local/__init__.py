"""LVLMs that run in this process, with transformers."""

from .model import TransformersLVLM

__all__ = ["TransformersLVLM"]
