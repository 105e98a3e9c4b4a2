"""The command `drum-hf`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DrumError

if TYPE_CHECKING:
    from .data import TripletTable
    from .experiment import Settings
    from .lvlm.local import TransformersLVLM

__all__ = ["main"]

TASKS = ("vqa", "classification", "captioning")

logger = logging.getLogger("drum_hf")


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _model_options(parser: argparse.ArgumentParser, *, lvlm: bool = True, encoder: bool = True) -> None:
    group = parser.add_argument_group("models")
    if lvlm:
        group.add_argument(
            "--lvlm", default="playground/lvlm", help="folder or Hub id of the LVLM (default: %(default)s)"
        )
        group.add_argument("--lvlm-revision", help="branch, tag or commit of the LVLM")
        group.add_argument("--dtype", default="auto", help="of the LVLM: auto, float32, bfloat16, float16")
        group.add_argument(
            "--batch-size", type=int, default=32, help="LVLM requests in a forward (default: %(default)s)"
        )
    if encoder:
        group.add_argument(
            "--encoder", default="playground/clip", help="folder or Hub id of a CLIP or SigLIP (default: %(default)s)"
        )
    group.add_argument("--device", help="cuda, cpu, …; the best one there is by default")


def _data_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        help="table of demonstrations: CSV, JSONL or parquet, or a folder of images with one of these",
    )
    group.add_argument("--queries", help="table of queries with gold responses; by default split off --data")
    group.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that can't be used, and count them"
    )
    group.add_argument("--task", choices=TASKS, default="vqa", help="default: %(default)s")
    group.add_argument("--metric", help="exact_match, vqa_accuracy, top1 or cider_d; by default the task's own")


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--rounds", type=int, help="mining rounds")
    group.add_argument("--candidates", type=int, help="new pairs that each query buys in a round")
    group.add_argument("--epochs", type=int, help="epochs in each round")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--train-batch-size", dest="batch", type=int, help="queries in a step")
    group.add_argument("--list-size", type=int, help="candidates drawn for a query in a step")
    group.add_argument("--lora", action="store_true", help="train LoRA adapters rather than all weights")
    group.add_argument("--seed", type=int, default=0)


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("drum-hf")
    except PackageNotFoundError:
        installed = "unknown (run from a source tree)"
    parser = argparse.ArgumentParser(
        prog="drum-hf",
        description="Learn which demonstrations your vision-language model needs in its prompt, and retrieve them.",
    )
    parser.add_argument("--version", action="version", version=installed)
    parser.add_argument("-q", "--quiet", action="store_true", help="warnings only, no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the main job: baselines, DRUM and EPR, a table and a report")
    demo.add_argument("--world-seed", type=int, default=0, help="of the playground's world (default: %(default)s)")
    demo.add_argument("--world", choices=("easy", "standard", "hard"), default="standard", help="its difficulty")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default: %(default)s)")
    demo.add_argument("--json", type=Path, help="also write the results to this file")
    demo.add_argument("--shots", type=int, default=4, help="demonstrations in the context (default: %(default)s)")
    demo.add_argument("--by-shots", type=_ints, help="further numbers of demonstrations, such as 1,2,8")
    _data_options(demo, required=False)
    demo._option_string_actions["--task"].choices = (*TASKS, "all")
    _model_options(demo)
    _training_options(demo)

    train = commands.add_parser("train", help="train a retriever for your LVLM and data")
    train.add_argument("--out", type=Path, required=True, help="folder of the retriever, checkpoints and score store")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--push-to-hub", metavar="REPO", help="upload the trained retriever")
    _data_options(train, required=True)
    _model_options(train)
    _training_options(train)

    score = commands.add_parser("score", help="buy the LVLM's scores of candidates ahead of training")
    score.add_argument("--store", type=Path, required=True, help="SQLite file that keeps the scores")
    score.add_argument("--retriever", help="trained retriever that proposes; by default the untrained encoder")
    score.add_argument("--dry-run", action="store_true", help="only say how many pairs and tokens, and how long")
    _data_options(score, required=True)
    _model_options(score)
    score.add_argument("--candidates", type=int, default=10, help="pairs for each query (default: %(default)s)")
    score.add_argument("--seed", type=int, default=0)

    evaluate = commands.add_parser("eval", help="evaluate a retriever and baselines on a table of queries")
    evaluate.add_argument("--retriever", help="folder or Hub id of a retriever; its support set is used")
    evaluate.add_argument(
        "--strategies", default="zero-shot,random,sit+draft,drum", help="comma-separated (default: %(default)s)"
    )
    evaluate.add_argument("--shots", type=_ints, default=(4,), help="such as 1,2,4 (default: 4)")
    evaluate.add_argument("--json", type=Path, help="write the results to this file")
    evaluate.add_argument("--store", type=Path, help="SQLite file that keeps answers, so that none is generated twice")
    _data_options(evaluate, required=False)
    _model_options(evaluate)

    index = commands.add_parser("index", help="build a retriever over a support set, look into one, or change one")
    index.add_argument("retriever", help="folder of the retriever")
    index.add_argument(
        "--kind", choices=("flat", "hnsw"), default="flat", help="of a new index (default: %(default)s)"
    )
    index.add_argument("--strategy", choices=("si", "st", "sit", "sit+draft"), default="sit+draft")
    index.add_argument("--add", metavar="TABLE", help="add these demonstrations")
    index.add_argument("--remove", metavar="ID", nargs="+", help="remove these demonstrations")
    _data_options(index, required=False)
    _model_options(index, lvlm=False)
    return parser


def _table(path: str, args: argparse.Namespace) -> TripletTable:
    from .data import load_table

    return load_table(path, on_bad_rows="skip" if args.skip_bad_rows else "raise")


def _tables(args: argparse.Namespace) -> tuple[TripletTable, TripletTable]:
    from .experiment import split_table

    table = _table(args.data, args)
    return (table, _table(args.queries, args)) if args.queries else split_table(table)


def _lvlm(args: argparse.Namespace) -> TransformersLVLM:
    from .lvlm.local import TransformersLVLM

    return TransformersLVLM.from_pretrained(
        args.lvlm,
        revision=args.lvlm_revision,
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
    )


def _settings(args: argparse.Namespace, **more: Any) -> Settings:
    from .experiment import Settings

    given = {
        "rounds": args.rounds,
        "candidates": args.candidates,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch,
        "list_size": args.list_size,
        "lora": args.lora or None,
        "seed": args.seed,
    }
    return Settings(**{name: value for name, value in (given | more).items() if value is not None})


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _demo(args: argparse.Namespace) -> None:
    from ._compat import require
    from .evaluation.report import format_table
    from .experiment import run_experiment
    from .playground import make_world

    require("matplotlib", "the demo's plots")
    require("bm25s", "the demo's BM25 baseline")
    lvlm, encoder = _lvlm(args), args.encoder
    tasks = TASKS if args.task == "all" else (args.task,)
    if args.data and len(tasks) > 1:
        raise ValueError("expected one --task with --data; 'all' is for the playground")
    results: dict[str, Any] = {}
    for task in tasks:
        facts: dict[str, Any] = {"world_seed": None, "command": "drum-hf " + " ".join(sys.argv[1:])}
        if args.data:
            support, queries = _tables(args)
            facts["data"] = args.data
        else:
            world = make_world(args.world_seed, task=task, difficulty=args.world)
            support, queries = world.support, world.queries
            facts |= {"world_seed": args.world_seed, "world": args.world}
        # with captions no row has the same answer; on a user's LVLM the exhaustive ranking would cost far too much
        oracle = "answer" if task != "captioning" else "none" if args.data else "score"
        settings = _settings(args, shots=args.shots, by_shots=args.by_shots, oracle=oracle)
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
    _write_json(args.json, content)
    sys.stdout.write(format_table(content) + "\n")
    for task in tasks:
        folder = args.out if len(tasks) == 1 else args.out / task
        sys.stdout.write(f"{task}: {folder / 'report.html'} · trained retriever: {folder / 'retriever'}\n")


def _train(args: argparse.Namespace) -> None:
    from .experiment import training_arguments
    from .retriever import DemoRetriever
    from .training import DrumTrainer

    support = _table(args.data, args)
    queries = _table(args.queries, args) if args.queries else None
    settings = _settings(args)
    retriever = DemoRetriever.from_encoder(
        args.encoder, support=support, strategy="sit+draft", lora=args.lora, device=args.device
    )
    arguments = training_arguments(
        args.out / "training",
        settings,
        args.out / "scores.sqlite",
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
    )
    trainer = DrumTrainer(
        retriever,
        lvlm=_lvlm(args),
        train_dataset=queries,
        args=arguments,
        choices=support.label_set if args.task == "classification" else (),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    retriever.save_pretrained(args.out / "retriever")
    sys.stdout.write(f"{retriever!r}\nsaved to {args.out / 'retriever'}; {len(trainer.table)} scored pairs\n")
    if args.push_to_hub:
        sys.stdout.write(f"uploaded: {retriever.push_to_hub(args.push_to_hub)}\n")


def _score(args: argparse.Namespace) -> None:
    from .experiment import plan_scores
    from .lvlm.store import ScoreStore
    from .retriever import DemoRetriever

    support = _table(args.data, args)
    if args.retriever:
        retriever = DemoRetriever.from_pretrained(args.retriever, support=support, device=args.device)
    else:
        retriever = DemoRetriever.from_encoder(args.encoder, support=support, strategy="sit+draft", device=args.device)
    with ScoreStore(args.store) as store:
        plan = plan_scores(
            retriever,
            _lvlm(args),
            queries=_table(args.queries, args) if args.queries else None,
            store=store,
            candidates=args.candidates,
            choices=support.label_set if args.task == "classification" else (),
            seed=args.seed,
        )
        sys.stdout.write(plan.describe() + "\n")
        if not args.dry_run:
            scores = plan.run()
            sys.stdout.write(f"{len(scores)} pairs scored; {len(store)} scores in {args.store}\n")


def _eval(args: argparse.Namespace) -> None:
    from .evaluation.report import format_table
    from .experiment import evaluate_strategies
    from .retriever import DemoRetriever

    retriever = DemoRetriever.from_pretrained(args.retriever, device=args.device) if args.retriever else None
    if args.data:
        support, queries = _tables(args)
    elif retriever is not None and args.queries:
        support, queries = retriever.support, _table(args.queries, args)
    else:
        raise ValueError("expected --data TABLE, or --retriever FOLDER with --queries TABLE; got neither")
    results = evaluate_strategies(
        support,
        queries,
        names=args.strategies.split(","),
        shots=args.shots,
        lvlm=_lvlm(args),
        encoder=args.encoder,
        retriever=retriever,
        task=args.task,
        metric=args.metric,
        store=args.store,
    )
    _write_json(args.json, results)
    sys.stdout.write(format_table(results) + "\n")


def _index(args: argparse.Namespace) -> None:
    from .retriever import DemoRetriever

    folder = Path(args.retriever)
    if args.data:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"expected a new or empty folder to build into; {folder} holds files. Use --add to extend it"
            )
        retriever = DemoRetriever.from_encoder(
            args.encoder,
            support=_table(args.data, args),
            strategy=args.strategy,
            index_kind=args.kind,
            device=args.device,
        )
        retriever.save_pretrained(folder)
    else:
        retriever = DemoRetriever.from_pretrained(args.retriever, device=args.device)
    if args.remove:
        retriever.remove(args.remove)
    if args.add:
        retriever.add(_table(args.add, args))
    if args.add or args.remove:
        retriever.save_pretrained(folder)
    weights = ", ".join(f"{part} {weight:.3f}" for part, weight in retriever.weights.items())
    sys.stdout.write(f"{retriever!r}\nweights: {weights}; {retriever.index.dimension} dimensions\n")


_COMMANDS = {"demo": _demo, "train": _train, "score": _score, "eval": _eval, "index": _index}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `drum-hf`; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if args.quiet:
        import os

        os.environ["TQDM_DISABLE"] = "1"
    try:
        _COMMANDS[args.command](args)
    except (DrumError, ValueError) as error:
        sys.stderr.write(f"drum-hf {args.command}: {type(error).__name__}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; what was scored is kept, run the same command again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
