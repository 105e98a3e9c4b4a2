"""Checkpoints that are whole or do not count, whenever a process is killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SavedFileError
from ..utils.files import read_json, write_text

__all__ = ["WholeCheckpoints", "in_steps_of_now", "last_checkpoint", "read_note", "same_run", "write_note"]

logger = logging.getLogger(__name__)

#: Written last: names and sizes (bytes) of the checkpoint's other files.
_WHOLE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints, the oldest first: by their steps, for a clock may have been set back."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / _WHOLE)
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a training that was written to its end; None where there is none."""
    for checkpoint in reversed(_numbered(Path(folder))):
        if _is_whole(checkpoint):
            return checkpoint
        logger.warning("%s was not written to its end, and is not used", checkpoint)
    return None


@contextlib.contextmanager
def in_steps_of_now(checkpoint: Path, steps: int) -> Iterator[Path]:
    """A checkpoint for a launch whose epochs have another number of steps, since it has more or fewer processes.

    The platform counts in steps, and would take up the training in another epoch. So trainer state and schedule are
    set to the step of this launch that lies where the checkpoint's did, or less than one step before.

    Args:
        checkpoint: of a training whose length was given in epochs.
        steps: of an epoch, as it is now.

    Returns:
        The checkpoint itself, or a copy (mostly of links) that lasts as long as the context.

    Raises:
        SavedFileError: the checkpoint's state can't be read.
    """
    import torch

    state_file, schedule_file = checkpoint / "trainer_state.json", checkpoint / "scheduler.pt"
    try:
        state = read_json(state_file, limit=1 << 30)  # the platform's log of every step
        before, odd = divmod(int(state["max_steps"]), int(state["num_train_epochs"]))
        done = int(state["global_step"])
        if before < 1 or odd:
            raise ValueError(f"{state['max_steps']} steps are no {state['num_train_epochs']} epochs")
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise SavedFileError(
            f"expected the state of a training in {state_file}; reading it failed ({error}). Resume from another "
            "checkpoint"
        ) from error
    if before == steps:
        yield checkpoint
        return
    now = done * steps // before
    logger.warning(
        "%s: its epochs had %d steps, this launch's have %d: going on after step %d of them instead of %d",
        checkpoint, before, steps, now, done,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".resumed-") as made:
        copy = Path(made, f"checkpoint-{now}")
        copy.mkdir()
        for path in checkpoint.iterdir():
            if path not in (state_file, schedule_file):
                _link(path.resolve(), copy / path.name)
        state |= {"global_step": now, "epoch": now / steps}
        (copy / state_file.name).write_text(json.dumps(state), encoding="utf-8")
        if schedule_file.exists():
            schedule = torch.load(schedule_file, weights_only=True)
            for name in ("last_epoch", "_step_count"):
                schedule[name] += now - done
            torch.save(schedule, copy / schedule_file.name)
        yield copy


def _link(path: Path, place: Path) -> None:
    """A hard link, so that the copy is a folder of files like any other; a copy on another file system."""
    if path.is_dir():
        place.mkdir()
        for inner in path.iterdir():
            _link(inner, place / inner.name)
        return
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def same_run(folder: str | os.PathLike[str], settings: dict[str, Any], *, anew: bool = False) -> Path | None:
    """Where the same command goes on: its last whole checkpoint, or None for the beginning.

    Args:
        folder: of the training; what the run is made of is noted there.
        settings: JSON-ready, all that the outcome depends on.
        anew: forget an earlier run, whatever it was made of.

    Raises:
        SavedFileError: the folder holds checkpoints of a run with other settings, or can't be written.
    """
    folder = Path(folder)
    note = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if anew:
            for checkpoint in _numbered(folder):
                shutil.rmtree(checkpoint)
            note.unlink(missing_ok=True)
        found = last_checkpoint(folder)
        known = read_note(note)
        if found is not None and known is not None and known != json.loads(json.dumps(settings)):
            # "LVLM" is what --lvlm came to
            differ = sorted({key.lower() for key in {*known, *settings} if known.get(key) != settings.get(key)})
            raise SavedFileError(
                f"{folder} holds a training that was started with other settings ({', '.join(differ)}); give another "
                "folder by --out, or --restart to start anew in this one"
            )
        write_note(note, settings)
    except OSError as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(f"{folder}: it can't be written ({error}); free space, or give another folder") from error
    if found is not None:
        logger.info("going on from %s", found)
    return found


def write_note(note: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file; a reader sees the old one or the new one."""
    write_text(note, json.dumps(content, indent=1))


def read_note(note: Path) -> dict[str, Any] | None:
    """What `write_note` wrote; None where there is nothing that can be read."""
    try:
        found = read_json(note)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class WholeCheckpoints:
    """For a platform trainer: a checkpoint counts once it is whole, and old ones go by their steps.

    The platform writes a checkpoint file by file under its final name, and removes the ones with the earliest
    modification time, which after a clock was set back is the newest.
    """

    args: Any
    state: Any
    accelerator: Any

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write into a checkpoint what the trainer has beyond the platform's files."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:  # a killed run may have left another one half-way
                (checkpoint / _WHOLE).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.save_state_beside(checkpoint)
                self._seal(checkpoint, limit)
        except OSError as error:
            if isinstance(error, SavedFileError):
                raise
            raise SavedFileError(
                f"{checkpoint}: writing it failed ({error}); free space on the disk and run the same command again, "
                "which goes on from the checkpoint before"
            ) from error
        finally:
            self.args.save_total_limit = limit

    def _seal(self, checkpoint: Path, limit: int | None) -> None:
        sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size
                 for path in sorted(checkpoint.rglob("*")) if path.is_file()}  # fmt: skip
        write_text(checkpoint / _WHOLE, json.dumps(sizes))
        best = self.state.best_model_checkpoint
        kept = [path for path in _numbered(checkpoint.parent) if best is None or path != Path(best)]
        if limit is not None and limit > 0:
            for old in kept[: max(0, len(kept) - limit)]:
                (old / _WHOLE).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)
