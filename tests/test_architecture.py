"""The house rules that no unit test sees: which room imports from which, and what no module does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import drum_hf

PACKAGE = Path(drum_hf.__file__).parent

#: Data flows down this list: a room imports only from rooms above it.
ROOMS = (
    "errors",
    "types",
    "_compat",
    "_hub",
    "manifest",
    "model_card",
    "_files",
    "data",
    "adapters",
    "encoder",
    "index",
    "lvlm",
    "selection",
    "retriever",
    "training",
    "tuning",
    "evaluation",
    "playground",
    "experiment",
    "suite",
    "bench",
    "pipelines",
    "app",
    "cli",
)
#: Modules that are a part of a room, though they lie beside it.
PARTS = {
    "_index_faiss": "index",
    "_index_files": "index",
    "_index_gpu": "index",
    "sharded_index": "index",
    "_index_lock": "index",
    "_queries": "retriever",
    "_saved": "retriever",
    "_sharing": "retriever",
    "_swapping": "retriever",
    "_pipeline_inputs": "pipelines",
    "_pipeline_models": "pipelines",
}
#: Rooms that import less than the list lets them.
NARROWER = {
    "model_card": set(),
    "playground": {"errors", "types", "_compat", "_files", "data", "lvlm", "tuning", "evaluation"},
}
#: Who may import the playground, which nothing but a demonstration of the library needs.
PLAYGROUND_VISITORS = {"experiment", "suite", "bench", "cli"}

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def sources(package: Path) -> dict[str, ast.Module]:
    """Dotted name within the package -> its syntax tree; "" is the package itself."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def is_for_types(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)) == "TYPE_CHECKING"


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, function bodies included, but not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield child
            yield from run_time_nodes(child)


