"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    share = module.main(["--rounds", "1", "--world", "easy", "--out", str(tmp_path)])
    assert share >= 0.6
    assert "queries answered rightly" in capsys.readouterr().out
