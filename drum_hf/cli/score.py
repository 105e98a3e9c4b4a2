"""`drum-hf score`: buy the LVLM's scores ahead of training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import (
    TRAINING_QUERIES,
    data_options,
    encoder_dtype_option,
    load_lvlm,
    model_options,
    read_queries,
    read_table,
)
from .processes import joined

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("score", help="buy the LVLM's scores of candidates ahead of training")
    parser.add_argument("--store", type=Path, required=True, help="SQLite file that keeps the scores")
    parser.add_argument("--retriever", help="trained retriever that proposes; by default the untrained encoder")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say how many pairs, tokens and images are new, and how long they take, from a few pairs that are "
        "scored and kept",
    )
    data_options(parser, required=True, queries=TRAINING_QUERIES, metric=False)
    model_options(parser)
    encoder_dtype_option(parser)
    parser.add_argument("--candidates", type=int, default=10, help="pairs for each query (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    with joined() as processes:
        from ..retriever.retriever import DemoRetriever
        from ..scores.store import ScoreStore
        from ..training.pricing import CALIBRATION, plan_scores
        from ..utils.manifest import manifest_beside
        from ..utils.optional import public_name
        from .options import describe_images

        support = read_table(args.data, args, split=args.split)
        if args.retriever:
            retriever = DemoRetriever.from_pretrained(args.retriever, support=support, device=args.device)
        else:
            retriever = DemoRetriever.from_encoder(
                args.encoder,
                support=support,
                strategy="sit+draft",
                dtype=args.encoder_dtype,
                device=args.device,
            )
        queries = read_queries(args)
        lvlm = load_lvlm(args)
        with ScoreStore(args.store) as store:
            plan = plan_scores(
                retriever,
                lvlm,
                queries=queries,
                store=store,
                candidates=args.candidates,
                choices=support.label_set if args.task == "classification" else (),
                seed=args.seed,
                calibrate=CALIBRATION if args.dry_run else 0,  # see DrumTrainer.mine
                write_drafts=not args.dry_run,
                processes=processes,
            )
            if processes.is_main:
                sys.stdout.write(plan.describe() + "\n")
                if args.dry_run:
                    sys.stdout.write(describe_images(lvlm, support))
                sys.stdout.flush()
            if args.dry_run:
                return
            scores = plan.run()
            if processes.is_main:
                data = {"support": support.fingerprint, "queries": (queries or support).fingerprint}
                settings = {
                    "candidates": args.candidates,
                    "encoder": public_name(retriever.base_model),
                    "task": args.task,
                }
                manifest_beside(args.store, seed=args.seed, data=data, lvlm=lvlm, settings=settings)
                sys.stdout.write(f"{len(scores)} pairs scored; {len(store)} scores in {args.store}\n")
