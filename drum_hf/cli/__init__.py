"""The command `drum-hf`, a verb a module. Heavy imports wait until a verb runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence

from ..errors import DrumError
from . import (
    app as _app,
)
from . import (
    bench as _bench,
)
from . import (
    data as _data,
)
from . import (
    demo as _demo,
)
from . import (
    eval as _eval,
)
from . import (
    index as _index,
)
from . import (
    push as _push,
)
from . import (
    score as _score,
)
from . import (
    scores as _scores,
)
from . import (
    train as _train,
)
from . import (
    tune as _tune,
)
from .options import check_device

#: What a full disk, a quota, and a place that may not be written give.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

__all__ = ["main"]

logger = logging.getLogger("drum_hf")

_VERBS = (_demo, _train, _score, _scores, _eval, _index, _push, _tune, _bench, _data, _app)


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("drum-hf")
    except PackageNotFoundError:
        installed = "unknown (run from a source tree)"
    parser = argparse.ArgumentParser(
        prog="drum-hf",
        description="Learn which demonstrations your vision-language model needs in its prompt, and retrieve them.",
    )
    parser.add_argument("--version", action="version", version=installed)
    parser.add_argument("-q", "--quiet", action="store_true", help="warnings only, no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in _VERBS:
        verb.add(commands)
    _describe(commands)
    return parser


def _describe(commands: argparse._SubParsersAction) -> None:
    """What the list of verbs says of each stands at the head of its own help too."""
    for listed in commands._choices_actions:
        parser = commands.choices[listed.dest]
        parser.description = f"{(listed.help or '')[:1].upper()}{(listed.help or '')[1:]}."
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                _describe(action)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not what other packages say below a warning, nor advice to install what only runs on another device."""
    if record.levelno < logging.WARNING:
        return record.name.startswith("drum_hf")
    if "is falling back to its reference PyTorch implementation" in record.getMessage():
        import torch

        return torch.cuda.is_available()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `drum-hf`; returns the exit status."""
    args = _parser().parse_args(argv)
    shown = logging.StreamHandler()
    shown.addFilter(_is_worth_telling)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[shown])
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_worth_telling)
    logger.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if args.quiet:
        import os

        os.environ["TQDM_DISABLE"] = "1"
    try:
        if getattr(args, "device", None):
            check_device(args.device)
        status = args.run(args)
    except (DrumError, ValueError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, DrumError) and error.errno in _DISK:
            said = (
                f"{error}; free space on the disk, or give a place that can be written; what was scored is kept, run "
                "the same command again to go on"
            )
        else:
            said = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"drum-hf {args.command}: {said}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; what was scored is kept, run the same command again to go on\n")
        return 130
    return status or 0
