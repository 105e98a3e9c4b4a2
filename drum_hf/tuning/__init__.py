"""ICL tuning: teaching an LVLM to use demonstrations ("Towards Multimodal In-Context Learning …", Doveh et al.)."""

from .arguments import ICLTuningArguments
from .averaging import average_weights
from .collator import ConversationCollator, ConversationFormat
from .config import TuningConfig
from .sampling import LengthSampler
from .trainer import ICLTuner, TuningData

__all__ = [
    "ConversationCollator",
    "ConversationFormat",
    "ICLTuner",
    "ICLTuningArguments",
    "LengthSampler",
    "TuningConfig",
    "TuningData",
    "average_weights",
]
