"""What a loading process touches: Python's own events, and whether the files of a folder were opened by anything."""

from __future__ import annotations

import ctypes
import os
import select
import site
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_IN_OPEN, _IN_ACCESS, _IN_NONBLOCK = 0x20, 0x01, 0o4000
#: Events whose first arguments are paths.
_PATHS = {
    "open": 1,
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.listdir"), 1),
    **dict.fromkeys(("os.scandir", "shutil.rmtree", "ctypes.dlopen", "sqlite3.connect"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move"), 2),
}
#: A process, an address, a pickle that names something.
_NEVER = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostby"),
    *("urllib.Request", "pickle.find_class"),
)


class Watch:
    """Notes what no loading of untrusted files may do.

    Files are allowed in the folders given, in Python's libraries, and in the system's pseudo-files that libraries
    read. What native code opens is no event of Python's: files of the secret folder tell it through the kernel.

    Args:
        allowed: folders that may be read and written.
        source: the package, which may be read.
        secret: a folder that nothing may open.
    """

    def __init__(self, allowed: list[Path], source: Path, secret: Path) -> None:
        self.seen: list[str] = []
        self._on = self._anywhere = self._hub = False
        self._allowed = tuple(os.path.realpath(path) for path in allowed)
        paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *site.getsitepackages(), str(source)}
        system = (
            "/proc",
            "/sys",
            "/dev/null",
            "/dev/urandom",
            "/dev/shm",
            "/usr/lib",
            "/usr/share",
            "/lib",
            "/etc/ld",
        )
        self._readable = (*map(os.path.realpath, paths), *system)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._notes = self._libc.inotify_init1(_IN_NONBLOCK)
        for path in (secret, *secret.rglob("*")):
            self._libc.inotify_add_watch(self._notes, os.fsencode(path), _IN_OPEN | _IN_ACCESS)
        sys.addaudithook(self._note)

    @contextmanager
    def loading(self, *, anywhere: bool, hub: bool) -> Iterator[list[str]]:
        """What is seen while the block runs.

        Args:
            anywhere: files may be named as on a command line.
            hub: the Hub may be asked, such as for the base model that an adapter names.
        """
        self.seen.clear()
        self._opened()
        self._anywhere, self._hub, self._on = anywhere, hub, True
        try:
            yield self.seen
        finally:
            self._on = False
            if (opened := self._opened()) and not anywhere:
                self.seen.append(f"opened {opened} of the secret folder")

    def _opened(self) -> list[str]:
        """Names of the files in the secret folder that anything opened since the last time."""
        found: list[str] = []
        while select.select([self._notes], [], [], 0)[0]:
            events = os.read(self._notes, 1 << 16)
            while events:  # of inotify: watch, mask, cookie, length of the name, and the name
                *_, length = struct.unpack_from("iIII", events)
                found.append(events[16 : 16 + length].rstrip(b"\0").decode() or "itself")
                events = events[16 + length :]
        return found

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event.startswith(_NEVER):
            if not (self._hub and event.startswith("socket.")):
                self._say(f"{event} {args!r:.100}")
            if not event.startswith("pickle."):
                raise ConnectionRefusedError("not in this test")
        elif event == "exec" and getattr(args[0], "co_filename", "").startswith(self._allowed):
            self._say(f"ran {args[0].co_filename}")
        elif event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] != -1:
            return  # relative to a folder that was opened
        elif event in _PATHS and not self._anywhere:
            writes = event not in ("open", "os.listdir", "os.scandir", "ctypes.dlopen", "sqlite3.connect")
            if event == "open":
                mode, flags = args[1], args[2] if len(args) > 2 else 0
                writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            for path in args[: _PATHS[event]]:
                if isinstance(path, (str, bytes, os.PathLike)) and not self._may(os.fsdecode(path), writes):
                    self._say(f"{event} {os.fsdecode(path)!r:.100}")

    def _say(self, what: str) -> None:
        if len(self.seen) < 10:
            self.seen.append(what)

    def _may(self, path: str, writes: bool) -> bool:
        on = self._on
        self._on = False
        try:
            if not path or path == ":memory:" or (not writes and "/" not in path and path.startswith("lib")):
                return True
            # what is opened by a path is its target, a link's own place is checked by the caller's tests
            place = os.path.abspath(path)
            real = os.path.realpath(place)
            if real.startswith(self._allowed) and place.startswith((*self._allowed, tempfile.gettempdir())):
                return True
            return not writes and (real.startswith(self._readable) or place.startswith(self._readable))
        except (OSError, ValueError):  # no path at all
            return True
        finally:
            self._on = on
