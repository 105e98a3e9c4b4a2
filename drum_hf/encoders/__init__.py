"""Vision-language embedding models: loading, joint embeddings, LoRA adapters."""

from .joint import JointEncoder, build_encoder, load_encoder

__all__ = ["JointEncoder", "build_encoder", "load_encoder"]
