"""Vision-language embedding models: loading, joint embeddings, LoRA adapters."""

from .joint import PARTS, JointEncoder, encode_items
from .loading import build_encoder, load_encoder, prepare_training

__all__ = ["PARTS", "JointEncoder", "build_encoder", "encode_items", "load_encoder", "prepare_training"]
