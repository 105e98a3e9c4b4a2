"""LVLM scores: stored by content, shared, and turned into feedback by id."""

from .cached import CachedLVLM
from .feedback import Feedback
from .store import ScoreStore

__all__ = ["CachedLVLM", "Feedback", "ScoreStore"]
