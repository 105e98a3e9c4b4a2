"""Many threads may search an index, as many at once as there are cores; one at a time may change it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

#: Searches at once, over all indexes of the process. More than there are cores would take the interpreter from one
#: another in the middle: with 16 threads on two cores that costs up to a third.
SEARCHES = threading.BoundedSemaphore(os.cpu_count() or 1)


class SharedLock:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers = 0
        self._writers = 0  # waiting or writing
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._turn:
                self._readers -= 1
                if self._writers:
                    self._turn.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._turn:
            self._writers += 1
            self._turn.wait_for(lambda: not self._readers and not self._writing)
            self._writing = True
        try:
            yield
        finally:
            with self._turn:
                self._writing = False
                self._writers -= 1
                self._turn.notify_all()