def imports(name: str, trees: dict[str, ast.Module], package: str) -> Iterator[tuple[str, str, int]]:
    """(module of the package, name taken from it or "", line) of all that a module imports from its package."""
    is_package = name == "" or any(other.startswith(f"{name}.") for other in trees)
    here = [package, *name.split(".")] if name else [package]
    for node in run_time_nodes(trees[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.name.partition(".")[2], "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] != [package]:
                continue
            module = ".".join(full[1:])
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield (inner, "", node.lineno) if inner in trees else (module, alias.name, node.lineno)


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return PARTS.get(first, first)


def is_private(module: str) -> bool:
    return module not in ROOMS and any(part.startswith("_") for part in module.split("."))


def import_faults(package: Path) -> list[str]:
    trees = sources(package)
    faults = []
    for name in trees:
        room = room_of(name)
        if room and room not in ROOMS:
            faults.append(f"{name}: it belongs to no room")
            continue
        for target, taken, line in imports(name, trees, package.name):
            where, there = f"{name or package.name}:{line} imports {f'{target} {taken}'.strip()}", room_of(target)
            if not room:
                faults.append(f"{where}: the package itself imports nothing until it is asked")
            elif not target:
                faults.append(f"{where}: a room imports from rooms, not from the package, which is all of them")
            elif there != room:
                allowed = NARROWER.get(room, set(ROOMS[: ROOMS.index(room)]))
                if there not in allowed:
                    faults.append(f"{where}: {there} is not above {room}")
                elif there == "playground" and room not in PLAYGROUND_VISITORS:
                    faults.append(f"{where}: the playground is not a part of the library")
                elif is_private(target) or taken.startswith("_"):
                    faults.append(f"{where}: it is {there}'s own")
        for node in run_time_nodes(trees[name]):
            called = node.func if isinstance(node, ast.Call) else None
            if (
                getattr(called, "attr", getattr(called, "id", None)) in ("import_module", "__import__")
                and name
                and name != "_compat"
            ):
                faults.append(f"{name}:{node.lineno}: an import that this test can't see")
    return faults


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def says(node: ast.AST | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def calls_remote_code(node: ast.AST) -> bool:
    """Whether `trust_remote_code` is true here, whatever the user says."""
    if isinstance(node, ast.keyword):
        return node.arg == "trust_remote_code" and is_true(node.value)
    if isinstance(node, ast.Dict):
        return any(says(k, "trust_remote_code") and is_true(v) for k, v in zip(node.keys, node.values, strict=True))
    if isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaults = [*zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)]
        defaults += zip(node.kwonlyargs, node.kw_defaults, strict=True)
        return any(argument.arg == "trust_remote_code" and is_true(value) for argument, value in defaults)
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and is_true(node.value):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(
            getattr(t, "id", getattr(t, "attr", None)) == "trust_remote_code"
            or says(getattr(t, "slice", None), "trust_remote_code")
            for t in targets
        )
    return False


def safety_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, fault) of whatever runs a stranger's code, hides an error, or talks."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            if {module.split(".")[0] for module in modules} & PICKLES:
                yield node.lineno, "pickle"
            if modules == ["torch"] and isinstance(node, ast.ImportFrom) and "load" in names:
                yield node.lineno, "torch.load under another name"
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            function = ast.unparse(node.func)
            if function == "torch.load" and not is_true(keywords.get("weights_only")):
                yield node.lineno, "torch.load without weights_only=True"
            if is_true(keywords.get("allow_pickle")) or function.endswith(("read_pickle", "to_pickle")):
                yield node.lineno, "pickle"
            if function == "print":
                yield node.lineno, "print"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        if calls_remote_code(node):
            yield node.lineno if hasattr(node, "lineno") else 0, "trust_remote_code=True"


def test_a_room_imports_only_from_rooms_above_it():
    assert import_faults(PACKAGE) == []


def test_every_room_that_is_there_is_listed_once_and_the_parts_exist():
    assert len(set(ROOMS)) == len(ROOMS) and set(PARTS.values()) <= set(ROOMS)
    there = {name.split(".")[0] for name in sources(PACKAGE)} - {""}
    assert set(PARTS) <= there
    assert len(there & set(ROOMS)) >= 15


def test_no_module_runs_strangers_code_hides_errors_or_prints():
    found = {name: list(safety_faults(tree)) for name, tree in sources(PACKAGE).items()}
    assert {name: faults for name, faults in found.items() if faults} == {}


# The checks themselves


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("encoder", "from .errors import DrumError", None),
        ("encoder", "from .retriever import DemoRetriever", "retriever is not above encoder"),
        ("encoder", "def f():\n    from .retriever import DemoRetriever", "retriever is not above encoder"),
        ("encoder", "import house.cli", "cli is not above encoder"),
        ("encoder", "from house.cli import main", "cli is not above encoder"),
        ("encoder", "from . import cli", "cli is not above encoder"),
        ("encoder", "from . import anything", "not from the package"),
        ("encoder", "if TYPE_CHECKING:\n    from .retriever import DemoRetriever", None),
        ("encoder", "if TYPE_CHECKING:\n    pass\nelse:\n    from .cli import main", "cli is not above encoder"),
        ("lvlm.local", "from ..errors import DrumError\nfrom .store import ScoreStore", None),
        ("lvlm.local", "from ..retriever import DemoRetriever", "retriever is not above lvlm"),
        ("lvlm", "from .store import ScoreStore", None),
        ("retriever", "from ._saved import write\nfrom . import _saved", None),
        ("_saved", "from .training import DrumTrainer", "training is not above retriever"),
        ("cli", "from ._saved import write", "retriever's own"),
        ("cli", "from . import _saved", "retriever's own"),
        ("cli", "from .encoder import _lora_config", "encoder's own"),
        ("cli", "from .lvlm._images import ImageInputs", "lvlm's own"),
        ("cli", "from .playground import make_world", None),
        ("pipelines", "from .playground import resolve", "not a part of the library"),
        ("playground.worlds", "from ..data import TripletTable", None),
        ("playground.worlds", "from ..retriever import DemoRetriever", "retriever is not above playground"),
        ("model_card", "from .errors import DrumError", "errors is not above model_card"),
        ("attic", "", "belongs to no room"),
        ("cli", "import importlib\nimportlib.import_module('house.app')", "can't see"),
        ("", "from .cli import main", "nothing until it is asked"),
    ],
)
def test_the_order_is_really_checked(tmp_path, module, source, fault):
    package = tmp_path / "house"
    names = {"errors", "data", "encoder", "retriever", "training", "_saved", "cli", "lvlm._images", "lvlm.store"}
    for name in {"", "lvlm", "playground", *names, module}:
        inner = package.joinpath(*name.split(".")) if name else package
        path = inner / "__init__.py" if name in ("", "lvlm", "playground") else inner.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name == module else "")
    faults = import_faults(package)
    assert len(faults) == (fault is not None), faults
    assert fault is None or fault in faults[0]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "pickle"),
        ("np.load(path, allow_pickle=True)", "pickle"),
        ("pd.read_pickle(path)", "pickle"),
        ("np.load(path, allow_pickle=False)", None),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=True)", None),
        ("from torch import load", "torch.load under another name"),
        ("model = make(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("hub = {'trust_remote_code': True}", "trust_remote_code=True"),
        ("hub['trust_remote_code'] = True", "trust_remote_code=True"),
        ("trust_remote_code: bool = True", "trust_remote_code=True"),
        ("def f(a, trust_remote_code=True): pass", "trust_remote_code=True"),
        ("def f(*, trust_remote_code=True): pass", "trust_remote_code=True"),
        ("def f(*, trust_remote_code=False): g(trust_remote_code=trust_remote_code)", None),
        ("try:\n    pass\nexcept:\n    pass", "bare except"),
        ("try:\n    pass\nexcept Exception:\n    pass", None),
        ("print('done')", "print"),
        ("'''>>> print(1)'''", None),
    ],
)
def test_unsafe_code_is_really_found(source, fault):
    assert [found for _, found in safety_faults(ast.parse(source))] == ([fault] if fault else [])
