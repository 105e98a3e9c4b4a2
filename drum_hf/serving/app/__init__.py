"""A page that shows what a retriever finds and what an LVLM makes of it, two strategies side by side (extra `app`).

`compare.py` is what it does, without any page; `cards.py` writes results as HTML; `page.py` is the page, in Gradio.
"""

from __future__ import annotations

from .compare import Comparer, Outcome, RetrieverView, SideBySide, similarity
from .page import build_app, launch

__all__ = ["Comparer", "SideBySide", "Outcome", "RetrieverView", "build_app", "launch", "similarity"]
