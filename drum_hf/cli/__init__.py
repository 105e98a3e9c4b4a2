"""The command `drum-hf`, a verb a module. Heavy imports wait until a verb runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from ..errors import DrumError
from ..utils.files import check_name
from ..utils.text import printable, shown
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

#: Seconds that a command has after Ctrl-C to end by itself.
_GRACE = 1.5
#: Characters of an error that are shown; our choice.
_LONGEST = 4_000
_STOPPED = "\nstopped; what was scored is kept, run the same command again to go on\n"

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


class _Escaping:
    """Standard output that a terminal obeys in nothing: what comes from files and endpoints is printed as well."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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
    for stream in (sys.stdout, sys.stderr):  # at a terminal that knows ASCII alone, the rest comes as escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.addFilter(_is_worth_telling)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_worth_telling)
    logger.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    interrupted = threading.Event()
    try:
        with _ending_on_interrupt(interrupted), contextlib.redirect_stdout(_Escaping(sys.stdout)):
            for given in vars(args).values():  # before anything is paid for
                if isinstance(given, (str, os.PathLike)):
                    check_name(given)
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
        sys.stderr.write(f"drum-hf {args.command}: {shown(said, most=_LONGEST)}\n")
        if interrupted.is_set():
            _leave()
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(_STOPPED)
        if interrupted.wait(0.1):
            _leave()
        return 130
    if interrupted.is_set():
        _leave()
    return status or 0


def _leave() -> NoReturn:
    """End now: to take torch and the rest apart can take seconds, and waits for every thread."""
    atexit._run_exitfuncs()  # temporary folders and the like
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(130)


@contextlib.contextmanager
def _ending_on_interrupt(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C ends the process within two seconds, even where the main thread is in native code or another one waits.

    Python raises KeyboardInterrupt in the main thread between two of its steps only, and waits for threads at its end.
    The signal wakes a thread here, too, which ends the process where that takes too long. What was scored is in the
    store by then, and files are replaced whole or not at all.

    Args:
        interrupted: set at Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, signals = socket.socketpair()
    signals.setblocking(False)

    def watch() -> None:
        with ours:
            while received := ours.recv(64):
                if signal.SIGINT in received:
                    interrupted.set()
                    time.sleep(_GRACE)
                    with contextlib.suppress(Exception):
                        sys.stdout.flush()
                        sys.stderr.write(_STOPPED)
                        sys.stderr.flush()
                    os._exit(130)

    threading.Thread(target=watch, name="drum-hf-interrupt", daemon=True).start()
    before = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signals.close()
