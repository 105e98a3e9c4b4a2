"""`drum-hf train`: train a retriever."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SavedFileError
from .options import (
    TRAINING_QUERIES,
    data_options,
    encoder_dtype_option,
    load_lvlm,
    make_settings,
    model_options,
    read_queries,
    read_table,
    training_options,
)
from .processes import joined

if TYPE_CHECKING:
    from ..training import DrumTrainer
    from ..types import LVLM

__all__ = ["add", "run"]

#: Options that do not change what comes out; what the tables hold counts, not where they lie.
_OUTSIDE = {
    "run",
    "command",
    "quiet",
    "out",
    "data",
    "queries",
    "split",
    "query_split",
    "columns",
    "image_root",
    "restart",
    "dry_run",
    "push_to_hub",
    "device",
}
#: In the training's folder: the checksum of the retriever's configuration as it was saved.
_SAVED = "saved_retriever.json"
_SILENT = _OUTSIDE | {"api_key_env", "concurrency", "max_requests", "max_tokens", "image_cache_dir"}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("train", help="train a retriever for your LVLM and data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the retriever, checkpoints and score store")
    parser.add_argument("--restart", action="store_true", help="forget the checkpoints in --out; scores are kept")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what the LVLM will have to score in all rounds, and how long that takes, from a few pairs that "
        "are scored and kept",
    )
    parser.add_argument(
        "--cascade",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="have the LVLM score this share of the pairs, the best by a cheaper one, and estimate the rest; see "
        "docs/scoring.md for what that costs (default: %(default)s, all of them)",
    )
    parser.add_argument(
        "--cheap-lvlm",
        help="the cheaper one: folder or Hub id; by default the LVLM with a quarter of its image tokens",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the trained retriever")
    data_options(parser, required=True, queries=TRAINING_QUERIES, metric=False)
    model_options(parser)
    encoder_dtype_option(parser)
    training_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    with joined() as processes:
        from transformers import set_seed

        from ..experiments.demo import PIPELINES, training_arguments
        from ..retriever.retriever import DemoRetriever
        from ..retriever.saving import CONFIG
        from ..training import DrumTrainer
        from ..training.checkpoints import same_run, write_note
        from ..utils.files import checksum
        from ..utils.manifest import write_manifest

        support = read_table(args.data, args, split=args.split)
        queries = read_queries(args)
        saved = args.out / "retriever"
        processes.from_main(lambda: _refuse_changed(saved, args.out / "training" / _SAVED, support.fingerprint))
        settings = make_settings(args)
        arguments = training_arguments(
            args.out / "training",
            settings,
            args.out / "scores.sqlite",
            save_strategy="epoch",
            save_total_limit=2,
            logging_strategy="epoch",
            cascade_keep=args.cascade,
        )
        set_seed(settings.seed)  # adapters start at random
        retriever = DemoRetriever.from_encoder(
            args.encoder,
            support=support,
            strategy="sit+draft",
            lora=args.lora,
            dtype=args.encoder_dtype,
            device=args.device,
        )
        lvlm, cheap = load_lvlm(args), None
        if args.cascade < 1.0:
            cheap = load_lvlm(args, args.cheap_lvlm) if args.cheap_lvlm else _quarter(lvlm)
        trainer = DrumTrainer(
            retriever,
            lvlm=lvlm,
            cheap_lvlm=cheap,
            train_dataset=queries,
            args=arguments,
            choices=support.label_set if args.task == "classification" else (),
        )
        if args.quiet:
            from transformers import PrinterCallback, ProgressCallback

            for telling in (PrinterCallback, ProgressCallback):  # both write each log to the screen
                trainer.remove_callback(telling)
        if args.dry_run:
            plan = trainer.plan()
            if processes.is_main:
                sys.stdout.write(f"{plan.describe()}\n")
            return
        note = _settings(args, trainer)
        found = processes.from_main(lambda: same_run(args.out / "training", note, anew=args.restart))
        trainer.train(None if found is None else str(found))
        if not processes.is_main:
            return
        retriever.teacher = {**(retriever.teacher or {}), "task": PIPELINES[args.task]}
        note_of_saved = args.out / "training" / _SAVED
        note_of_saved.unlink(missing_ok=True)  # killed from here on, the support set's fingerprint decides
        retriever.save_pretrained(saved)
        write_note(note_of_saved, {"config": checksum(saved / CONFIG)})
        data = {"support": support.fingerprint} | ({"queries": queries.fingerprint} if queries else {})
        write_manifest(args.out, seed=settings.seed, data=data, lvlm=lvlm, settings=dataclasses.asdict(settings))
        sys.stdout.write(f"{retriever!r}\nsaved to {saved}; {len(trainer.table)} scored pairs\n")
        if args.push_to_hub:
            sys.stdout.write(f"uploaded: {retriever.push_to_hub(args.push_to_hub)}\n")


def _refuse_changed(folder: Path, note: Path, support: str) -> None:
    """Refuse to train where the retriever of an earlier run was changed since, such as by rows that were added.

    Args:
        folder: of that retriever.
        note: what the run wrote about it once it was saved.
        support: fingerprint of the support set; a run that was killed before its note had the same one.

    Raises:
        SavedFileError: it was changed, and training would overwrite it.
    """
    from ..retriever.saving import CONFIG, read_config
    from ..training.checkpoints import read_note
    from ..utils.files import checksum

    if not (folder / CONFIG).exists():
        return
    known = read_note(note)
    if known is None:
        same = read_config(folder)["support"]["fingerprint"] == support
    else:
        same = known.get("config") == checksum(folder / CONFIG)
    if not same:
        raise SavedFileError(
            f"expected the retriever in {folder} as a training left it; it was changed since (rows added, for "
            "example), and training would overwrite it. Give another --out, or move that folder away first: scores "
            "and checkpoints stay"
        )


def _settings(args: argparse.Namespace, trainer: DrumTrainer) -> dict[str, Any]:
    """All that the outcome of the command depends on."""
    given = {name: value for name, value in vars(args).items() if name not in _SILENT}
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "support": trainer.retriever.support.fingerprint,
        "training queries": [trainer.queries.fingerprint, trainer.queries.gold_fingerprint],
        "LVLM": trainer.feedback.lvlm.fingerprint,
    }


def _quarter(lvlm: LVLM) -> LVLM:
    fewer = getattr(lvlm, "with_fewer_image_tokens", None)
    if fewer is None:
        raise ValueError("an endpoint can't show fewer image tokens; give a smaller LVLM by --cheap-lvlm")
    return fewer(4)
