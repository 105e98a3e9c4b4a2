"""`drum-hf app`: two strategies side by side, in the browser."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .options import column_options, default_to_teacher, load_teacher, model_options, read_table

if TYPE_CHECKING:
    from ..data import TripletTable
    from ..retriever.retriever import DemoRetriever

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser(
        "app", help="a page that shows what two strategies retrieve and what the LVLM answers"
    )
    parser.add_argument(
        "--retriever", help="folder or Hub id; by default SIT + draft, untrained, on the playground's world"
    )
    parser.add_argument(
        "--second",
        choices=("si", "st", "sit", "sit+draft"),
        help="untrained strategy beside it (default: sit+draft; si without --retriever)",
    )
    parser.add_argument("--queries", help="table of examples to pick from; by default rows of the support set")
    column_options(parser)
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows of it that can't be used")
    parser.add_argument("--world-seed", type=int, default=0, help="of the playground's world (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--host", help="address to listen on; by default this machine only")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    model_options(parser)
    default_to_teacher(parser)
    encoder = parser._option_string_actions["--encoder"]
    encoder.default = None
    encoder.help = (encoder.help or "").replace("%(default)s", "the retriever's own, or the playground's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..retriever.retriever import DemoRetriever
    from ..serving.app import RetrieverView, build_app, launch, similarity
    from ..utils.optional import require

    require("gradio", "the app")  # before anything is loaded
    examples = None
    if args.retriever:
        retriever = DemoRetriever.from_pretrained(args.retriever, device=args.device)
    else:
        retriever, examples = _playground(args)
    if args.queries:
        examples = read_table(args.queries, args)
    first: DemoRetriever | RetrieverView = retriever if args.retriever else similarity(retriever, "sit+draft")
    second = similarity(
        retriever,
        args.second or ("sit+draft" if args.retriever else "si"),
        encoder=args.encoder if args.retriever else None,
        device=args.device,
    )
    app = build_app(
        first,
        load_teacher(args, retriever),
        second=second,
        examples=examples,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency if args.endpoint else 1,
    )
    launch(
        app,
        host=args.host,
        port=args.port,
        share=args.share,
        started=lambda url: sys.stdout.write(f"{url} · stop it with Ctrl+C\n") and sys.stdout.flush(),
    )


def _playground(args: argparse.Namespace) -> tuple[DemoRetriever, TripletTable]:
    from ..playground import make_world
    from ..retriever.retriever import DemoRetriever

    world = make_world(args.world_seed)
    encoder = args.encoder or "playground/clip"
    return DemoRetriever.from_encoder(encoder, support=world.support, device=args.device), world.queries
