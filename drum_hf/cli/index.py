"""`drum-hf index`: build, look into or change a retriever."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..index.registry import index_kinds
from .options import data_options, encoder_dtype_option, model_options, read_table

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("index", help="build a retriever over a support set, look into one, or change one")
    parser.add_argument("retriever", help="folder of the retriever")
    parser.add_argument(
        "--kind", choices=index_kinds(), default="flat", help="of a new retriever (default: %(default)s)"
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of a new retriever's vectors (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-rows", type=int, metavar="N", help="have a new retriever's index in shards of so many rows"
    )
    parser.add_argument(
        "--strategy",
        choices=("si", "st", "sit", "sit+draft"),
        default="sit+draft",
        help="parts that a new retriever compares: image, prompt, draft (default: %(default)s)",
    )
    parser.add_argument("--add", metavar="TABLE", help="add these demonstrations")
    parser.add_argument("--remove", metavar="ID", nargs="+", help="remove these demonstrations")
    data_options(parser, required=False, queries=None, task=False, metric=False)
    model_options(parser, lvlm=False)
    encoder_dtype_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..retriever.retriever import DemoRetriever

    folder = Path(args.retriever)
    if args.data:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"expected a new or empty folder to build into; {folder} holds files. Use --add to extend it"
            )
        options = {"storage": args.storage}
        if args.shard_rows is not None:
            options["shard_rows"] = args.shard_rows
        retriever = DemoRetriever.from_encoder(
            args.encoder,
            support=read_table(args.data, args, split=args.split),
            strategy=args.strategy,
            index_kind=args.kind,
            index_options=options,
            dtype=args.encoder_dtype,
            device=args.device,
        )
        retriever.save_pretrained(folder)
    else:
        retriever = DemoRetriever.from_pretrained(args.retriever, device=args.device)
    if args.remove:
        retriever.remove(args.remove)
    if args.add:
        retriever.add(read_table(args.add, args))
    if args.add or args.remove:
        retriever.save_pretrained(folder)
    weights = ", ".join(f"{part} {weight:.3f}" for part, weight in retriever.weights.items())
    sys.stdout.write(f"{retriever!r}\nweights: {weights}; {retriever.index.dimension} dimensions\n")
