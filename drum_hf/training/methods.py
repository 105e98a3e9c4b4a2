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


_DRUM: dict[str, Any] = {"loss": "listwise", "weighting": "utility"}
#: What the ancestors have in common: the in-batch term wants the list's best, every demonstration is scored alone.
_ANCESTORS: dict[str, Any] = {"in_batch": "best", "set_level_rounds": 0}

#: Name -> method. Each is trained by the same trainer, on the same encoder and for as many scored pairs.
METHODS: dict[str, Method] = {
    "drum": Method(
        "DRUM",
        "list-wise, pairs weighted by the difference in utility, soft in-batch targets, the last round by "
        "set-level scoring (DRUM; these three are ours)",
        _DRUM,
    ),
    "drum-rank": Method(
        "DRUM (rank weights)",
        "list-wise with rank weights, the best of a list against the batch, scored alone: DRUM as near to its paper "
        "as is known (its ancestor UDR's loss)",
        _ANCESTORS | {"loss": "listwise", "weighting": "rank"},
    ),
    "drum-rank-weights": Method(
        "DRUM with rank weights", "rank weights in place of utility (ablation)", _DRUM | {"weighting": "rank"}
    ),
    "drum-best": Method(
        "DRUM without soft targets",
        "the in-batch term wants the list's best, as UDR's does (ablation)",
        _DRUM | {"in_batch": "best"},
    ),
    "drum-alone": Method(
        "DRUM without set-level scoring",
        "the last round buys new pairs, as the others do (ablation)",
        _DRUM | {"set_level_rounds": 0},
    ),
    "drum-position": Method(
        "DRUM with position weights",
        "pairs weighted by the retriever's own places, as in UDR's released code, in place of utility (ablation)",
        _DRUM | {"weighting": "position"},
    ),
    "drum-kl": Method(
        "DRUM with KL",
        "KL divergence to the LVLM's distribution over the list (ListNet, LLM-R's loss) in place of pairs (ablation)",
        _DRUM | {"loss": "listnet"},
    ),
    "udr": Method(
        "UDR-style",
        "rank weights, UDR's lists (exactly one of the best and one of the worst), candidates by rank alone, no draft "
        "(after UDR, ACL 2023); unlike UDR's, queries have an image, pools keep earlier rounds' candidates, vectors "
        "have unit length and there is a temperature",
        _ANCESTORS
        | {
            "loss": "listwise",
            "weighting": "rank",
            "ends_once": True,
            "hard_candidates": False,
            "random_share": 0.0,
        },
        query="sit",
    ),
    "epr": Method(
        "EPR",
        "contrastive, one of the LVLM's five best against its five worst and the batch (EPR, NAACL 2022); with draft, "
        "rounds and first candidates as DRUM has them; EPR samples one of the five worst, as epr-1 does",
        _ANCESTORS | {"loss": "contrastive"},
    ),
    "epr-1": Method(
        "EPR (one hard negative)",
        "contrastive, one of the LVLM's five best against one of its five worst and the batch, as in EPR's code; else "
        "as epr",
        _ANCESTORS | {"loss": "contrastive", "hard_negatives": 1},
    ),
    "msier": Method(
        "MSIER",
        "contrastive with one hard negative, query side alone trained, on the image alone, against candidates as the "
        "untrained encoder sees them (MSIER, arXiv 2404.12866); candidates by their image, too, since like is "
        "compared with like",
        _ANCESTORS | {"loss": "contrastive", "hard_negatives": 1, "frozen_candidates": True},
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
        "all pairs bought in round one by the untrained retriever, each alone; as many pairs, epochs and random "
        "candidates (ablation; beside DRUM without set-level scoring)",
        _DRUM | {"mine_once": True},
    ),
}
