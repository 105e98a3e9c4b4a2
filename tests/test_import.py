"""What `import drum_hf` does and doesn't: in a fresh interpreter where modules already loaded would matter."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import drum_hf

TASKS = ["icl-image-captioning", "icl-image-classification", "icl-vqa"]
SHOW_TASKS = (
    "from transformers.pipelines import PIPELINE_REGISTRY as R\n"
    "print([t for t in R.get_supported_tasks() if t.startswith('icl-')])\n"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stderr
    return done.stdout.strip()


def test_import_is_light():
    heavy = "torch transformers sentence_transformers datasets faiss numpy PIL pyarrow pandas matplotlib".split()  # noqa: SIM905
    out = run(
        f"import sys; before = set(sys.modules); import drum_hf; new = set(sys.modules) - before\n"
        f"print(sorted(new & set({heavy!r})), sorted(m for m in new if m.startswith('drum_hf')))"
    )
    assert out == "[] ['drum_hf']"


@pytest.mark.parametrize(
    "imports",
    [
        "import drum_hf; import transformers.pipelines",
        "import transformers.pipelines; import drum_hf",
        "import drum_hf; drum_hf.pipeline",
    ],
    ids=["drum_hf first", "transformers first", "drum_hf brings transformers in"],
)
def test_tasks_are_registered_in_every_order(imports):
    assert run(f"{imports}\n{SHOW_TASKS}") == str(TASKS)


def test_registering_again_changes_nothing():
    from transformers.pipelines import PIPELINE_REGISTRY

    from drum_hf.pipelines.pipelines import _register

    before = dict(PIPELINE_REGISTRY.supported_tasks)
    assert set(TASKS) <= set(before)
    _register()
    assert all(PIPELINE_REGISTRY.supported_tasks[task] is what for task, what in before.items())


@pytest.mark.parametrize("name", [n for n in drum_hf.__all__ if n != "__version__"])
def test_public_name_is_what_its_module_defines(name):
    module = f"drum_hf.{drum_hf._MODULES[name]}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this installation")
    value = getattr(drum_hf, name)
    assert value.__name__ == name
    assert value.__module__.startswith(module)
    assert getattr(drum_hf, name) is value
    assert name in vars(drum_hf)  # the second look-up costs nothing


def test_type_checkers_see_the_same_names():
    (block,) = (node for node in ast.parse(inspect.getsource(drum_hf)).body if isinstance(node, ast.If))
    imports = {alias.name: node.module for node in block.body for alias in node.names}
    assert imports == drum_hf._MODULES
    assert set(drum_hf._MODULES) | {"__version__"} == set(drum_hf.__all__)


def test_dir_and_unknown_names():
    assert set(drum_hf.__all__) <= set(dir(drum_hf))
    with pytest.raises(AttributeError, match="module 'drum_hf' has no attribute 'DemoRetreiver'"):
        _ = drum_hf.DemoRetreiver


def test_version_is_that_of_the_package():
    setup = Path(drum_hf.__file__).parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("not a source tree")
    assert f'version="{drum_hf.__version__}"' in setup.read_text(encoding="utf-8")
