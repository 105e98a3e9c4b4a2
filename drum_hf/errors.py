"""Named errors. Each message says what was expected, what was given, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BudgetExceededError",
    "CardError",
    "ChatTemplateError",
    "ColumnError",
    "ContextOverflowError",
    "DependencyError",
    "DimensionMismatchError",
    "DrumError",
    "DuplicateIdError",
    "EmptySupportError",
    "EndpointError",
    "HubError",
    "ImageError",
    "LeakError",
    "MissingIdError",
    "ModelError",
    "NonFiniteEmbeddingError",
    "NonFiniteScoreError",
    "RowError",
    "SavedFileError",
    "ScoringUnsupportedError",
    "SuiteError",
    "TooFewDemonstrationsError",
    "UnfinishedReasoningError",
]


class DrumError(Exception):
    """Base of every error that drum-hf raises for a user's fault."""


class CardError(DrumError, ValueError):
    """An entry of a model card is unknown, or of another form than the card shows."""


class ColumnError(DrumError, ValueError):
    """A table lacks a column, or a column holds another type than expected."""


class RowError(DrumError, ValueError):
    """One row of a table can't be used; the message names the row and the column."""


class ImageError(RowError):
    """An image can't be read: missing, truncated, zero-size, or far larger than is safe to decode."""


class DuplicateIdError(DrumError, ValueError):
    """Two rows share an id."""


class MissingIdError(DrumError, KeyError):
    """An id that was asked for is not in the table or index."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class ModelError(DrumError, OSError):
    """A model's files are neither in a folder, nor on the Hub, nor in its cache."""


class EmptySupportError(DrumError, ValueError):
    """The support set holds no demonstration.

    Attributes:
        skipped: (row number, reason) of each row that was left out.
    """

    def __init__(self, message: str, *, skipped: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(message)
        self.skipped = list(skipped)


class TooFewDemonstrationsError(DrumError, ValueError):
    """More demonstrations were asked for than the support set holds."""


class LeakError(DrumError, ValueError):
    """A query (or its image's group) would demonstrate itself, or train and test overlap."""


class ContextOverflowError(DrumError, ValueError):
    """The conversation is longer than the LVLM's context; nothing is cut silently."""


class ChatTemplateError(DrumError, ValueError):
    """The LVLM's processor has no chat template, or one that loses text or images."""


class ScoringUnsupportedError(DrumError, NotImplementedError):
    """This LVLM can't return log-probabilities of a given response."""


class UnfinishedReasoningError(DrumError, ValueError):
    """A model that reasons before it answers was cut off before it answered.

    Attributes:
        partial: the answers to the call's other requests, by position.
    """

    partial: dict[int, str]


class EndpointError(DrumError, RuntimeError):
    """An endpoint refused a request, gave no usable answer, or stayed unreachable after every retry.

    Attributes:
        status: HTTP status of the answer, or None where there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BudgetExceededError(DrumError, RuntimeError):
    """The spending cap of an endpoint is reached; what was answered before is kept."""


class NonFiniteScoreError(DrumError, ValueError):
    """The LVLM returned NaN or infinity as a score."""


class NonFiniteEmbeddingError(DrumError, ValueError):
    """The encoder returned NaN or infinity in an embedding."""


class DimensionMismatchError(DrumError, ValueError):
    """Vectors of one dimension met an index of another."""


class SavedFileError(DrumError, OSError):
    """A saved retriever, store or table has a file missing, altered or from an unknown format version."""


class HubError(SavedFileError):
    """A repository on the Hub can't be fetched, made or written to.

    Attributes:
        status: HTTP status of the Hub's answer, or None where there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DependencyError(DrumError, ImportError):
    """An optional package is missing, or two packages that exclude one another are both installed."""


class SuiteError(DrumError, ValueError):
    """A suite file says something that can't be run: an unknown key, a value of another type, a name nobody has."""
