"""`drum-hf data`: look at a table before anything is paid for it, and at the public data sets known by name."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import TYPE_CHECKING, Any

from ..utils.text import shown as escaped
from .options import column_options, group_of, image_check, load_images_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data import Source, TableReport

__all__ = ["add", "run"]

#: Characters of a line that are shown; our choice.
_LONGEST = 2_000


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb, its own verbs and their options."""
    parser = commands.add_parser("data", help="check a table row by row; list the public data sets known by name")
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    check = verbs.add_parser("check", help="say what a table holds and what is wrong with it; status 1 if anything is")
    check.add_argument("path", metavar="PATH", help="whatever --data of the other verbs takes")
    check.add_argument("--split", help="which split, where there are several")
    column_options(check)
    check.add_argument("--lvlm", metavar="NAME", help="ask this LVLM's processor, too: what it refuses, what it shows")
    check.add_argument("--source", metavar="NAME", help="PATH is a copy of this public data set")
    check.add_argument("--limit", type=int, help="with --source: the first so many rows")
    check.add_argument("--show", type=int, default=20, help="bad rows told, at most (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="as JSON, with every bad row")

    known = verbs.add_parser("list", help="the public data sets known by name, and what they would download")
    known.add_argument("names", nargs="*", metavar="NAME", help="only these")
    known.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry it out; 1 where a table has problems."""
    return _check(args) if args.verb == "check" else _list(args)


def _check(args: argparse.Namespace) -> int:
    import dataclasses

    from ..data import check_table

    processor = None if args.lvlm is None else load_images_of(args.lvlm, args)
    report = check_table(
        args.path,
        source=args.source,
        split=args.split,
        columns=dict(args.columns or ()),
        group=group_of(args),
        image_root=args.image_root,
        limit=args.limit,
        check_image=None if processor is None else image_check(lambda: processor),
    )
    if args.json:
        bad = [{"row": row, "problem": problem} for row, problem in report.bad_rows]
        content = dataclasses.asdict(report) | {"bad_rows": bad, "ok": report.ok}
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    else:
        shown = None if processor is None else functools.partial(_as_chat, processor)
        sys.stdout.write("\n".join(escaped(line, most=_LONGEST) for line in _told(report, args.show, shown)) + "\n")
    return 0 if report.ok else 1


def _as_chat(processor: Any, row: dict[str, str]) -> str:
    """A row as a demonstration in the LVLM's own chat template."""
    parts: list[dict[str, Any]] = [{"type": "image"}] if row["image"] else []
    parts += [{"type": "text", "text": row["prompt"]}] if row["prompt"] else []
    answer = [{"type": "text", "text": row["response"]}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return str(processor.apply_chat_template(turns, tokenize=False))


def _cut(text: str, most: int = 200) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}…"


def _told(report: TableReport, show: int, shown: Callable[[dict[str, str]], str] | None) -> list[str]:
    lines = [f"{report.path}: {report.kind or 'not readable'}"]
    if report.columns:
        lines.append("columns: " + ", ".join(_renamed(*pair) for pair in report.columns.items()))
    if report.unused:
        lines.append(f"not used: {', '.join(report.unused)}")
    if report.rows:
        several = f", {report.references} rows with several gold answers" if report.references else ""
        counts = f"{report.images} images, {report.groups} groups, {report.labels} labels{several}"
        lines.append(f"{report.rows} rows to use, {counts}")
    for count, what in ((report.without_image, "an image"), (report.without_prompt, "a prompt")):
        if count:
            lines.append(f"{count} of them without {what}")
    for one in report.examples:
        image = f"[image {one['image']}] " if one["image"] else ""
        lines.append(f"  {one['id']}: {image}{_cut(one['prompt'])} -> {_cut(one['response'])}")
        if shown is not None:
            lines.append(f"    {_cut(shown(one), 1000)}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"problem: {problem}" for problem in report.problems]
    if report.bad_rows:
        lines.append(f"{len(report.bad_rows)} rows that can't be used (counted from 0):")
        lines += [f"  row {row}: {problem}" for row, problem in report.bad_rows[:show]]
        if len(report.bad_rows) > show:
            lines.append(f"  and {len(report.bad_rows) - show} more; --show N or --json tells them")
    if report.ok:
        return [*lines, "all well"]
    skip = report.bad_rows and not report.problems
    return [*lines, "correct these, or leave them out with --skip-bad-rows" if skip else "correct this first"]


def _renamed(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"{ours} (from {theirs})"


def _list(args: argparse.Namespace) -> int:
    from ..data import SOURCES, find_source

    sources = [find_source(name) for name in args.names] or list(SOURCES.values())
    if args.json:
        sys.stdout.write(json.dumps([_facts(source) for source in sources], indent=1, ensure_ascii=False) + "\n")
        return 0
    for source in sources:
        sys.stdout.write(f"{source.name}: {source.title}, {source.task}, {source.metric}; {source.licence}\n")
        sys.stdout.write(f"  prompt: {source.prompt}\n")
        for side in ("support", "query"):
            part = source.part(side)
            size = "size not known" if part.size is None else f"{part.size / 1e9:.1f} GB"
            rows = "" if part.rows is None else f"{part.rows} rows, "
            at = f" at {part.revision}" if part.revision else ""
            sys.stdout.write(f"  {side}: {part.repo}{at}, {part.download['files']} ({rows}{size})\n")
    return 0


def _facts(source: Source) -> dict[str, Any]:
    names = ("name", "title", "task", "metric", "prompt", "licence")
    facts: dict[str, Any] = {name: getattr(source, name) for name in names}
    for side in ("support", "query"):
        part = source.part(side)
        facts[side] = part.download | {"split": part.split, "columns": dict(part.columns)}
    return facts
