"""The documentation says what is there: links, pages, commands, imports and examples of every page."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

import drum_hf
from drum_hf.cli import _parser

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
WRITTEN = sorted(DOCS.glob("*.md"))
PAGES = [*WRITTEN, *(TOP / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md"))]
PAGES.append(TOP / "examples" / "README.md")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    """As both GitHub and the site make them of headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"\w+:", target):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.is_file(), f"{page.name}: {target}"
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def listed(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in listed(part)]


def test_every_page_is_in_the_navigation_once():
    nav = listed(yaml.safe_load((TOP / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    examples = {f"examples/{path.stem}.md" for path in (TOP / "examples").glob("*.py")}
    project = {"index.md", "contributing.md", "changelog.md", "releasing.md", "security-policy.md", "examples.md"}
    assert sorted(nav) == sorted(written | examples | project)


def test_every_public_name_is_in_the_reference():
    """By its own identifier, or as what its module exports."""
    identifiers: set[str] = set()
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, rest in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, flags=re.MULTILINE):
            chosen = re.search(r"members: \[(.*)\]", rest)
            identifiers.add(name)
            with contextlib.suppress(ModuleNotFoundError):
                exported = getattr(importlib.import_module(name), "__all__", ())
                identifiers |= {f"{name}.{part}" for part in (chosen[1].split(", ") if chosen else exported)}
    for name in set(drum_hf.__all__) - {"__version__"}:
        defined = getattr(getattr(drum_hf, name), "__module__", drum_hf._MODULES[name])
        where = {f"drum_hf.{name}", f"drum_hf.{drum_hf._MODULES[name]}.{name}", f"{defined}.{name}"}
        assert where & identifiers, f"{name} is not in docs/reference"
    for room in ("data", "selection", "training", "tuning", "playground"):
        for name in importlib.import_module(f"drum_hf.{room}").__all__:
            assert f"drum_hf.{room}.{name}" in identifiers, f"drum_hf.{room}.{name} is not in docs/reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python_and_imports_what_there_is(page):
    for code in blocks(page, "python"):
        if code.startswith(">>>"):
            code = doctest.script_from_examples(code)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drum_hf"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"


@pytest.mark.parametrize("page", [p for p in WRITTEN if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_doctests(page):
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    parts = [block for block in blocks(page, "python", "pycon") if ">>> " in block]
    test = doctest.DocTestParser().get_doctest("\n".join(parts), {}, page.name, str(page), 0)
    runner.run(test, out=said.write)
    assert runner.failures == 0 and runner.tries > 0, said.getvalue()


def commands(page: Path) -> list[list[str]]:
    """Every `drum-hf` command of a page that can be typed as it stands."""
    found = []
    typed = [block.replace("\\\n", " ").splitlines() for block in blocks(page, "bash")]
    for block in blocks(page, "console"):
        typed.append([line[2:] for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")])
    for lines in typed:
        for line in map(str.strip, lines):
            if line.startswith("drum-hf ") and not set("…|[") & set(line.split("#")[0]):
                found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_are_those_of_the_command_line(page, capsys):
    for words in commands(page):
        try:
            _parser().parse_args(words)
        except SystemExit as stop:
            assert stop.code == 0, f"{page.name}: drum-hf {shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", ["quickstart.md", "choose-an-lvlm.md"])
def test_pages_that_promise_to_run_do(name, tmp_path, monkeypatch, capsys):
    """Their Python, from top to bottom, as it stands."""
    monkeypatch.chdir(tmp_path)
    left: dict = {}
    for code in blocks(DOCS / name, "python"):
        exec(compile(code, name, "exec"), left)
    said = capsys.readouterr().out
    if name == "quickstart.md":
        assert left["drum"].mean > left["random"].mean + 0.4
        assert "zero-shot 0.00" in said
    else:
        assert "shared_prefix yes" in said and "tokens of context" in said
