"""`DemoRetriever`: encoder, index and support set in one object."""

from .retriever import PART_WEIGHTS, DemoRetriever

__all__ = ["DemoRetriever", "PART_WEIGHTS"]
