"""`DemoRetriever`: encoder, index and support set in one object."""

from .retriever import STRATEGIES, DemoRetriever

__all__ = ["DemoRetriever", "STRATEGIES"]
