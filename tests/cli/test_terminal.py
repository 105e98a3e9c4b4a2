"""What a command prints: nothing that a terminal obeys, and nothing that it can't print."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types

import pytest

from drum_hf import cli
from drum_hf.errors import SavedFileError

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\ud800"


@pytest.fixture
def verb(monkeypatch):
    """Run a function as a command; its exit status."""

    def run(function) -> int:
        def add(commands):
            commands.add_parser("try", help="tries").set_defaults(run=lambda args: function())

        monkeypatch.setattr(cli, "_VERBS", (types.SimpleNamespace(add=add),))
        return cli.main(["try"])

    return run


def test_an_error_is_one_line_that_controls_nothing(verb, capsys):
    def fail():
        raise SavedFileError(f"{EVIL}\nall checked, safe\rforged")

    assert verb(fail) == 2
    said = capsys.readouterr().err
    escaped = r"\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\ud800\nall checked, safe\rforged"
    assert said == f"drum-hf try: SavedFileError: {escaped}\n"


def test_an_error_is_never_pages_long(verb, capsys):
    def fail():
        raise SavedFileError("x" * 1_000_000)

    assert verb(fail) == 2
    assert 1000 < len(capsys.readouterr().err) < 5000


def test_what_is_printed_controls_nothing(verb, capsys):
    def tell():
        sys.stdout.write(f"{EVIL}\tgrößer 日本 👩‍🎓\n")
        sys.stdout.write(json.dumps({"name": EVIL + "\x7f\U000e0001"}, ensure_ascii=False) + "\n")

    assert verb(tell) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == r"\u001b]0;owned\u0007\u001b[2J\u202e\u009b31m\ud800" + "\tgrößer 日本 👩‍🎓"
    assert second.isprintable() and json.loads(second)["name"] == EVIL + "\x7f\U000e0001"


def test_logs_control_nothing():
    record = logging.LogRecord("drum_hf", logging.WARNING, __file__, 1, "row %s", (EVIL,), None)
    assert cli._Printable("%(message)s").format(record) == r"row \u001b]0;owned\u0007\u001b[2J\u202e\u009b31m\ud800"


def test_an_ascii_terminal(tmp_path):
    """What it can't print comes as escapes: nothing is lost after the work was done."""
    (tmp_path / "täble").mkdir()
    (tmp_path / "täble" / "t.csv").write_text("id,prompt,response\na,größer?,日本\n", encoding="utf-8")
    command = [sys.executable, "-m", "drum_hf.cli", "data", "check", str(tmp_path / "täble")]
    settings = os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, timeout=120)
    said = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert r"t\xe4ble" in said and r"gr\xf6\xdfer?" in said and r"\u65e5\u672c" in said


@pytest.mark.parametrize("name", [b"d\xff\xe4ta", b"out\xed\xa0\x80"])
def test_a_path_that_is_not_utf_8_is_named_before_anything_is_done(tmp_path, capsys, name):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    assert cli.main(["data", "check", folder]) == 2
    said = capsys.readouterr().err
    assert "expected a path in UTF-8 without NUL, got" in said and "rename it" in said
