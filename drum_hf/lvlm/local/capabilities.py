"""What a loaded model lets the scoring engine save, found by trial: a saving must leave scores as they are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ...types import Demonstration, ICLRequest, Query

__all__ = ["Capabilities", "find_capabilities"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """The savings that leave this model's scores as they are.

    Attributes:
        image_features: an image passes the vision tower once, whatever it is shown with.
        shared_prefix: demonstrations that several queries share pass the decoder once.
        packed_answers: answers to one conversation branch within one sequence.
        attention: the decoder's attention implementation.
        reasons: why a saving is not made, by its name.
    """

    image_features: bool
    shared_prefix: bool
    packed_answers: bool
    attention: str | None = None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def describe(self) -> str:
        """One line for a log or a terminal."""
        names = ("image_features", "shared_prefix", "packed_answers")
        parts = [
            f"{name} {'yes' if getattr(self, name) else 'no (' + self.reasons.get(name, 'not tried') + ')'}"
            for name in names
        ]
        return ", ".join([*parts, f"attention {self.attention}"])


def probe_requests() -> tuple[list[ICLRequest], list[list[str]]]:
    """Two queries after one demonstration, in images of two shapes; the first has several answers."""
    from PIL import Image

    noise = np.random.default_rng(0)
    wide, tall = (Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((48, 64), (64, 40)))
    shown = (Demonstration("probe", wide, "what is in this picture?", "it is red"),)
    requests = [
        ICLRequest(Query(tall, "what is it?"), shown),
        ICLRequest(Query(wide, "which colour has it, then?"), shown),
    ]
    return requests, [["it is red", "blue"], ["it is red"]]


def find_capabilities(
    config: Any,
    plain: Callable[[], list[list[np.ndarray]]],
    trial: Callable[[bool, bool], list[list[np.ndarray]]],
    *,
    tolerance: float,
) -> Capabilities:
    """Try every saving on the probe requests.

    Args:
        config: the decoder's.
        plain: log-probabilities of the probe's answers, one conversation a row, from pixels.
        trial: the same with kept image features, given (share beginnings, pack answers).
        tolerance: largest difference of a token's log-probability.
    """
    reasons: dict[str, str] = {}
    expected = plain()

    def works(name: str, share: bool, pack: bool) -> bool:
        import torch

        try:
            found = trial(share, pack)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reasons[name] = f"{type(error).__name__}: {error}"
            logger.debug("%s: %s", name, reasons[name])
            return False
        worst = max(
            float(np.abs(a - b).max(initial=0.0) if a.shape == b.shape else np.inf)
            for ours, theirs in zip(found, expected, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        if not worst <= tolerance:
            reasons[name] = f"log-probabilities differ by {worst:.2g}"
        return worst <= tolerance

    features = works("image_features", False, False)
    shares = features and works("shared_prefix", True, False)
    packs = False
    kinds = _layer_kinds(config)
    if features and kinds != {"full_attention"}:
        # A window or a convolution sees neighbours in the sequence, which in another branch are strangers.
        reasons["packed_answers"] = f"layers of the kinds {', '.join(sorted(kinds))}"
    elif features:
        packs = works("packed_answers", shares, True)
    for name in ("shared_prefix", "packed_answers"):
        if not features:
            reasons[name] = "needs image_features"
    return Capabilities(features, shares, packs, getattr(config, "_attn_implementation", None), reasons)


def _layer_kinds(config: Any) -> set[str]:
    stated = getattr(config, "layer_types", None)
    if stated:
        return set(stated)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return {"sliding_attention" if windowed else "full_attention"}
