"""Checkpoints that are whole or do not count, whenever a process is killed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import SavedFileError

__all__ = ["WholeCheckpoints", "last_checkpoint", "same_run"]

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
        sizes = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8"))
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
        known = _read(note)
        if found is not None and known is not None and known != json.loads(json.dumps(settings)):
            differ = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
            raise SavedFileError(
                f"{folder} holds a training that was started with other settings ({', '.join(differ)}); give another "
                "folder by --out, or --restart to start anew in this one"
            )
        part = note.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        part.replace(note)
    except OSError as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(f"{folder}: it can't be written ({error}); free space, or give another folder") from error
    if found is not None:
        logger.info("going on from %s", found)
    return found


def _read(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
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
        part = checkpoint / f"{_WHOLE}.part"
        part.write_text(json.dumps(sizes), encoding="utf-8")
        part.replace(checkpoint / _WHOLE)
        best = self.state.best_model_checkpoint
        kept = [path for path in _numbered(checkpoint.parent) if best is None or path != Path(best)]
        if limit is not None and limit > 0:
            for old in kept[: max(0, len(kept) - limit)]:
                (old / _WHOLE).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)
