"""`drum-hf push`: upload a saved retriever to the Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["add", "hub_options", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb and its options."""
    parser = commands.add_parser("push", help="upload a saved retriever to the Hub")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what drum-hf train or index wrote")
    parser.add_argument("repo", metavar="REPO", help="name or owner/name; made where it is missing")
    parser.add_argument(
        "--form",
        choices=("adapter", "full"),
        help="the LoRA adapter alone, or the whole encoder (default: the adapter, where there is one whose base model "
        "is not a folder of this machine)",
    )
    parser.add_argument("--no-support", action="store_true", help="leave the demonstrations out")
    parser.add_argument("--no-index", action="store_true", help="leave the vectors out")
    parser.add_argument(
        "--images",
        choices=("embedded", "reference"),
        default="embedded",
        help="with the demonstrations, or named alone (default: %(default)s)",
    )
    parser.add_argument("--image-root", metavar="DIR", help="where the images lie, if the folder names them alone")
    parser.add_argument("--license", help="of the repository, its data included, such as cc-by-4.0: for the card")
    parser.add_argument("--base-model", help="where a LoRA encoder's base model lies, if not where it did")
    hub_options(parser)
    parser.set_defaults(run=run)


def hub_options(parser: argparse.ArgumentParser, *, push: bool = True) -> None:
    """Options of whatever goes to the Hub, or comes from there; the token is that of `hf auth login` or HF_TOKEN."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help="branch" if push else "branch, tag or commit")
    if push:
        group.add_argument("--private", action="store_true", default=None, help="make a new repository private")
        group.add_argument("--commit-message", metavar="TEXT")
        group.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..retriever.retriever import DemoRetriever

    if not args.folder.is_dir():
        raise ValueError(f"expected the folder of a saved retriever, there is no {args.folder}")
    retriever = DemoRetriever.from_pretrained(args.folder, base_model=args.base_model, image_root=args.image_root)
    if args.license:
        retriever.card_data = {**retriever.card_data, "license": args.license}
    url = retriever.push_to_hub(
        args.repo,
        form=args.form,
        include_support=not args.no_support,
        include_index=not args.no_index,
        images=args.images,
        image_root=args.image_root,
        private=args.private,
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    sys.stdout.write(f"uploaded: {url}\n")
