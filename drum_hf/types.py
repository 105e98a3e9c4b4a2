"""What travels between the rooms: frozen dataclasses, and the two protocols that others implement."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

from .errors import RowError
from .utils.images import load_image

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


def image_key(image: Any) -> str:
    """Hash of a picture's size and of its pixels as upright RGB; 32 hex digits, "" for no image.

    Args:
        image: whatever [`load_image`][drum_hf.data.load_image] takes: the same picture has one hash, be it given by
            path, as bytes or as a PIL image; or None.

    Raises:
        ImageError: it can't be read.
    """
    if image is None:
        return ""
    pixels = load_image(image)
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


def _own(item: Any, *texts: str) -> None:
    """Check the texts, and open or copy the image: what is drawn on it later must not change what the key stands for.

    Raises:
        RowError, ImageError: a text is none, or the image can't be read.
    """
    for name in texts:
        value = getattr(item, name)
        if value is not None and not isinstance(value, str):
            raise RowError(
                f"expected {type(item).__name__}.{name} as a text, got {type(value).__name__}; convert it with str()"
            )
    if item.image is not None:
        image = load_image(item.image)
        object.__setattr__(item, "image", image.copy() if image is item.image else image)


_Item = TypeVar("_Item", "Demonstration", "Query")


def trusted(kind: type[_Item], /, **values: Any) -> _Item:
    """A demonstration or query of checked values, for tables: nothing is opened, copied or hashed.

    Args:
        values: its attributes. The image is upright RGB and is kept as it is. `key`, where given, is that of the
            content.
    """
    made = object.__new__(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    made.__dict__.update(defaults | values)
    return made


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A worked example for the LVLM's context.

    Attributes:
        id: unique in its table.
        image: the picture, upright and RGB, or None. May be given as whatever
            [`load_image`][drum_hf.data.load_image] takes, such as a path.
        prompt: what is asked; may be empty (captioning).
        response: the gold answer.
        references: every gold answer, where there are several.
        group: rows of one group (such as one image's questions) may not demonstrate one another.
        label: class name, in classification.

    Raises:
        ImageError: the image can't be read.
        RowError: the prompt or the response is no text.
    """

    id: str
    image: Image | None = dataclasses.field(repr=False)
    prompt: str
    response: str
    references: tuple[str, ...] = ()
    group: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        _own(self, "id", "prompt", "response")

    @functools.cached_property
    def key(self) -> str:
        """Hash of image, prompt and response; 32 hex digits."""
        return content_key(image_key(self.image), self.prompt, self.response)


@dataclasses.dataclass(frozen=True)
class Query:
    """What is asked of the LVLM.

    Attributes:
        image: the picture, upright and RGB, or None. May be given as whatever
            [`load_image`][drum_hf.data.load_image] takes, such as a path.
        prompt: what is asked.
        draft: the LVLM's own first answer, if there is one: never the gold response. The LVLM is not shown it;
            only the retriever uses it.
        id, group: exclude this row and its group from its own demonstrations.

    Raises:
        ImageError: the image can't be read.
        RowError: prompt, draft, id or group is no text.
    """

    image: Image | None = dataclasses.field(repr=False)
    prompt: str = ""
    draft: str | None = None
    id: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _own(self, "prompt", "draft", "id", "group")

    @functools.cached_property
    def key(self) -> str:
        """Hash of image and prompt; 32 hex digits."""
        return content_key(image_key(self.image), self.prompt)


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
    """Nearest neighbours by dot product, by id."""

    @property
    def dimension(self) -> int: ...

    def __len__(self) -> int: ...

    def add(self, ids: Sequence[str], vectors: np.ndarray, groups: Sequence[str | None] | None = None) -> None: ...

    def remove(self, ids: Sequence[str]) -> None: ...

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        exclude_ids: Sequence[str | None] | None = None,
        exclude_groups: Sequence[str | None] | None = None,
    ) -> tuple[list[list[str]], list[np.ndarray]]: ...
