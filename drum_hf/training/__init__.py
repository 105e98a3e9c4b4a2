"""Training a demonstration retriever with an LVLM's feedback."""

from .arguments import DrumTrainingArguments
from .calibration import calibrate
from .losses import ContrastiveLVLMLoss, ListwiseLVLMLoss, LVLMLoss, register_loss
from .mining import CandidateTable, mine_candidates, mine_set_level
from .trainer import DrumTrainer

__all__ = [
    "CandidateTable",
    "ContrastiveLVLMLoss",
    "DrumTrainer",
    "DrumTrainingArguments",
    "LVLMLoss",
    "ListwiseLVLMLoss",
    "calibrate",
    "mine_candidates",
    "mine_set_level",
    "register_loss",
]
