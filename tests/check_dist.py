"""Whether wheel and sdist hold what they should: ``python tests/check_dist.py dist``."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

TOP = Path(__file__).parents[1]

#: Bytes that a wheel may have, models and all; PyPI's own limit is 100 MiB.
LARGEST = 16 * 2**20


def package_files(top: Path = TOP) -> set[str]:
    """Every file that the installed package needs."""
    return {
        path.relative_to(top).as_posix()
        for path in (top / "drum_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def repository_files(top: Path = TOP) -> set[str]:
    """Every file that git has, or would take; none where it does not know the folder."""
    command = ["git", "-C", str(top), "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, capture_output=True, text=True)
    names = found.stdout.splitlines() if found.returncode == 0 else []
    return {name for name in names if (top / name).is_file()}


def wheel_faults(names: Iterable[str], size: int, expected: set[str]) -> list[str]:
    """What is wrong with a wheel of these files, `size` bytes large."""
    here = {name for name in names if not name.endswith("/")}
    inside = {name for name in here if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    faults = [f"missing from the wheel: {name}" for name in sorted(expected - here)]
    faults += [f"not of the package: {name}" for name in sorted(inside - expected)]
    faults += [f"missing from the wheel: its {n}" for n in ("LICENSE", "METADATA") if not any(n in h for h in here)]
    if size > LARGEST:
        faults.append(f"the wheel has {size:,} bytes, more than {LARGEST:,}")
    return faults


def sdist_faults(names: Iterable[str], expected: set[str]) -> list[str]:
    """What is missing from an sdist of these files, which begin with the folder of name and version."""
    here = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}
    return [f"missing from the sdist: {name}" for name in sorted(expected - here)]


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0] if argv else "dist")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        faults = wheel_faults(archive.namelist(), wheel.stat().st_size, package_files())
    with tarfile.open(sdist) as archive:
        wanted = repository_files() or package_files()
        faults += sdist_faults(archive.getnames(), {name for name in wanted if not name.startswith(".")})
    for fault in faults:
        sys.stderr.write(fault + "\n")
    if not faults:
        sys.stdout.write(
            f"{wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB) and {sdist.name} hold what they should\n"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
