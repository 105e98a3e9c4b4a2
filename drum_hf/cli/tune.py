"""`drum-hf tune`: teach an LVLM to use demonstrations."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from .options import write_json
from .processes import joined

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser(
        "tune", help="tune an LVLM on in-context conversations, so that it uses demonstrations"
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="YAML",
        help="LVLM, sources, mix and arguments; docs/icl-tuning.md",
    )
    parser.add_argument("--out", type=Path, default=Path("icl-tuning"), help="folder of the result (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="forget the checkpoints in --out")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what the mix is made of, how many tokens it has, and whether every conversation fits",
    )
    parser.add_argument("--merged", action="store_true", help="write whole models, with the adapter in their weights")
    parser.add_argument("--device", choices=("cpu",), help="cpu, where a GPU would be used")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the mix's make-up and the losses")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    with joined() as processes, tempfile.TemporaryDirectory() as nowhere:
        from ..training.checkpoints import same_run
        from ..tuning import ICLTuner, TuningConfig
        from ..tuning.sampling import Mixed
        from ..utils.manifest import write_manifest

        config = TuningConfig.load(args.config)
        more = {"hub_model_id": args.push_to_hub} if args.push_to_hub else {}
        more |= {"use_cpu": True} if args.device == "cpu" else {}
        # The platform makes the folder at once; a dry run leaves none behind.
        arguments = config.arguments(Path(nowhere) if args.dry_run else args.out / "training", **more)
        mix, test = config.mixes()
        held = None if test is None or config.evaluation is None else Mixed(test, config.evaluation.conversations)
        tuner = ICLTuner(
            config.model,
            arguments,
            train_dataset=mix,
            eval_dataset=held,
            revision=config.revision,
            dtype=config.dtype,
        )
        found = tuner.check()
        if processes.is_main:
            sys.stdout.write(f"{found}\n")
        if args.dry_run:
            write_json(args.json if processes.is_main else None, {"data": found.to_dict()})
            return
        before = tuner.evaluate() if tuner.eval_dataset is not None else {}
        note = {
            "configuration": args.config.read_text(encoding="utf-8"),
            "data": found.to_dict(),
            "lengths": found.lengths,
        }
        last = processes.from_main(lambda: same_run(args.out / "training", note, anew=args.restart))
        output = tuner.train(None if last is None else str(last))
        after = tuner.evaluate() if tuner.eval_dataset is not None else {}
        if not processes.is_main:
            return
        tuner.save_pretrained(args.out, merged=args.merged)
        about: dict[str, Any] = {
            "seed": config.seed,
            "data": {
                "configuration": hashlib.sha256(args.config.read_bytes()).hexdigest()[:32],
                "mix": found.report.to_dict(),
            },
            "lvlm": {"name": tuner.base_model, "revision": tuner.base_revision},
            "settings": dict(config.tuning),
        }
        write_manifest(args.out, **about)
        losses = {
            "train": output.training_loss,
            "eval_before": before.get("eval_loss"),
            "eval": after.get("eval_loss"),
        }
        write_json(args.json, {"data": found.to_dict(), "loss": losses, "steps": output.global_step}, **about)
        sys.stdout.write(f"tuned for {output.global_step} steps; loss {output.training_loss:.4f}\n")
        if after:
            sys.stdout.write(f"held out: loss {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after\n")
        sys.stdout.write(f"saved to {args.out}\n")
        if args.push_to_hub:
            sys.stdout.write(f"uploaded: {tuner.push_to_hub(merged=args.merged)}\n")
