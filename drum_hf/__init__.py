"""Learn which demonstrations your large vision-language model needs in its prompt, and retrieve them.

Importing the package loads neither torch nor transformers: a name brings its module along when it is first used. The
tasks `icl-vqa`, `icl-image-classification` and `icl-image-captioning` are there for `transformers.pipeline` as soon as
this package and `transformers.pipelines` are both imported, in either order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .data import TripletTable, load_table
    from .encoders import JointEncoder
    from .evaluation.evaluator import ICLEvaluator
    from .index import DemoIndex
    from .lvlm.endpoint import OpenAILVLM
    from .lvlm.local import TransformersLVLM
    from .pipelines import pipeline
    from .retriever import DemoRetriever
    from .scores import ScoreStore
    from .training import DrumTrainer, DrumTrainingArguments, ListwiseLVLMLoss
    from .tuning import ICLTuner, ICLTuningArguments
    from .types import Demonstration, Query, Retrieval

__version__ = "0.1.0.dev0"

__all__ = [
    "DemoIndex",
    "DemoRetriever",
    "Demonstration",
    "DrumTrainer",
    "DrumTrainingArguments",
    "ICLEvaluator",
    "ICLTuner",
    "ICLTuningArguments",
    "JointEncoder",
    "ListwiseLVLMLoss",
    "OpenAILVLM",
    "Query",
    "Retrieval",
    "ScoreStore",
    "TransformersLVLM",
    "TripletTable",
    "__version__",
    "load_table",
    "pipeline",
]

#: Public name -> the module it lives in.
_MODULES = {
    "DemoIndex": "index",
    "DemoRetriever": "retriever",
    "Demonstration": "types",
    "DrumTrainer": "training",
    "DrumTrainingArguments": "training",
    "ICLEvaluator": "evaluation.evaluator",
    "ICLTuner": "tuning",
    "ICLTuningArguments": "tuning",
    "JointEncoder": "encoders",
    "ListwiseLVLMLoss": "training",
    "OpenAILVLM": "lvlm.endpoint",
    "Query": "types",
    "Retrieval": "types",
    "ScoreStore": "scores",
    "TransformersLVLM": "lvlm.local",
    "TripletTable": "data",
    "load_table": "data",
    "pipeline": "pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.pipelines")
def _register_pipelines(_: Any) -> None:
    # By name alone: where drum_hf.pipelines itself brought transformers in, it is still being imported here, and
    # registers its tasks at its end.
    importlib.import_module(".pipelines", __name__)
