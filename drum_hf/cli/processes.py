"""One of several processes (`torchrun`, `accelerate launch`) at the command line."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..scores.processes import Processes

__all__ = ["joined"]


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this launch; all but the main one are silent. To be entered before models are loaded."""
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported
        logging.getLogger("drum_hf").setLevel(logging.WARNING)
    from ..scores.processes import Processes

    processes = Processes.current()
    try:
        yield processes
    finally:
        if processes.count > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
