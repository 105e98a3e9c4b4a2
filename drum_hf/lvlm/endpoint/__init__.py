"""LVLMs behind an OpenAI-compatible chat API."""

from .model import OpenAILVLM

__all__ = ["OpenAILVLM"]
