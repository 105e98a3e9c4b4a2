"""Training a demonstration retriever with an LVLM's feedback."""

from .losses import ContrastiveLVLMLoss, ListwiseLVLMLoss
from .mining import CandidateTable, mine_candidates
from .trainer import DrumTrainer, DrumTrainingArguments

__all__ = [
    "CandidateTable",
    "ContrastiveLVLMLoss",
    "DrumTrainer",
    "DrumTrainingArguments",
    "ListwiseLVLMLoss",
    "mine_candidates",
]
