"""`drum-hf eval`: evaluate retrievers and baselines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import data_options, ints, load_lvlm, model_options, read_table, read_tables, write_json

if TYPE_CHECKING:
    from ..retriever import DemoRetriever

__all__ = ["add", "run"]

# Typed out, since what knows them takes seconds to import; a test compares the two.
_UNTRAINED = (
    "zero-shot, random, fixed, si, st, sit, sit+draft, si+draft, st+draft, bm25, mmices, oracle (same answer), "
    "oracle-score (the LVLM's own ranking)"
)
_TRAINED = (
    "drum, drum-rank, drum-position, drum-kl, udr, epr, msier, drum-no-draft, drum-no-image, drum-no-prompt, "
    "drum-no-list, drum-no-in-batch, drum-no-mining"
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("eval", help="evaluate retrievers and baselines on a table of queries")
    parser.add_argument(
        "--retriever",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="folder or Hub id of a trained retriever, and the strategy that it is (default: drum); may be given "
        "several times. Without --data, the first one's support set is used",
    )
    parser.add_argument(
        "--strategies",
        default="zero-shot,random,sit+draft,drum",
        metavar="NAMES",
        help=f"comma-separated (default: %(default)s), of: {_UNTRAINED}; with a --retriever: {_TRAINED}",
    )
    parser.add_argument("--shots", type=ints, default=(4,), help="such as 1,2,4 (default: 4)")
    parser.add_argument(
        "--order",
        choices=("best_last", "best_first", "shuffled"),
        default="best_last",
        help="how demonstrations are shown (default: %(default)s)",
    )
    parser.add_argument(
        "--selector",
        metavar="NAME",
        help="chooses among what each retriever ranks best: mmr, dpp, coverage, answers or budget",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--store", type=Path, help="SQLite file that keeps answers, so that none is generated twice")
    data_options(parser, required=False)
    model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..evaluation.report import format_table
    from ..experiment import evaluate_strategies

    retrievers = _load_retrievers(args.retriever, args.device)
    if args.data:
        support, queries = read_tables(args)
    elif retrievers and args.queries:
        support, queries = next(iter(retrievers.values())).support, read_table(args.queries, args)
    else:
        raise ValueError("expected --data TABLE, or --retriever FOLDER with --queries TABLE; got neither")
    results = evaluate_strategies(
        support,
        queries,
        names=args.strategies.split(","),
        shots=args.shots,
        lvlm=load_lvlm(args),
        encoder=args.encoder,
        retriever=retrievers,
        task=args.task,
        metric=args.metric,
        store=args.store,
        order=args.order,
        selector=args.selector,
    )
    write_json(args.json, results)
    sys.stdout.write(format_table(results) + "\n")


def _load_retrievers(given: Sequence[str], device: str | None) -> dict[str, DemoRetriever]:
    """Strategy -> retriever, from [NAME=]FOLDER each."""
    from ..evaluation.registry import check_names
    from ..retriever import DemoRetriever

    folders: dict[str, str] = {}
    for text in given:
        # a folder whose own name holds a "=" is taken as it is
        name, folder = ("drum", text) if "=" not in text or Path(text).is_dir() else text.split("=", 1)
        if name in folders:
            raise ValueError(
                f"expected one --retriever for each strategy, came {folders[name]!r} and {folder!r} for {name!r}; "
                "name them, as in --retriever epr=FOLDER"
            )
        folders[name] = folder
    check_names(folders)
    return {name: DemoRetriever.from_pretrained(folder, device=device) for name, folder in folders.items()}
