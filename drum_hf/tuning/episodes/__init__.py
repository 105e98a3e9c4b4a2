"""In-context conversations for tuning an LVLM: from concept-labelled pictures to episodes, mixes and a curriculum.

A conversation's turns share one concept to be inferred (an attribute, a category, a relation, a scene, an instance),
with at most one image a human turn. As the loss falls on every answer, turn k is a (k - 1)-shot sample and one
conversation trains every number of shots ("Towards Multimodal In-Context Learning for Vision & Language Models",
Doveh et al., 2024).

- `ConceptTable` holds pictures and what they show; `read_labels`, `read_seed_bench` and `read_vl_checklist` make one
  from public formats, `split_concepts` makes train and test of it, and `check_disjoint` says whether they are apart;
- `Episodes` draws conversations from a table as `EpisodeSettings` say;
- `read_llava` and `read_messages` read conversations that exist already, such as instruction data to replay;
- `Mix` draws from several `MixSource`s as a `Curriculum` says and reports what came of it.

Everything is drawn with generators seeded by (seed, number), so that any worker can draw any conversation again.
"""

from __future__ import annotations

from .curriculum import DEFAULT_CURRICULUM, Curriculum, Stage
from .draw import choice_prompt
from .episode_list import ConversationList, read_llava, read_messages, to_dataset
from .maker import Episodes
from .mix import Mix, MixReport, MixSource
from .readers import (
    SEED_HELD_OUT,
    SEED_TRAINED,
    SEED_TYPES,
    SEED_UNSEEN,
    read_labels,
    read_seed_bench,
    read_vl_checklist,
)
from .settings import EpisodeSettings
from .split import check_disjoint, split_concepts
from .tables import ConceptRow, ConceptTable, Contents
from .types import Conversation, Form, Turn

__all__ = [
    "ConceptRow",
    "ConceptTable",
    "Contents",
    "Conversation",
    "ConversationList",
    "Curriculum",
    "DEFAULT_CURRICULUM",
    "EpisodeSettings",
    "Episodes",
    "Form",
    "Mix",
    "MixReport",
    "SEED_HELD_OUT",
    "SEED_TRAINED",
    "SEED_TYPES",
    "SEED_UNSEEN",
    "MixSource",
    "Stage",
    "Turn",
    "check_disjoint",
    "choice_prompt",
    "read_labels",
    "read_llava",
    "read_messages",
    "read_seed_bench",
    "read_vl_checklist",
    "split_concepts",
    "to_dataset",
]
