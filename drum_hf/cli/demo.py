"""`drum-hf demo`: the main job on the playground or on your data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..types import TASKS
from ..utils.redaction import shown_command, shown_path
from .options import (
    data_options,
    ints,
    load_lvlm,
    make_settings,
    model_options,
    read_tables,
    training_options,
    write_json,
)

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("demo", help="the main job: baselines, DRUM and EPR, a table and a report")
    parser.add_argument("--world-seed", type=int, default=0, help="of the playground's world (default: %(default)s)")
    parser.add_argument("--world", choices=("easy", "standard", "hard"), default="standard", help="its difficulty")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--shots", type=int, default=4, help="demonstrations in the context (default: %(default)s)")
    parser.add_argument("--by-shots", type=ints, help="further numbers of demonstrations, such as 1,2,8")
    parser.add_argument(
        "--icl-tuning",
        action="store_true",
        help="instead: the playground's LVLM without and with ICL tuning, side by side on in-context benchmarks",
    )
    parser.add_argument(
        "--averaged",
        type=float,
        metavar="SHARE",
        help="with --icl-tuning: also an LVLM between the two, of so much of the tuned one's weights, such as 0.8",
    )
    data_options(parser, required=False)
    parser._option_string_actions["--task"].choices = (*TASKS, "all")
    model_options(parser)
    training_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    if args.icl_tuning:
        _compare_tuning(args)
        return
    if args.averaged is not None:
        raise ValueError("expected --averaged with --icl-tuning only: it averages the two LVLMs that this compares")
    from ..experiments.demo import run_experiment
    from ..experiments.report import format_limits, format_table
    from ..playground import make_world
    from ..utils.optional import require

    require("matplotlib", "the demo's plots")
    require("bm25s", "the demo's BM25 baseline")
    tasks = TASKS if args.task == "all" else (args.task,)
    if args.data and len(tasks) > 1:
        raise ValueError("expected one --task with --data; 'all' is for the playground")
    tables = read_tables(args) if args.data else None  # its faults are told before a large LVLM is loaded
    lvlm, encoder = load_lvlm(args), args.encoder
    results: dict[str, Any] = {}
    data: dict[str, str] = {}
    for task in tasks:
        facts: dict[str, Any] = {"world_seed": None, "command": shown_command(["drum-hf", *sys.argv[1:]])}
        if tables is not None:
            support, queries = tables
            facts["data"] = shown_path(args.data)
        else:
            world = make_world(args.world_seed, task=task, difficulty=args.world)
            support, queries = world.support, world.queries
            facts |= {"world_seed": args.world_seed, "world": args.world}
        # with captions no row has the same answer; on a user's LVLM the exhaustive ranking would cost far too much
        oracle = "answer" if task != "captioning" else "none" if args.data else "score"
        data |= {f"{task} support": support.fingerprint, f"{task} queries": queries.fingerprint}
        settings = make_settings(args, shots=args.shots, by_shots=args.by_shots, oracle=oracle)
        results[task] = run_experiment(
            support,
            queries,
            lvlm=lvlm,
            encoder=encoder,
            task=task,
            metric=args.metric,
            out_dir=args.out if len(tasks) == 1 else args.out / task,
            settings=settings,
            facts=facts,
        )
    content = results[tasks[0]] if len(tasks) == 1 else {"tasks": results}
    write_json(args.json, content, seed=args.seed, data=data, lvlm=lvlm, settings=content.get("settings"))
    sys.stdout.write(format_table(content) + "\n" + format_limits(content))
    for task in tasks:
        folder = args.out if len(tasks) == 1 else args.out / task
        sys.stdout.write(f"{task}: {folder / 'report.html'} · trained retriever: {folder / 'retriever'}\n")


def _compare_tuning(args: argparse.Namespace) -> None:
    """Base and tuned LVLM on the playground's in-context benchmarks, and the average of their weights if asked for."""
    from ..playground.building.benchmarks import compare_lvlms, format_comparison
    from ..scores.store import ScoreStore

    if args.data or args.endpoint or args.lvlm != "playground/lvlm":
        raise ValueError(
            "expected --icl-tuning without --data, --lvlm and --endpoint: it compares the playground's own LVLMs; "
            "drum-hf tune tunes yours"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    names = {"base": "playground/lvlm-base", "tuned": "playground/lvlm"}
    lvlms: dict[str, Any] = {key: load_lvlm(args, name) for key, name in names.items()}
    if args.averaged is not None:
        from ..tuning import average_weights

        lvlms["averaged"] = average_weights(lvlms["base"], lvlms["tuned"], share=args.averaged)
        names["averaged"] = lvlms["averaged"].name
    store = ScoreStore(args.out / "scores.sqlite")
    found = compare_lvlms(lvlms, seed=args.world_seed, questions=2_000, store=store)
    results = {"icl_tuning": found | {"lvlms": names, "command": shown_command(["drum-hf", *sys.argv[1:]])}}
    about = {"fingerprints": {names[key]: lvlm.fingerprint for key, lvlm in lvlms.items()}}
    for path in (args.out / "icl_tuning.json", args.json):
        write_json(path, results, seed=args.world_seed, lvlm=lvlms["tuned"], settings=about)
    sys.stdout.write(format_comparison(found, tuple(lvlms)) + "\n")
