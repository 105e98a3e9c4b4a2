"""`drum-hf eval`: evaluate retrievers and baselines, or carry out a suite."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.redaction import shown_command
from .options import (
    data_options,
    default_to_teacher,
    ints,
    load_teacher,
    model_options,
    names,
    read_table,
    read_tables,
    write_json,
)

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever

__all__ = ["add", "run"]

# Typed out, since what knows them takes seconds to import; a test compares the two.
_UNTRAINED = (
    "zero-shot, random, fixed, si, st, sit, sit+draft, si+draft, st+draft, bm25, mmices, oracle (same answer), "
    "oracle-score (the LVLM's own ranking)"
)
_TRAINED = (
    "drum, drum-rank, udr, epr, msier, drum-rank-weights, drum-position, drum-kl, drum-no-draft, drum-no-image, "
    "drum-no-prompt, drum-no-list, drum-no-in-batch, drum-best, drum-alone, drum-no-mining"
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser(
        "eval", help="evaluate retrievers and baselines on a table of queries, or carry out a suite"
    )
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
        type=names,
        metavar="NAMES",
        help="comma-separated (default: zero-shot,random,sit+draft and each --retriever; with --suite its own), of: "
        f"{_UNTRAINED}; with a --retriever or a suite: {_TRAINED}",
    )
    parser.add_argument("--shots", type=ints, help="such as 1,2,4 (default: 4; with --suite the suite's)")
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
    suite = parser.add_argument_group("suite")
    suite.add_argument("--suite", help="playground, playground-ablations, drum-paper, or a YAML file")
    suite.add_argument("--out", type=Path, help="folder of the results; the same command goes on where it stopped")
    suite.add_argument("--world-seeds", type=ints, help="of the playground's worlds, such as 1,2,3")
    suite.add_argument("--tasks", type=names, help="data sets or tasks of the suite, such as vqa,captioning")
    suite.add_argument("--dry-run", action="store_true", help="say what would be downloaded, trained and asked")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--store", type=Path, help="SQLite file that keeps answers, so that none is generated twice")
    data_options(parser, required=False)
    model_options(parser)
    default_to_teacher(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    if args.suite:
        _run_suite(args)
        return
    for option in ("out", "world_seeds", "tasks", "dry_run"):
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} is for a suite; give --suite NAME or FILE.yaml")
    from ..experiments.demo import evaluate_strategies
    from ..experiments.report import format_limits, format_table

    retrievers = _load_retrievers(args.retriever, args.device)
    if args.data:
        support, queries = read_tables(args)
    elif retrievers and args.queries:
        support, queries = next(iter(retrievers.values())).support, read_table(args.queries, args)
    else:
        raise ValueError("expected --data TABLE, or --retriever FOLDER with --queries TABLE; got neither")
    lvlm = load_teacher(args, next(iter(retrievers.values()), None))
    results = evaluate_strategies(
        support,
        queries,
        names=args.strategies or ("zero-shot", "random", "sit+draft", *retrievers),
        shots=args.shots or (4,),
        lvlm=lvlm,
        encoder=args.encoder,
        retriever=retrievers,
        task=args.task,
        metric=args.metric,
        store=args.store,
        order=args.order,
        selector=args.selector,
    )
    data = {"support": support.fingerprint, "queries": queries.fingerprint}
    write_json(args.json, results, seed=0, data=data, lvlm=lvlm)
    sys.stdout.write(format_table(results) + "\n" + format_limits(results))


def _load_retrievers(given: Sequence[str], device: str | None) -> dict[str, DemoRetriever]:
    """Strategy -> retriever, from [NAME=]FOLDER each."""
    from ..evaluation.registry import check_names
    from ..retriever.retriever import DemoRetriever

    folders: dict[str, str] = {}
    for text in given:
        # a folder whose own name holds a "=" is taken as it is
        name, folder = ("drum", text) if "=" not in text or Path(text).is_dir() else text.split("=", 1)
        if name in folders:
            raise ValueError(
                f"expected one --retriever for each strategy, got {folders[name]!r} and {folder!r} for {name!r}; "
                "name them, as in --retriever epr=FOLDER"
            )
        folders[name] = folder
    check_names(folders)
    return {name: DemoRetriever.from_pretrained(folder, device=device) for name, folder in folders.items()}


def _run_suite(args: argparse.Namespace) -> None:
    from ..experiments.suites import format_plan, load_suite, plan_suite, run_suite
    from ..playground import make_world, world_rows
    from ..utils.manifest import MANIFEST

    spec = load_suite(args.suite).narrowed(
        tasks=args.tasks, strategies=args.strategies, shots=args.shots, world_seeds=args.world_seeds
    )
    if args.dry_run:
        plan = plan_suite(spec, world_rows)
        write_json(args.json, plan)
        sys.stdout.write(format_plan(plan) + "\n")
        return
    for option in ("data", "queries", "retriever", "endpoint", "metric", "selector"):
        if getattr(args, option):
            raise ValueError(f"--{option} does not go with --suite; a suite file says all of it: docs/suites.md")
    for option, usual in (("lvlm", None), ("encoder", "playground/clip"), ("order", "best_last")):
        if getattr(args, option) != usual:
            raise ValueError(f"--{option} does not go with --suite; a suite file says all of it: docs/suites.md")
    out = args.out or Path("out") / spec.name
    command = shown_command(["drum-hf", *sys.argv[1:]])
    summary = run_suite(spec, out, make_world=make_world, store=args.store, command=command)
    about = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    write_json(args.json, summary, **{name: about[name] for name in ("seed", "data", "lvlm", "settings")})
    sys.stdout.write((out / "tables.md").read_text(encoding="utf-8") + f"\n{out / 'report.html'}\n")
