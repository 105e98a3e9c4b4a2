"""Ways to train a retriever, by name: DRUM, its ancestors and rivals, and DRUM with one part taken away."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["METHODS", "Method"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a retriever, told by what sets it apart.

    Attributes:
        label: as tables show it.
        about: one line on what it does, with its source.
        training: what differs in [`DrumTrainingArguments`][drum_hf.training.DrumTrainingArguments]; whatever is not
            named is the same for all that are compared.
        query: the retrieval strategy that it starts from: which parts are compared, on both sides.
    """

    label: str
    about: str
    training: Mapping[str, Any]
    query: str = "sit+draft"


_DRUM = {"objective": "listwise", "weighting": "utility"}

#: Name -> method. Each is trained by the same trainer, on the same encoder and for as many scored pairs.
METHODS: dict[str, Method] = {
    "drum": Method(
        "DRUM", "list-wise, pairs weighted by the difference in utility (DRUM; the weights are ours)", _DRUM
    ),
    "drum-rank": Method(
        "DRUM (rank weights)",
        "list-wise, pairs weighted by the LVLM's ranks (DRUM with the weights of UDR's paper)",
        _DRUM | {"weighting": "rank"},
    ),
    "drum-position": Method(
        "DRUM (position weights)",
        "list-wise, pairs weighted by the retriever's own places (DRUM with the weights of UDR's released code)",
        _DRUM | {"weighting": "position"},
    ),
    "drum-kl": Method(
        "DRUM (KL)",
        "list-wise, by KL divergence to the LVLM's distribution over the list (LLM-R's loss in DRUM's place)",
        _DRUM | {"weighting": "kl"},
    ),
    "udr": Method(
        "UDR-style",
        "rank weights, UDR's lists, candidates by rank alone, no draft (after UDR, ACL 2023); unlike UDR's, queries "
        "have an image, pools keep earlier rounds' candidates, vectors have unit length and there is a temperature",
        _DRUM | {"weighting": "rank", "hard_candidates": False, "random_share": 0.0},
        query="sit",
    ),
    "epr": Method(
        "EPR",
        "contrastive, one of the LVLM's five best against its five worst and the batch (EPR, NAACL 2022); with draft, "
        "rounds and first candidates as DRUM has them",
        {"objective": "contrastive"},
    ),
    "msier": Method(
        "MSIER",
        "contrastive, query side alone trained, on the image alone, against candidates as the untrained encoder sees "
        "them (MSIER, arXiv 2404.12866); candidates by their image, too, since like is compared with like",
        {"objective": "contrastive", "frozen_candidates": True},
        query="si",
    ),
    "drum-no-draft": Method(
        "DRUM without draft", "responses and drafts are not compared (ablation)", _DRUM, query="sit"
    ),
    "drum-no-image": Method(
        "DRUM without image",
        "images are not compared; the LVLM still sees the query's when it drafts (ablation)",
        _DRUM,
        query="st+draft",
    ),
    "drum-no-prompt": Method("DRUM without prompt", "prompts are not compared (ablation)", _DRUM, query="si+draft"),
    "drum-no-list": Method(
        "DRUM without list-wise loss", "the in-batch term alone (ablation)", _DRUM | {"rank_weight": 0.0}
    ),
    "drum-no-in-batch": Method(
        "DRUM without in-batch term", "the list-wise term alone (ablation)", _DRUM | {"rank_weight": 1.0}
    ),
    "drum-no-mining": Method(
        "DRUM without mining",
        "all pairs bought in round one by the untrained retriever; as many pairs, epochs and random candidates "
        "(ablation)",
        _DRUM | {"mine_once": True},
    ),
}
