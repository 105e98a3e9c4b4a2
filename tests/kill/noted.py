"""The command, with every request that the LVLM is sent noted: `python -m tests.kill.noted ARGUMENTS OF drum-hf`.

A line a batch goes to the file $PAID, before the LVLM answers it. Batches are small, so that there are many moments
between them. The modules that were loaded in the end are listed in the file $MODULES, where that is set.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import drum_hf.scores.cached as cached
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.scores.store import request_key

BATCH = 8


def note(name: str, kind: Any) -> None:
    plain = getattr(TransformersLVLM, name)

    def call(self: Any, requests: Any, **options: Any) -> Any:
        more = {"max_new_tokens": options["max_new_tokens"]} if kind == "generate" else {}
        keys = [request_key(r, self.fingerprint, kind=kind, **more).hex() for r in requests]
        descriptor = os.open(os.environ["PAID"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(keys) + "\n").encode())
        os.close(descriptor)
        return plain(self, requests, **options)

    setattr(TransformersLVLM, name, call)


def main(arguments: list[str]) -> int:
    from drum_hf.cli import main as command

    note("score", "score")
    note("generate", "generate")
    cached.CachedLVLM.__init__.__kwdefaults__["batch_size"] = BATCH
    sys.argv = ["drum-hf", *arguments]
    status = command(arguments)
    if "MODULES" in os.environ:
        Path(os.environ["MODULES"]).write_text(json.dumps(sorted(sys.modules)))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
