"""`drum-hf eval`: evaluate a retriever and baselines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import data_options, ints, load_lvlm, model_options, read_table, read_tables, write_json

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("eval", help="evaluate a retriever and baselines on a table of queries")
    parser.add_argument("--retriever", help="folder or Hub id of a retriever; its support set is used")
    parser.add_argument(
        "--strategies", default="zero-shot,random,sit+draft,drum", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--shots", type=ints, default=(4,), help="such as 1,2,4 (default: 4)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--store", type=Path, help="SQLite file that keeps answers, so that none is generated twice")
    data_options(parser, required=False)
    model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..evaluation.report import format_table
    from ..experiment import evaluate_strategies
    from ..manifest import manifest_beside
    from ..retriever import DemoRetriever

    retriever = DemoRetriever.from_pretrained(args.retriever, device=args.device) if args.retriever else None
    if args.data:
        support, queries = read_tables(args)
    elif retriever is not None and args.queries:
        support, queries = retriever.support, read_table(args.queries, args)
    else:
        raise ValueError("expected --data TABLE, or --retriever FOLDER with --queries TABLE; got neither")
    lvlm = load_lvlm(args)
    results = evaluate_strategies(
        support,
        queries,
        names=args.strategies.split(","),
        shots=args.shots,
        lvlm=lvlm,
        encoder=args.encoder,
        retriever=retriever,
        task=args.task,
        metric=args.metric,
        store=args.store,
    )
    write_json(args.json, results)
    if args.json is not None:
        data = {"support": support.fingerprint, "queries": queries.fingerprint}
        manifest_beside(args.json, seed=0, data=data, lvlm=lvlm)
    sys.stdout.write(format_table(results) + "\n")
