"""`drum-hf train`: train a retriever."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._processes import joined
from .options import data_options, load_lvlm, make_settings, model_options, read_table, training_options

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("train", help="train a retriever for your LVLM and data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the retriever, checkpoints and score store")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what the LVLM will have to score in all rounds, and how long that takes, from a few pairs that "
        "are scored and kept",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the trained retriever")
    data_options(parser, required=True)
    model_options(parser)
    training_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    with joined() as processes:
        from ..experiment import training_arguments
        from ..retriever import DemoRetriever
        from ..training import DrumTrainer

        support = read_table(args.data, args)
        queries = read_table(args.queries, args) if args.queries else None
        settings = make_settings(args)
        arguments = training_arguments(
            args.out / "training",
            settings,
            args.out / "scores.sqlite",
            save_strategy="epoch",
            save_total_limit=2,
            logging_strategy="epoch",
        )
        retriever = DemoRetriever.from_encoder(
            args.encoder, support=support, strategy="sit+draft", lora=args.lora, device=args.device
        )
        trainer = DrumTrainer(
            retriever,
            lvlm=load_lvlm(args),
            train_dataset=queries,
            args=arguments,
            choices=support.label_set if args.task == "classification" else (),
        )
        if args.dry_run:
            plan = trainer.plan()
            if processes.is_main:
                sys.stdout.write(f"{plan.describe()}\n")
            return
        trainer.train(resume_from_checkpoint=args.resume or None)
        if not processes.is_main:
            return
        retriever.save_pretrained(args.out / "retriever")
        sys.stdout.write(f"{retriever!r}\nsaved to {args.out / 'retriever'}; {len(trainer.table)} scored pairs\n")
        if args.push_to_hub:
            sys.stdout.write(f"uploaded: {retriever.push_to_hub(args.push_to_hub)}\n")
