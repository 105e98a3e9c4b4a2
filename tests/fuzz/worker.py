"""Loads mutated artefacts, one for each line on standard input, and says what came of it. Bounded in memory."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import drum_hf
from drum_hf.errors import DrumError

from .artefacts import ARTEFACTS
from .mutations import mutate
from .poison import poison, replace, replacements
from .watching import Watch

ROOT = str(Path(drum_hf.__file__).parent)
#: Bytes of address space that loading may take beyond what the process has when it starts.
ROOM = 3 << 30


def change(folder: Path, number: int, chance: random.Random, secret: Path, mark: Path) -> str:
    """One mutation: a known setting with a hostile value, a file replaced, or anything at random; in words."""
    turn, which = number % 4, number // 4
    if turn in (0, 1) and (what := poison(folder, which * 2 + turn, chance, secret)):
        return what
    if turn == 2 and which < replacements(folder) and (what := replace(folder, which, secret, mark)):
        return what
    return mutate(folder, chance, secret, mark)


def bases(folder: Path) -> list[str]:
    """The base models that adapters name, which may be on the Hub."""
    found = []
    for path in sorted((*folder.rglob("drum_config.json"), *folder.rglob("adapter_config.json"))):
        try:
            if path.is_file() and not path.is_symlink():
                content = json.loads(path.read_bytes())
                found += [repr(content.get(key)) for key in ("base_model", "base_model_name_or_path")]
        except (ValueError, AttributeError, RecursionError):
            pass
    return found


def outcome(kind: str, folder: Path, expected: Any, signed: bool) -> str:
    """ "same", "changed", "named: …", or a fault: "FAULT …"."""
    artefact = ARTEFACTS[kind]
    try:
        found = artefact.read(folder)
    except DrumError as error:
        message = str(error)
        return f"named: {type(error).__name__}" if message else "FAULT an error without a message"
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        # ours, or the platform's word on what a user may give it, such as a training argument
        if frames[-1].filename.startswith(ROOT) or "training_args" in frames[-1].filename:
            return "named: ValueError"
        return f"FAULT {type(error).__name__}: {error!s:.300} at {frames[-1].filename}:{frames[-1].lineno}"
    except BaseException as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ROOT)]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else "?"
        return f"FAULT {type(error).__name__}: {error!s:.300} at {where}"
    if found == expected:
        return "same"
    return "FAULT content changed under a checksum" if artefact.sealed and not signed else "changed"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # What a library prints while it loads must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work = Path(sys.argv[1]).resolve()
    (work / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(work / "tmp")
    secret, mark = work / "secret", work / "code-was-run"
    pristine: dict[str, tuple[Path, Any]] = {}
    for kind in sys.argv[2].split(","):
        folder = work / "pristine" / kind
        if not folder.exists():
            folder.mkdir(parents=True)
            ARTEFACTS[kind].make(folder)
        copy = work / "trial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        pristine[kind] = folder, ARTEFACTS[kind].read(copy)
        shutil.rmtree(copy)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    allowed = [work / "trial", work / "pristine", work / "tmp", work / "cache"]
    watch = Watch(allowed, Path(ROOT).parent, secret)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        kind, seed = json.loads(line)
        chance = random.Random(f"{kind}-{seed}")
        folder = work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        source, expected = pristine[kind]
        shutil.copytree(source, folder)
        what = change(folder, seed % 1_000_000, chance, secret, mark)
        while any(
            (at := folder / name).is_symlink() and (at.is_file() or at.is_dir()) for name in ARTEFACTS[kind].given
        ):
            shutil.rmtree(folder)
            shutil.copytree(source, folder)
            what = mutate(folder, chance, secret, mark)
        signed = False
        plain = all(path.is_file() or path.is_dir() for path in folder.rglob("*"))  # a pipe can't be signed
        if ARTEFACTS[kind].sign is not None and plain and chance.random() < 0.8:
            try:
                ARTEFACTS[kind].sign(folder)  # type: ignore[misc]
                signed = True
            except Exception:
                pass  # nothing left to sign
        hub = bases(folder) != bases(source)
        with watch.loading(anywhere=ARTEFACTS[kind].anywhere, hub=hub) as seen:
            result = outcome(kind, folder, expected, signed)
        if seen:
            result = f"FAULT {seen[0]}"
        if mark.exists():
            result = "FAULT code was run"
            mark.rmdir()
        answers.write(json.dumps([kind, seed, what, result]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
