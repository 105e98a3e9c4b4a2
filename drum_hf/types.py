"""What travels between the rooms: frozen dataclasses, and the two protocols that others implement."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = [
    "LVLM",
    "TASKS",
    "Demonstration",
    "ICLRequest",
    "Query",
    "Retrieval",
    "Task",
    "VectorIndex",
    "content_key",
    "image_key",
]

Task = Literal["vqa", "classification", "captioning"]
TASKS: tuple[Task, ...] = get_args(Task)


def image_key(image: Image | None) -> str:
    """Hash of an image's pixels (RGB) and size, whatever file format it came in; 32 hex digits, "" for no image."""
    if image is None:
        return ""
    pixels = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()[:32]


def content_key(*parts: str) -> str:
    """Hash of texts in order, each set apart by its length; 32 hex digits."""
    return texts_key(parts)


def texts_key(parts: Iterable[str]) -> str:
    """As `content_key`, of texts that are read one by one."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A worked example for the LVLM's context.

    Attributes:
        id: unique in its table.
        image: the picture, or None.
        prompt: what is asked; may be empty (captioning).
        response: the gold answer.
        references: every gold answer, where there are several.
        group: rows of one group (such as one image's questions) may not demonstrate one another.
        label: class name, in classification.
        key: hash of image, prompt and response; computed where left out.
    """

    id: str
    image: Image | None = dataclasses.field(repr=False)
    prompt: str
    response: str
    references: tuple[str, ...] = ()
    group: str | None = None
    label: str | None = None
    key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", content_key(image_key(self.image), self.prompt, self.response))


@dataclasses.dataclass(frozen=True)
class Query:
    """What is asked of the LVLM.

    Attributes:
        image: the picture, or None.
        prompt: what is asked.
        draft: the LVLM's own first answer, if there is one: never the gold response. The LVLM is not shown it;
            only the retriever uses it.
        id, group: exclude this row and its group from its own demonstrations.
        key: hash of image and prompt; computed where left out.
    """

    image: Image | None = dataclasses.field(repr=False)
    prompt: str = ""
    draft: str | None = None
    id: str | None = None
    group: str | None = None
    key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", content_key(image_key(self.image), self.prompt))


@dataclasses.dataclass(frozen=True)
class ICLRequest:
    """One call of the LVLM: demonstrations in the order shown, then the query.

    Attributes:
        query: what is asked.
        demonstrations: shown as earlier turns, first to last; the last stands nearest the query.
        responses: gold answers to score, any of them right; empty to generate.
        weights: a positive weight for each response (annotators who gave it), or empty for equal ones.
        choices: the closed label set that a score is normalised over, or empty.
    """

    query: Query
    demonstrations: tuple[Demonstration, ...] = ()
    responses: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.responses):
            raise ValueError(
                f"ICLRequest.weights has {len(self.weights)} entries for {len(self.responses)} responses; "
                "give one positive weight for each response, or none"
            )


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What a retriever found for one query, most useful first.

    Attributes:
        query_id: the query's id, if it has one.
        demonstrations: most useful first; with a selector, in the order in which it chose them.
        scores: float each, dot product of unit vectors, in [-1, 1]; higher is more useful.
    """

    query_id: str | None
    demonstrations: tuple[Demonstration, ...]
    scores: tuple[float, ...]

    @property
    def ids(self) -> list[str]:
        """Ids of the demonstrations, most useful first."""
        return [d.id for d in self.demonstrations]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: texts, ids and scores; images are left out."""
        return {
            "query_id": self.query_id,
            "demonstrations": [
                {"id": d.id, "prompt": d.prompt, "response": d.response, "score": round(float(s), 6)}
                for d, s in zip(self.demonstrations, self.scores, strict=True)
            ],
        }


@runtime_checkable
class LVLM(Protocol):
    """A large vision-language model, wherever it runs."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a score could: weights and revision, adapter, dtype, chat template."""
        ...

    def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
        """Log-likelihood of each request's gold response.

        Mean log-probability a token; several responses: weighted log-sum-exp; with `choices`: log-probability of
        the response normalised over them (the feedback of DRUM; the mean and the weighting are our choice).

        Args:
            requests: each with at least one response.

        Returns:
            float64 array of shape (len(requests),), higher is better, at most 0 for a single response.

        Raises:
            ScoringUnsupportedError: this LVLM gives no log-probabilities.
            ContextOverflowError: a conversation does not fit the context.
        """
        ...

    def generate(self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers, one for each request, stripped of special tokens."""
        ...


@runtime_checkable
class VectorIndex(Protocol):
    """Nearest neighbours by dot product, by id; what a `DemoRetriever` takes as its `index`.

    An index only holds vectors: it is emptied (`remove`) and filled (`add`) again when the encoder has changed. It may
    have, beside the methods below, `save(folder)`, which writes its files into a new folder;
    [`register_index`][drum_hf.index.registry.register_index] says how they are read again. A retriever calls one
    method at a time.
    """

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    @property
    def ids(self) -> list[str]:
        """Ids in the order they were added."""
        ...

    def __len__(self) -> int:
        """Number of ids."""
        ...

    def add(self, ids: Sequence[str], vectors: np.ndarray, groups: Sequence[str | None] | None = None) -> None:
        """Add rows; all of them, or none where one is refused.

        Args:
            ids: unique, and not in the index.
            vectors: float32 of shape (len(ids), dimension), of unit length.
            groups: each row's group or None; rows of one group can be excluded together.

        Raises:
            DimensionMismatchError: vectors of another width.
            DuplicateIdError: an id comes twice, or is in the index already.
        """
        ...

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows; all of them, or none where one is missing.

        Raises:
            MissingIdError: an id is not in the index.
        """
        ...

    def vectors(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """The vectors of these ids, or all of them in order: float32 of shape (number of ids, dimension).

        Raises:
            MissingIdError: an id is not in the index.
        """
        ...

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        exclude_ids: Sequence[str | Collection[str] | None] | None = None,
        exclude_groups: Sequence[str | Collection[str] | None] | None = None,
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """The k nearest rows of each query, nearest first; fewer only where exclusions leave fewer.

        Args:
            vectors: float32 of shape (number of queries, dimension), of unit length.
            k: at least 1.
            exclude_ids: for each query, an id that it must not get, several, or None.
            exclude_groups: for each query, a group whose rows it must not get, several, or None.

        Returns:
            For each query its ids, and a float32 array of their dot products; higher is nearer.

        Raises:
            EmptySupportError: the index is empty.
            TooFewDemonstrationsError: k is more than the index holds.
        """
        ...
