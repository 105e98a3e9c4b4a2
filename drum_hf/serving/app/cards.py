"""Results of the app as HTML. Everything that a user or an LVLM wrote is escaped."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from ...evaluation.metrics import exact_match
from ...utils.images import load_image
from .compare import Outcome, SideBySide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from ...types import Demonstration

__all__ = ["CSS", "answer_card", "error_card", "heading_card", "outcome_cards", "thumbnail"]

_SIDE = 256  # pixels of a thumbnail's longer side, at most
_TINY = 96  # pictures up to this side are drawn with their pixels as squares

_NAMES = {"image": "image", "prompt": "prompt", "response": "draft"}

CSS = """
#examples .caption-label { display: none; } /* it would hide a third of the picture, and stands in the question box */
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(max(100px, 15%), 1fr)) !important; }
.gradio-container input[type=range] { min-width: 0; } /* so that a narrow screen holds all there is */
#error:not(:has(.drum-error)), #zero-shot:not(:has(.drum-answer)) { display: none; }
:is(#error, #zero-shot, [id^="strategy-"]) .html-container { padding: 0 !important; }
.drum-error { border-left: 4px solid #c0392b; background: #c0392b1a; padding: .6rem .9rem; border-radius: 4px; }
.drum-answer { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .9rem; }
.drum-answer strong { font-size: 1.2rem; overflow-wrap: anywhere; }
.drum-quiet { opacity: .72; font-size: .85rem; }
.drum-right { color: #15803d; font-weight: 600; }
.dark .drum-right { color: #4ade80; }
.drum-demos { list-style: none; margin: .6rem 0 0; padding: 0; display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(122px, 1fr)); }
.drum-demos li { border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; margin: 0; }
.drum-demos img { width: 100%; height: 130px; object-fit: contain; background: var(--background-fill-secondary);
  margin: 0; border-radius: 0; }
.drum-demos .drum-none { height: 130px; display: grid; place-items: center; }
.drum-demos img.drum-tiny { image-rendering: pixelated; }
.drum-demos div { padding: .4rem .6rem; overflow-wrap: anywhere; }
.drum-bar { display: flex; height: 6px; border-radius: 3px; overflow: hidden; margin: .25rem 0;
  background: var(--border-color-primary); }
.drum-bar i, .drum-key i { background: #0072b2; }
.drum-bar i.prompt, .drum-key i.prompt { background: #e69f00; }
.drum-bar i.response, .drum-key i.response { background: #009e73; }
.drum-key { margin-top: .5rem; }
.drum-key i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin: 0 .3em; }
"""


def thumbnail(image: Image) -> Image:
    """RGB, at most 256 pixels a side; tiny pictures are enlarged with their pixels as squares, by a whole factor."""
    from PIL.Image import Resampling

    small = load_image(image).copy()
    longer = max(small.size)
    if longer <= _TINY:
        factor = _SIDE // longer
        return small.resize((small.width * factor, small.height * factor), Resampling.NEAREST)
    small.thumbnail((_SIDE, _SIDE))
    return small


def _picture(image: Image | None, alt: str) -> str:
    if image is None:
        return '<div class="drum-none drum-quiet">no image</div>'
    tiny = max(image.size) <= _TINY
    small, kind = (load_image(image), "PNG") if tiny else (thumbnail(image), "JPEG")
    data = io.BytesIO()
    small.save(data, kind)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img class="{"drum-tiny" if tiny else ""}" alt="{html.escape(alt)}" src="{source}">'


def heading_card(heading: str, text: str, *, level: int = 2) -> str:
    """A heading and a sentence, as text whatever they hold: a retriever's files say what its models are called."""
    return f"<h{level}>{html.escape(heading)}</h{level}><p>{html.escape(text)}</p>"


def error_card(message: str) -> str:
    """An error in the words that name it."""
    return f'<div class="drum-error" role="alert">{html.escape(message)}</div>'


def answer_card(comparison: SideBySide, gold: Sequence[str] = ()) -> str:
    """The answer without demonstrations, and the gold response where it is known."""
    known = f'<div class="drum-quiet">Gold response: {html.escape(" / ".join(gold))}</div>' if gold else ""
    title = "Zero-shot answer, also the draft for retrieval"
    return f'<div class="drum-answer">{_answer(title, comparison.zero_shot, gold)}{known}</div>'


def _answer(title: str, answer: str, gold: Sequence[str]) -> str:
    right = gold and exact_match(answer, list(gold))
    mark = ' <span class="drum-right">✓ matches the gold response</span>' if right else ""
    shown = html.escape(answer) if answer.strip() else '<span class="drum-quiet">(empty)</span>'
    return f'<div class="drum-quiet">{html.escape(title)}</div><strong>{shown}</strong>{mark}'


def outcome_cards(outcome: Outcome, gold: Sequence[str] = ()) -> str:
    """One strategy's answer, then its demonstrations, most useful first, each with its score by part."""
    found = outcome.retrieval.demonstrations
    weighed = " + ".join(
        f'<i class="{part}"></i>{weight:.2f} × {_NAMES[part]}' for part, weight in outcome.weights.items() if weight
    )
    cards = "".join(
        _card(rank, demonstration, score, parts)
        for rank, (demonstration, score, parts) in enumerate(
            zip(found, outcome.retrieval.scores, outcome.parts, strict=True), start=1
        )
    )
    shots = f"{len(found)} demonstration{'s' if len(found) != 1 else ''}"
    return (
        f'<div class="drum-answer">{_answer(f"{outcome.name}: answer with {shots}", outcome.answer, gold)}</div>'
        f'<div class="drum-quiet drum-key" title="of each part, the cosine similarity">Score = {weighed}</div>'
        f'<ol class="drum-demos">{cards}</ol>'
    )


def _card(rank: int, demonstration: Demonstration, score: float, parts: dict[str, float]) -> str:
    # A part may count against a demonstration; the bar shows what counts for it, the title all of it.
    bar = "".join(
        f'<i class="{part}" style="width:{100 * max(0.0, value):.1f}%"></i>' for part, value in parts.items()
    )
    told = ", ".join(f"{_NAMES[part]} {value:+.3f}" for part, value in parts.items() if value)
    prompt, response = html.escape(demonstration.prompt), html.escape(demonstration.response)
    return (
        f"<li>{_picture(demonstration.image, f'Demonstration {rank}')}"
        f'<div title="{html.escape(demonstration.id)}: {told}">'
        f'<span class="drum-quiet">{rank}. score {score:.3f}</span><div class="drum-bar" style="padding:0">{bar}</div>'
        f'<span class="drum-quiet">{prompt}</span><br><b>{response}</b></div></li>'
    )
