"""The layout of the package: which room imports from which, file by file, and no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house import PACKAGE, ROOMS, WORKSHOP, cycles, imports, sources

TOP = ("", "errors", "types")


def faults(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that go up the list of rooms, into another room's private names, or into the workshop."""
    found = []
    for name, tree in trees.items():
        room = name.partition(".")[0]
        for line, module in imports(name, tree, trees):
            there = module.partition(".")[0]
            where = f"{name or 'drum_hf'}:{line} imports {module or 'drum_hf'}"
            if not room or there == room:
                continue
            if not there or ROOMS.index(there) > ROOMS.index(room):
                found.append(f"{where}: {there or 'the package'} is not above {room}")
            elif any(f"{module}.".startswith(f"{part}.") for part in WORKSHOP) and room not in ("cli", "experiments"):
                found.append(f"{where}: only the command line imports the workshop")
    return found


def test_a_room_imports_only_from_rooms_above_it():
    assert faults(sources()) == []


def test_no_files_import_one_another():
    assert cycles(sources()) == []


def test_every_import_leads_to_a_file():
    trees = sources()
    lost = [(name, line, to) for name in trees for line, to in imports(name, trees[name], trees) if to not in trees]
    assert lost == []


def test_rooms():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("_")}
    assert there - {"py"} <= set(ROOMS) and len(there - set(TOP)) <= 20
    assert {path.name for path in PACKAGE.glob("*") if path.is_file()} == {
        "__init__.py", "errors.py", "types.py", "py.typed"
    }  # fmt: skip


def test_the_package_imports_nothing_until_it_is_asked():
    (tree,) = (tree for name, tree in sources().items() if not name)
    lazy = [node for node in tree.body if isinstance(node, ast.If)]
    eager = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert len(lazy) == 1 and eager == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("index.flat", "from ..errors import DrumError", None),
        ("index.flat", "from ..retriever import DemoRetriever", "retriever is not above index"),
        ("index.flat", "def f():\n    from ..retriever.saving import write", "retriever is not above index"),
        ("index.flat", "if TYPE_CHECKING:\n    from ..retriever import DemoRetriever", "retriever is not above index"),
        ("index.flat", "import drum_hf.cli", "cli is not above index"),
        ("index.flat", "from drum_hf import pipeline", "the package is not above index"),
        ("index.flat", "from . import lock", None),
        ("cli.demo", "from ..experiments.bench import score", None),
        ("playground.worlds", "from ..experiments.bench import score", "only the command line"),
    ],
)
def test_the_order_is_really_checked(module, source, fault):
    names = ("", "errors", "index", "index.lock", "retriever", "retriever.saving", "cli", "experiments.bench")
    trees = {name: ast.parse("") for name in (*names, "playground", "experiments", "experiments.bench.score")}
    found = faults(trees | {module: ast.parse(source)})
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]


def test_a_cycle_is_really_found():
    one = "if TYPE_CHECKING:\n    from .two import b"
    trees = {"": ast.parse(""), "x": ast.parse(""), "x.one": ast.parse(one)}
    trees["x.two"] = ast.parse("def f():\n    from ..y import three")
    trees |= {"y": ast.parse(""), "y.three": ast.parse("from ..x import one")}
    assert cycles(trees) == [{"x.one", "x.two", "y.three"}]


def test_the_figures_can_be_printed():
    assert Path(PACKAGE, "py.typed").is_file() and len(sources()) > 50
