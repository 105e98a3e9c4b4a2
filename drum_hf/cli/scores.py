"""`drum-hf scores`: look into a score store, carry its scores elsewhere, or clear out what is no longer wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.text import shown
from .options import default_to_no_lvlm, load_lvlm, model_options
from .push import hub_options

if TYPE_CHECKING:
    from ..scores.store import ScoreStore
    from ..scores.transfer import Exported

__all__ = ["add", "run"]

_WELCOME = "none: the store says which LVLMs' scores are welcome; one that is named is loaded and compared"


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb, its own verbs and their options."""
    parser = commands.add_parser(
        "scores", help="look into a score store; export, import, push or pull its scores; clear it out"
    )
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    stats = verbs.add_parser("stats", help="say what a store holds, by LVLM")
    stats.add_argument("store", type=Path, metavar="STORE")
    stats.add_argument("--json", action="store_true", help="as JSON, with all that is known of each LVLM")

    export = verbs.add_parser("export", help="write scores to a parquet file")
    export.add_argument("store", type=Path, metavar="STORE")
    export.add_argument("file", type=Path, metavar="FILE.parquet")
    export.add_argument("--fingerprint", nargs="+", metavar="F", help="only of these LVLMs; a beginning will do")
    export.add_argument("--lvlm", nargs="+", metavar="NAME", help="only of LVLMs recorded under these names")

    fetch = verbs.add_parser("import", help="take the scores of an exported file into a store")
    fetch.add_argument("file", type=Path, metavar="FILE.parquet")
    fetch.add_argument("store", type=Path, metavar="STORE")
    fetch.add_argument("--any-lvlm", action="store_true", help="also scores of LVLMs that the store has none of")
    model_options(fetch, encoder=False)
    default_to_no_lvlm(fetch, _WELCOME)

    push = verbs.add_parser("push", help="upload scores to a data set repository on the Hub")
    push.add_argument("store", type=Path, metavar="STORE")
    push.add_argument("repo", metavar="REPO", help="name or owner/name; made where it is missing")
    push.add_argument("--fingerprint", nargs="+", metavar="F", help="only of these LVLMs; a beginning will do")
    push.add_argument("--lvlm", nargs="+", metavar="NAME", help="only of LVLMs recorded under these names")
    hub_options(push)

    pull = verbs.add_parser("pull", help="take the scores of a data set repository on the Hub into a store")
    pull.add_argument("repo", metavar="REPO")
    pull.add_argument("store", type=Path, metavar="STORE")
    pull.add_argument("--any-lvlm", action="store_true", help="also scores of LVLMs that the store has none of")
    hub_options(pull, push=False)
    model_options(pull, encoder=False)
    default_to_no_lvlm(pull, _WELCOME)

    collect = verbs.add_parser("gc", help="remove scores that are no longer wanted, and give the room back")
    collect.add_argument("store", type=Path, metavar="STORE")
    which = collect.add_mutually_exclusive_group()
    which.add_argument("--keep", nargs="+", metavar="F", help="remove all LVLMs but these; a beginning will do")
    which.add_argument("--drop", nargs="+", metavar="F", help="remove these LVLMs; a beginning will do")
    collect.add_argument(
        "--data", nargs="+", metavar="TABLE", help="remove what was not scored on rows of these tables alone"
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    from ..scores.store import ScoreStore

    takes = args.verb in ("import", "pull")
    needed = args.file if args.verb == "import" else args.store  # opening a store that is not there makes an empty one
    if args.verb != "pull" and not needed.exists():
        raise ValueError(f"expected a file of scores, there is no {needed}")
    if takes and args.lvlm and args.any_lvlm:
        raise ValueError("expected --lvlm or --any-lvlm, got both")
    lvlm = load_lvlm(args) if takes and args.lvlm else None
    with ScoreStore(args.store) as store:
        if args.verb == "stats":
            _stats(store, args)
        elif args.verb == "export":
            _export(store, args)
        elif args.verb == "push":
            _push_scores(store, args)
        elif takes:
            _take(store, lvlm, args)
        else:
            _collect(store, args)


def _stats(store: ScoreStore, args: argparse.Namespace) -> None:
    stats, identities = store.stats(), store.identities()
    empty = {"scores": 0, "texts": 0}
    lvlms = [
        {"fingerprint": name, **stats["by_fingerprint"].get(name, empty), "lvlm": identity}
        for name, identity in identities.items()
    ]
    if args.json:
        content = {name: stats[name] for name in ("scores", "texts", "bytes")} | {"lvlms": lvlms}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    sys.stdout.write(f"{stats['scores']} scores, {stats['texts']} generations, {_size(stats['bytes'])}\n")
    for lvlm in lvlms:
        said = f"{shown(lvlm['fingerprint'])}  {lvlm['scores']} scores, {lvlm['texts']} generations"
        sys.stdout.write(f"{said}  {_title(lvlm['lvlm'])}\n")


def _export(store: ScoreStore, args: argparse.Namespace) -> None:
    from ..scores.transfer import export_scores
    from ..utils.manifest import manifest_beside

    chosen = _chosen(store, args)
    done = export_scores(store, args.file, fingerprints=chosen, progress=True)
    manifest_beside(args.file, settings={"fingerprints": sorted(chosen or store.identities())})
    _say(done, str(args.file))


def _push_scores(store: ScoreStore, args: argparse.Namespace) -> None:
    from ..scores.transfer import push_scores

    url, done = push_scores(
        store,
        args.repo,
        fingerprints=_chosen(store, args),
        private=args.private,
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
        progress=True,
    )
    _say(done, url)


def _chosen(store: ScoreStore, args: argparse.Namespace) -> list[str] | None:
    """Fingerprints of the LVLMs that --fingerprint and --lvlm name; None: all."""
    chosen: list[str] | None = None
    if args.fingerprint or args.lvlm:
        identities = store.identities()
        chosen = _named(identities, args.fingerprint or ()) if args.fingerprint else []
        for name in args.lvlm or ():
            found = [each for each, identity in identities.items() if identity and identity.get("name") == name]
            if not found:
                names = sorted({str(identity["name"]) for identity in identities.values() if identity})
                known = shown(", ".join(names))
                raise ValueError(f"{store.path} has no scores recorded under {name!r}; it has {known}")
            chosen += found
        chosen = list(dict.fromkeys(chosen))
    return chosen


def _say(done: Exported, where: str) -> None:
    sys.stdout.write(f"{done.scores} scores and {done.texts} generations in {where}, {_size(done.bytes)}\n")
    if done.left_out:
        sys.stdout.write(f"{done.left_out} left out: the store does not know what they are made of\n")


def _take(store: ScoreStore, lvlm: Any, args: argparse.Namespace) -> None:
    how: dict[str, Any] = {"lvlm": lvlm, "any_lvlm": args.any_lvlm, "progress": True}
    if args.verb == "pull":
        from ..scores.transfer import pull_scores

        merged = pull_scores(args.repo, store, revision=args.revision, **how)
    else:
        from ..scores.transfer import import_scores

        merged = import_scores(args.file, store, **how)
    sys.stdout.write(f"{merged.new} new, {merged.known} known before, in {store.path}\n")
    if merged.conflicts:
        sys.stdout.write(
            f"{merged.conflicts} of the known ones differ from the file's (by more than 0.001, or in their text); "
            "the store's were kept\n"
        )


def _collect(store: ScoreStore, args: argparse.Namespace) -> None:
    from ..data import load_table

    identities = store.identities()
    contents: set[str] = set()
    for path in args.data or ():
        table = load_table(path)
        contents |= {*table.keys, *table.query_keys}
    done = store.collect(
        keep=_named(identities, args.keep or ()),
        drop=_named(identities, args.drop or ()),
        contents=contents,
        dry_run=args.dry_run,
    )
    verb, about = ("would be removed", "about ") if args.dry_run else ("removed", "")
    sys.stdout.write(
        f"{done.scores} scores and {done.texts} generations {verb}, {about}{_size(done.bytes)}; {done.kept} kept\n"
    )
    if done.unknown:
        sys.stdout.write(f"{done.unknown} of these were kept since it is not known what they are made of\n")


def _named(identities: Mapping[str, Any], beginnings: Collection[str]) -> list[str]:
    """The fingerprints that begin so, each beginning telling one."""
    chosen = []
    for beginning in beginnings:
        found = [name for name in identities if name.startswith(beginning)]
        if beginning in found:
            found = [beginning]
        if len(found) != 1:
            raise ValueError(
                f"expected one fingerprint that begins with {beginning!r}, got {len(found)}; the store has "
                f"{shown(', '.join(identities)) or 'none'}"
            )
        chosen += found
    return chosen


def _title(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "(not recorded which LVLM)"
    revision = identity.get("revision")
    return " ".join(
        shown(part, most=100)
        for part in (identity.get("name"), f"@{str(revision)[:8]}" if revision else None, identity.get("dtype"))
        if part
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if abs(count) >= 1e6 else f"{count / 1e3:.1f} kB"
