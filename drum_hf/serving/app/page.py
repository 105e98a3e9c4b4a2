"""The app's page in Gradio: a thin face over `compare.py`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...encoders.joint import PARTS
from ...errors import DrumError, ImageError
from ...types import LVLM, Demonstration, Query
from ...utils.images import load_image
from ...utils.optional import require
from .cards import CSS, answer_card, error_card, heading_card, outcome_cards, thumbnail
from .compare import Comparer, RetrieverView, strategy_name

if TYPE_CHECKING:
    import gradio

    from ...data import TripletTable
    from ...retriever.retriever import DemoRetriever

__all__ = ["build_app", "launch"]

logger = logging.getLogger(__name__)

_EXAMPLES = 24  # pictures in the gallery (our choice)
_MOST_SHOTS = 16  # of the slider (our choice); more do not fit most contexts
_WAITING = 32  # users in the queue before others are told to come back (our choice)
_LABELS = {"image": "Image", "prompt": "Prompt", "response": "Draft"}
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def build_app(
    retriever: DemoRetriever | RetrieverView,
    lvlm: LVLM,
    *,
    second: DemoRetriever | RetrieverView | None = None,
    examples: TripletTable | None = None,
    max_new_tokens: int = 32,
    concurrency: int = 1,
    title: str = "Demonstrations for your LVLM",
) -> gradio.Blocks:
    """The page: an image and a question go in; each strategy's demonstrations and the LVLM's answers come out.

    Args:
        retriever: finds demonstrations.
        lvlm: answers, without demonstrations and with each strategy's.
        second: another strategy, shown beside the first.
        examples: rows to pick a query from; 24 of them, evenly spaced, are shown. None: the retriever's support set,
            where a row that is picked, and its group, are never among its own demonstrations.
        max_new_tokens: the longest answer.
        concurrency: users served at once; 1 is right for a model on this machine.
        title: the page's heading.

    Returns:
        A `gradio.Blocks`, to be started by `launch`.

    Raises:
        DependencyError: Gradio is not installed.
    """
    gr: Any = require("gradio", "the app")
    given = [retriever] if second is None else [retriever, second]
    strategies = [
        s if isinstance(s, RetrieverView) else RetrieverView(s, "Trained retriever" if s.teacher else "")
        for s in given
    ]
    compare = Comparer(lvlm, strategies, max_new_tokens=max_new_tokens)
    for strategy in strategies:
        strategy.retriever.index  # noqa: B018  # embedded now, not while the first user waits
    support = strategies[0].retriever.support
    shown = _spread(support if examples is None else examples)
    most = max(1, min(_MOST_SHOTS, *(len(s.retriever) for s in strategies)))

    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.HTML(
            heading_card(
                title,
                "The LVLM answers without demonstrations, and with those that each strategy retrieves from "
                f"{len(support):,} of them. Pick an example or upload an image, then ask.",
                level=1,
            )
        )
        picked, asked = gr.State(None), gr.State(False)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(type="pil", label="Image", height=260, sources=["upload", "clipboard"], buttons=[])
                image.preprocess = _uploaded  # not Gradio's own, which decodes any format of any size
                question = gr.Textbox(label="Question", placeholder=_placeholder(support), max_lines=3)
                shots = gr.Slider(
                    1,
                    most,
                    value=min(strategies[0].retriever.top_k, most),
                    step=1,
                    label="Shots",
                    elem_id="shots",
                    buttons=[],
                )
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("Examples: pick a query")
                gallery = gr.Gallery(
                    [(thumbnail(row.image), row.prompt) for row in shown if row.image is not None],
                    show_label=False,
                    columns=6,
                    height="auto",
                    allow_preview=False,
                    object_fit="contain",
                    format="png",
                    buttons=[],
                    interactive=False,
                    elem_id="examples",
                )
        error, zero_shot = gr.HTML(elem_id="error"), gr.HTML(elem_id="zero-shot")
        sliders, results = [], []
        with gr.Row(equal_height=False):
            for place, strategy in enumerate(strategies):
                with gr.Column(min_width=320):
                    name = strategy.name or f"{strategy_name(strategy.start)}, untrained"
                    gr.HTML(heading_card(f"{'AB'[place]}: {name}", _about(strategy)))
                    sliders += _sliders(gr, strategy)
                    results.append(gr.HTML(elem_id=f"strategy-{place + 1}", min_height=80))

        def run(picture: Any, row: int | None, text: str, count: float, *weights: float) -> tuple[str, ...]:
            example = None if row is None else shown[row]
            query, gold = _query(picture, text or "", example)
            comparison = compare(query, int(count), _read(weights, strategies))
            cards = (outcome_cards(outcome, gold) for outcome in comparison.outcomes)
            return "", answer_card(comparison, gold), *cards

        answer = _telling(run, 1 + len(strategies))
        inputs = [image, picked, question, shots, *sliders]
        outputs = [error, zero_shot, *results]
        one = {"concurrency_limit": concurrency, "concurrency_id": "lvlm", "show_progress_on": outputs[1:]}
        gr.on([button.click, question.submit], lambda: True, None, asked, queue=False, api_visibility="private")
        gr.on([button.click, question.submit], answer, inputs, outputs, api_name="ask", **one)
        gr.on(
            [shots.release, *(slider.release for slider in sliders)],
            lambda so_far, *values: answer(*values) if so_far else gr.skip(),
            [asked, *inputs],
            outputs,
            trigger_mode="always_last",
            api_visibility="private",
            **one,
        )

        def pick(event: Any) -> tuple[Any, ...]:
            row = shown[event.index]
            return thumbnail(row.image), row.prompt, event.index, False, *[""] * len(outputs)

        pick.__annotations__["event"] = gr.SelectData  # how Gradio knows what to hand over
        cleared = [picked, asked, *outputs]
        gallery.select(
            pick, None, [image, question, *cleared], queue=False, show_progress="hidden", api_visibility="private"
        )
        # another picture is not the example's any more
        gr.on(
            [image.upload, image.clear],
            lambda: (None, False, *[""] * len(outputs)),
            None,
            cleared,
            queue=False,
            api_visibility="private",
        )
    app.queue(max_size=_WAITING, default_concurrency_limit=concurrency)
    return app


def launch(
    app: gradio.Blocks,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    block: bool = True,
    started: Callable[[str], object] = lambda url: None,
) -> str:
    """Serve a page of `build_app`.

    Nothing is reported to anyone: no analytics, no fonts from elsewhere, and no public link unless `share`.

    Args:
        host: name or address to listen on; None: this machine only (on a Space, all of them).
        port: None: the first free one from 7860.
        share: make a public link through Gradio's servers.
        block: stay until interrupted.
        started: called with the address once the page is there.

    Returns:
        The page's address.

    Raises:
        ValueError: it can't listen there.
    """
    gr: Any = require("gradio", "the app")
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="gray", font=list(_SYSTEM_FONTS), font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, local, public = app.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            footer_links=[],
            max_file_size="20mb",
            ssr_mode=False,
            theme=theme,
            css=CSS,
        )
    except (OSError, OverflowError) as error:
        raise ValueError(f"expected to listen on {host or 'this machine'}:{port or 7860}, but {error}") from error
    url = public or local
    started(url)
    if block:
        app.block_thread()
    return url


def _about(strategy: RetrieverView) -> str:
    retriever = strategy.retriever
    if retriever.teacher:
        return f"{retriever.base_model}, trained on the feedback of {retriever.teacher.get('name')}. Part weights:"
    return f"{retriever.base_model}, as it is. Part weights:"


def _placeholder(support: TripletTable) -> str:
    return next((prompt for prompt in support.prompts if prompt.strip()), "")


def _spread(table: TripletTable) -> list[Demonstration]:
    """Rows with an image, evenly spaced, no picture twice."""
    first: dict[str, int] = {}
    for at, key in enumerate(table.image_keys):
        first.setdefault(key, at)
    first.pop("", None)
    rows = list(first.values())
    step = max(1, len(rows) // _EXAMPLES)
    return [table[table.ids[at]] for at in rows[::step][:_EXAMPLES]]


def _rounded(strategy: RetrieverView) -> list[float]:
    return [round(strategy.start[part], 2) for part in PARTS]


def _read(weights: Sequence[float], strategies: Sequence[RetrieverView]) -> list[dict[str, float] | None]:
    """Weights by strategy; None where the sliders stand as they did, since they show learned weights rounded."""
    triples = [list(weights[at : at + len(PARTS)]) for at in range(0, len(weights), len(PARTS))]
    return [
        None if triple == _rounded(strategy) else dict(zip(PARTS, triple, strict=True))
        for triple, strategy in zip(triples, strategies, strict=True)
    ]


def _sliders(gr: Any, strategy: RetrieverView) -> list[Any]:
    sliders = []
    with gr.Row():
        for part, start in zip(PARTS, _rounded(strategy), strict=True):
            has = strategy.retriever.weights[part] > 0
            sliders.append(
                gr.Slider(
                    0,
                    1,
                    value=start,
                    step=0.01,
                    label=_LABELS[part],
                    info=None if has else "not in this retriever's vectors",
                    interactive=has,
                    min_width=100,
                    buttons=[],
                )
            )
    return sliders


def _uploaded(upload: Any) -> Any:
    """The picture of an upload, or the error that says why not: raised here, Gradio would show its own insides."""
    if upload is None:
        return None
    data = upload.url if (upload.url or "").startswith("data:") else None
    try:
        return load_image(data or Path(upload.path))
    except ImageError as error:
        name = upload.orig_name or "another file"
        return ImageError(f"expected an image, got {name}, which can't be read as one ({error}); upload a PNG or JPEG")


def _query(picture: Any, text: str, example: Demonstration | None) -> tuple[Query, tuple[str, ...]]:
    """The query, and its gold responses where an example is asked as it stands."""
    if isinstance(picture, ImageError):
        raise picture
    if example is None or picture is None:
        return Query(picture, text), ()
    if text.strip() != example.prompt.strip():
        return Query(example.image, text, None, example.id, example.group), ()
    return Query(example.image, example.prompt, None, example.id, example.group), (
        example.references or (example.response,)
    )


def _telling(run: Callable[..., tuple[str, ...]], places: int) -> Callable[..., tuple[str, ...]]:
    """The same, with what went wrong as text in the first place and the other `places` empty."""

    @functools.wraps(run)
    def told(*values: Any) -> tuple[str, ...]:
        try:
            return run(*values)
        except (DrumError, ValueError, OSError, MemoryError) as error:
            message = str(error) or type(error).__name__
        except Exception as error:  # an LVLM behind a protocol may raise anything; the page must not show a trace
            logger.exception("the app could not answer")
            message = f"{type(error).__name__}: {error}"
        return error_card(message), *[""] * places

    return told
