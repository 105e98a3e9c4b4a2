"""Wheel and sdist hold what they should, and the checks of it find what is wrong."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import check_dist
import pytest

TOP = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both built from a copy, since building leaves files beside setup.py."""
    if not (TOP / "setup.py").is_file():
        pytest.skip("not a source tree")
    copy = tmp_path_factory.mktemp("source")
    names = check_dist.repository_files() or {
        path.relative_to(TOP).as_posix()
        for part in ("drum_hf", "docs", "examples", "tests")
        for path in (TOP / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {path.name for path in TOP.iterdir() if path.is_file()}
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return copy / "dist"


def test_both_hold_what_they_should(dist, capsys):
    assert check_dist.main([str(dist)]) == 0, capsys.readouterr().err
    assert "hold what they should" in capsys.readouterr().out


def test_pypi_would_take_them(dist):
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_what_the_wheel_says_of_itself(dist):
    (wheel,) = dist.glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        said = HeaderParser().parsestr(archive.read(name).decode())
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "drum-hf = drum_hf.cli:main" in archive.read(name).decode().replace("drum-hf=", "drum-hf = ")
    assert (said["Name"], said["License"] or said["License-Expression"]) == ("drum-hf", "Apache-2.0")
    assert {"app", "demo", "docs", "gpu"} <= set(said.get_all("Provides-Extra"))
    pinned = [need for need in said.get_all("Requires-Dist") if "==" in need.split(";")[0]]
    assert pinned == []  # ranges only: a pin would keep users from security updates


def test_faults_are_found(dist):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    expected = check_dist.package_files()
    faults = check_dist.wheel_faults
    assert faults(names, 1, expected) == []
    assert faults([n for n in names if not n.endswith("py.typed")], 1, expected) == [
        "missing from the wheel: drum_hf/py.typed"
    ]
    assert faults([*names, "tests/test_x.py"], 1, expected) == ["not of the package: tests/test_x.py"]
    assert faults([n for n in names if "LICENSE" not in n], 1, expected) == ["missing from the wheel: its LICENSE"]
    assert "more than" in faults(names, 2**25, expected)[0]
    with tarfile.open(sdist) as archive:
        assert check_dist.sdist_faults(archive.getnames(), {"examples/none.py"}) == [
            "missing from the sdist: examples/none.py"
        ]


def test_links_of_the_readme_lead_somewhere_from_pypi(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    description = runpy.run_path(str(TOP / "setup.py"))["description"]
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    assert description(readme, "") == readme
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", description(readme, "https://example.org/drum"))
    assert len(links) == len(re.findall(r"\]\(", readme)) > 10
    for image, target in links:
        assert target.startswith("https://example.org/drum/" + ("raw" if image else "blob")) or (
            target.startswith("http") and target in readme
        )
