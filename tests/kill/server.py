"""Commands from a process that has imported what they need, and done nothing else: `python -m tests.kill.server`.

A line of JSON on its input is a command; it is carried out in a fork of its own, which is told by its process id, and
by its status when it has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import select
import sys
from pathlib import Path
from typing import Any

from . import noted

#: A thread of Arrow's allocator, which knows of forks.
_HARMLESS = "jemalloc_bg_thd"


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def serve() -> dict[str, Any] | None:
    """Fork until the input ends (None); in a fork: the command that it is to carry out."""
    children: set[int] = set()
    left = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return None
            left += data
        while b"\n" in left:
            line, _, left = left.partition(b"\n")
            child = os.fork()
            if not child:
                return json.loads(line)
            children.add(child)
            tell(pid=child)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.discard(child)
                tell(ended=child, status=os.waitstatus_to_exitcode(status))


def main() -> int:
    for name in json.loads(Path(sys.argv[1]).read_text()):
        if not name.startswith(("tests", "__")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    tasks = Path("/proc/self/task").iterdir()
    tell(threads=[name for task in tasks if (name := (task / "comm").read_text().strip()) != _HARMLESS][1:])
    command = serve()
    if command is None:
        return 0
    import numpy as np

    os.setpgid(0, 0)
    said = os.open(command["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(old, new)
    os.environ["PAID"] = command["paid"]
    random.seed()  # as a process of its own would be
    np.random.seed()
    return noted.main(command["arguments"])


if __name__ == "__main__":
    sys.exit(main())
