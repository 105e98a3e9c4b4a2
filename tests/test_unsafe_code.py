"""No module runs untrusted code, hides an error, or prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from house import sources

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


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


def test_no_module_runs_untrusted_code_hides_errors_or_prints():
    found = {name: list(safety_faults(tree)) for name, tree in sources().items()}
    assert {name: faults for name, faults in found.items() if faults} == {}


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
