"""Training a demonstration retriever with an LVLM's feedback."""

from .calibration import calibrate
from .losses import ContrastiveLVLMLoss, ListwiseLVLMLoss
from .mining import CandidateTable, mine_candidates, mine_set_level
from .trainer import DrumTrainer, DrumTrainingArguments

__all__ = [
    "CandidateTable",
    "ContrastiveLVLMLoss",
    "DrumTrainer",
    "DrumTrainingArguments",
    "ListwiseLVLMLoss",
    "calibrate",
    "mine_candidates",
    "mine_set_level",
]
