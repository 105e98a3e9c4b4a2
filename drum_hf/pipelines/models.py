"""Which LVLM, processor and retriever a pipeline works with."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..lvlm.local.model import TransformersLVLM
from ..lvlm.local.processors import load_processor

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever

__all__ = ["DEFAULT_LVLM", "UnnamedLVLM", "find_processor", "find_retriever", "no_teacher", "teacher_of"]

logger = logging.getLogger(__name__)

#: The LVLM where neither the user nor the retriever names one, at a pinned commit. Our choice: the smallest on the Hub
#: that is tuned to follow instructions and takes several images.
DEFAULT_LVLM = ("HuggingFaceTB/SmolVLM-256M-Instruct", "7e3e67edbbed1bf9888184d9df282b700a323964")


class UnnamedLVLM(os.PathLike):
    """Stands in where `transformers.pipeline` is given no model, until the pipeline, which has the retriever, knows.

    transformers finds default models by task alone. With a name it would download the default before our class is
    called; this it hands through as it does a loaded model.
    """

    config = SimpleNamespace(_commit_hash=None)  # transformers 5.0 reads it of any model

    def __fspath__(self) -> str:
        return os.curdir  # transformers 5.2x looks up on the Hub what is not a path that exists

    def __str__(self) -> str:
        return f"the LVLM that the retriever learned from ({DEFAULT_LVLM[0]} without one)"

    def load(self, retriever: DemoRetriever | None, dtype: Any, local_files_only: bool) -> tuple[Any, Any]:
        """Model and processor, on the CPU: the pipeline moves them."""
        teacher = teacher_of(retriever)
        name, revision = teacher or DEFAULT_LVLM
        try:
            lvlm = TransformersLVLM.from_pretrained(
                name, revision=revision, dtype=dtype or "auto", device="cpu", local_files_only=local_files_only
            )
        except OSError as error:
            if teacher is None:
                raise
            raise no_teacher(name, error) from error
        logger.info("no model was named: %s answers", lvlm.name)
        return lvlm.model, lvlm.processor


def teacher_of(retriever: DemoRetriever | None) -> tuple[str, str | None] | None:
    """Name and revision of the LVLM that a retriever learned from, if it records one."""
    teacher = (retriever.teacher if retriever is not None else None) or {}
    return (teacher["name"], teacher.get("revision")) if teacher.get("name") else None


def no_teacher(name: str, error: OSError) -> OSError:
    return OSError(
        f"expected to load {name!r}, the LVLM that the retriever learned from, but it isn't there ({error}); pass "
        "model= with the directory or Hub id of the LVLM that is to answer"
    )


def find_retriever(retriever: Any, **hub: Any) -> DemoRetriever | None:
    """The retriever itself, or what its directory or Hub id holds.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(retriever, (str, os.PathLike)):
        from ..retriever.retriever import DemoRetriever

        return DemoRetriever.from_pretrained(os.fspath(retriever), **hub)
    if retriever is not None and not callable(retriever):
        raise TypeError(
            f"expected retriever= to be a DemoRetriever, its directory or Hub id, got {type(retriever).__name__}; "
            "DemoRetriever.from_encoder makes one from a table"
        )
    return retriever


def find_processor(model: Any, local_files_only: bool) -> Any:
    """The processor that lies beside a loaded model.

    Raises:
        ValueError: the model doesn't say where it was loaded from.
    """
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            f"expected processor= beside a {type(model).__name__} that doesn't say where it was loaded from"
        )
    commit = getattr(model.config, "_commit_hash", None)  # where transformers notes it
    hub: dict[str, Any] = {"local_files_only": local_files_only} | ({"revision": commit} if commit else {})
    return load_processor(name, model.config, **hub)
