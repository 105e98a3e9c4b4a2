"""In-context learning as transformers pipelines: `icl-vqa`, `icl-image-classification`, `icl-image-captioning`.

Each retrieves demonstrations for its inputs, shows them to the LVLM before the question, and answers in the shape that
the transformers pipeline of its kind does. Importing this module registers the three tasks with transformers.

```python
vqa = transformers.pipeline("icl-vqa", model="HuggingFaceTB/SmolVLM-256M-Instruct", retriever="me/drum-okvqa")
vqa(image="bus.jpg", question="What colour is the bus?")  # [{"answer": …, "demonstrations": […]}]
```

`drum_hf.pipeline` takes any other LVLM as well, such as one behind an endpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import math
import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from ..errors import RowError, ScoringUnsupportedError
from ..lvlm.local.model import TransformersLVLM
from ..retriever.queries import as_query
from ..selection import Order, Selector, TokenBudget, get_selector
from ..types import LVLM, Demonstration, ICLRequest, Query
from ..utils.files import replacing_folder
from ..utils.optional import resolve_name
from ..utils.safe_models import MODEL_FILES
from ..utils.text import normalize_text
from .inputs import as_inputs, pairs
from .models import DEFAULT_LVLM, UnnamedLVLM, find_processor, find_retriever, no_teacher, teacher_of

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever

__all__ = [
    "DEFAULT_LVLM",
    "ICLImageCaptioningPipeline",
    "ICLImageClassificationPipeline",
    "ICLPipeline",
    "ICLVQAPipeline",
    "pipeline",
]

logger = logging.getLogger(__name__)

#: Inputs that an LVLM elsewhere gets at once, unless it says how many it takes.
_AT_ONCE = 16
#: Labels that a prompt names where the LVLM can't score them, at most.
_NAMED_LABELS = 100


class _Elsewhere:
    """Stands in, before transformers' Pipeline, for the model of an LVLM that is none of transformers'."""

    device = torch.device("cpu")
    dtype = None
    config = SimpleNamespace(_commit_hash=None, task_specific_params=None)
    input_modalities, output_modalities = ("image", "text"), ("text",)
    padding_value = padding_side = None  # it stands in for a feature extractor, too

    def can_generate(self) -> bool:
        return False


# Hooks of Pipeline are declared wider than any pipeline's; they are narrowed here as in transformers' own subclasses.
class ICLPipeline(Pipeline):
    """What the in-context learning pipelines share: inputs, draft, retrieval, and the conversation shown to the LVLM.

    Args:
        model: an image-text-to-text model, or any `LVLM`, such as an `OpenAILVLM`.
        processor: its processor; loaded from where the model came from if left out.
        retriever: a `DemoRetriever`, its directory or Hub id; None answers zero-shot, without demonstrations.
        lvlm: a `TransformersLVLM` around `model`, whose settings (system turn, image position, batch limits) are kept;
            made from model and processor if left out.
        local_files_only: load a retriever that is named from files that are here already.
        num_shots: demonstrations a query; 0 for none. 4 unless told.
        order: whether the most useful demonstration stands last, nearest the query ("best_last", UDR's order and the
            default), or first ("best_first").
        selector: chooses the demonstrations from the best-ranked candidates together: a name for
            [`get_selector`][drum_hf.selection.get_selector], such as "mmr", or a selector. "budget" is as many, of
            `num_shots`, as fit this LVLM's context beside an answer of `max_new_tokens`. None, the default: the
            best-ranked themselves.
        draft: whether the LVLM first answers without demonstrations and the retriever reads that answer with the query
            (DRUM's draft response). "auto", the default: if the retriever gives responses any weight. An input that
            brings its own `draft` needs no such pass.
        max_new_tokens: the longest answer, and the longest draft. 32 unless told (64 for captions).
        prompt: what is asked where an input asks nothing. Default: the support set's most common prompt.
        urls: whether images may be http(s) addresses: False, the default; True, on public hosts; or "private", on
            hosts of this machine and its network as well.
        timeout: seconds for an address to be fetched, in all. 20 unless told.
        return_demonstrations: whether `demonstrations` stand in the results.
        kwargs: `task`, `device`, `batch_size`, `num_workers`, … as in every transformers pipeline.

    Every argument from `num_shots` to `return_demonstrations` may also be given to a call, for that call.

    Answers are greedy. Errors: those of the retriever (such as `TooFewDemonstrationsError`) and of
    `TransformersLVLM` (such as `ContextOverflowError`), and
        RowError: an input can't be used.
        ImageError: its image can't be read.
    """

    # Tried, and loaded by us where that fails: some processors want torchvision for videos that are never shown.
    _load_processor = None
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False
    # False keeps `max_new_tokens` and `top_k` arguments of ours, and refuses sampling ones instead of ignoring them:
    # TransformersLVLM.generate is greedy.
    _pipeline_calls_generate = False

    #: What is asked where neither the input nor the support set says so (our choice).
    fallback_prompt = ""
    #: Longest answer, in tokens (our choice).
    default_max_new_tokens = 32
    #: Whether results hold their demonstrations.
    default_return_demonstrations = True

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        retriever: DemoRetriever | str | os.PathLike[str] | None = None,
        lvlm: TransformersLVLM | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> None:
        self.lvlm: Any = lvlm
        if _is_lvlm(model):
            self.lvlm, model = model, _Elsewhere()
            at_once = getattr(self.lvlm, "max_concurrency", None) or _AT_ONCE
            kwargs = {"batch_size": at_once} | kwargs | {"device": "cpu", "feature_extractor": model}
        self.retriever = find_retriever(retriever, local_files_only=local_files_only)
        if isinstance(model, UnnamedLVLM):
            model, processor = model.load(self.retriever, kwargs.get("dtype"), local_files_only)
        if self.lvlm is not None and kwargs.get("device") is None and not hasattr(model, "hf_device_map"):
            kwargs["device"] = model.device  # where the user put it, not the first accelerator
        if processor is None and not isinstance(model, _Elsewhere):
            processor = find_processor(model, local_files_only)
        super().__init__(model=model, processor=processor, **kwargs)
        if self.lvlm is None:
            self.lvlm = TransformersLVLM(self.model, processor, batch_size=self._batch_size or 16)
        self._common_prompt: tuple[Any, str] | None = None
        teacher = teacher_of(self.retriever)
        name = getattr(self.lvlm, "name", None)
        if teacher is not None and name is not None and teacher[0] != name:
            logger.info("the retriever learned from %s; %s answers", teacher[0], name)

    # ---- what a user calls ----

    def __call__(self, image: Any = None, prompt: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Answer one input or many.

        Args:
            image: a picture, given as whatever [`load_image`][drum_hf.data.load_image] takes (path, PIL image, bytes,
                array, base64 text, …); or an input: a dict with `image`, `prompt` (or `question`) and, where wanted,
                `draft`, `id` and `group`, or a `Query`; or several of either: a list, a generator, a
                `datasets.Dataset`, a data frame, a `TripletTable`. The row and the group that an input names are
                never among its demonstrations.
            prompt: what is asked of every input that asks nothing itself; or a list, one for each image.
            kwargs: arguments of the pipeline for this call, and `batch_size`, `num_workers`.

        Returns:
            For one input its result, a list of dicts; for a list a list of results; for a generator, a data set or a
            table an iterator over results, made as they are asked for.

        Raises:
            TypeError: an argument is unknown.
        """
        self._refuse_unknown(kwargs.keys() - {*self._arguments(), "batch_size", "num_workers"})
        if isinstance(prompt, (list, tuple)):
            image = pairs(image, prompt)
        elif prompt is not None:
            kwargs["prompt"] = prompt
            image = {"image": None} if image is None else image
        elif image is None:
            raise ValueError(f"expected an image, a dict or several of them for {self.task}, got nothing")
        inputs = as_inputs(image)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the LVLM and its processor, and the retriever in the folder `retriever`.

        All of it loads again with `pipeline(task, model=save_directory, retriever=f"{save_directory}/retriever")`.

        Args:
            save_directory: created if it is missing.
            kwargs: for the model's and the processor's `save_pretrained`.
        """
        self._refuse_elsewhere()
        # Not the base class's way, which leaves the processor out and would write our source beside the weights.
        with replacing_folder(save_directory, owns=MODEL_FILES) as folder:
            self.model.save_pretrained(folder, **kwargs)
            self.lvlm.processor.save_pretrained(folder, **kwargs)
        if self.retriever is not None:
            self.retriever.save_pretrained(os.path.join(save_directory, "retriever"))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the LVLM and its processor; the retriever has a `push_to_hub` of its own, for a repository of its own.

        Args:
            repo_id: such as "me/my-lvlm".
            kwargs: for the model's and the processor's `push_to_hub`.

        Returns:
            Address of the last commit.
        """
        self._refuse_elsewhere()
        model: Any = self.model  # transformers wraps the method in a way that types lose `self`
        model.push_to_hub(repo_id, **kwargs)
        return self.lvlm.processor.push_to_hub(repo_id, **kwargs)

    def _refuse_elsewhere(self) -> None:
        if isinstance(self.model, _Elsewhere):
            raise ValueError(
                f"expected an LVLM of transformers to save, got {self.lvlm!r}, whose weights are elsewhere; save the "
                "retriever"
            )

    # ---- what Pipeline asks for ----

    def _sanitize_parameters(  # type: ignore[override]
        self,
        num_shots: int | None = None,
        order: Order | None = None,
        selector: str | Selector | None = None,
        draft: bool | Literal["auto"] | None = None,
        max_new_tokens: int | None = None,
        prompt: str | None = None,
        urls: bool | Literal["private"] | None = None,
        timeout: float | None = None,
        return_demonstrations: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        self._refuse_unknown(unknown)
        if num_shots is not None and (isinstance(num_shots, bool) or not isinstance(num_shots, int) or num_shots < 0):
            raise ValueError(f"expected num_shots to be 0 or more, got {num_shots!r}")
        if num_shots and self.retriever is None:
            raise ValueError(
                f"num_shots={num_shots} demonstrations were asked for, but there is nothing to retrieve them from; "
                "pass retriever= a DemoRetriever, its directory or Hub id, or leave num_shots out for zero-shot"
            )
        if order not in (None, "best_last", "best_first"):
            raise ValueError(f'expected order "best_last" or "best_first", got {order!r}')
        if selector is not None and selector != "budget":
            selector = get_selector(selector)
        if draft not in (None, "auto", True, False):
            raise ValueError(f'expected draft "auto", True or False, got {draft!r}')
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"expected a prompt as text, got {type(prompt).__name__}")
        forward = {
            "num_shots": num_shots,
            "order": order,
            "selector": selector,
            "draft": draft,
            "max_new_tokens": max_new_tokens,
        }
        return (
            _given({"prompt": prompt, "urls": urls, "timeout": timeout}),
            _given(forward),
            _given({"return_demonstrations": return_demonstrations}),
        )

    @classmethod
    def _arguments(cls) -> list[str]:
        """What may be given to a call."""
        hooks = (ICLPipeline._sanitize_parameters, cls._sanitize_parameters)
        given = [each for hook in hooks for each in inspect.signature(hook).parameters.values()]
        return list(dict.fromkeys(p.name for p in given if p.kind != p.VAR_KEYWORD and p.name != "self"))

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            near = difflib.get_close_matches(name, [*self._arguments(), "image", "question", "batch_size"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self._arguments())}"
            raise TypeError(f"{self.task} got an unknown argument {name!r}; {hint}")

    def preprocess(self, input_: Any, prompt: str | None = None, **images: Any) -> dict[str, Any]:  # type: ignore[override]
        def ask() -> str:
            return self._default_prompt() if prompt is None else prompt

        return {"query": as_query(input_, name="input", default_prompt=ask, **images)}

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> Any:
        # A single query comes by itself, a batch as a list; results leave in the same shape.
        queries = input_tensors["query"]
        single = isinstance(queries, Query)
        results = self._run([queries] if single else queries, **parameters)
        return {name: values[0] for name, values in results.items()} if single else results

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, return_demonstrations: bool | None = None, **task_parameters: Any
    ) -> list[dict[str, Any]]:
        results = self._results(model_outputs["answer"], **task_parameters)
        if self.default_return_demonstrations if return_demonstrations is None else return_demonstrations:
            for result in results:
                result["demonstrations"] = model_outputs["demonstrations"]
        return results

    @abstractmethod
    def _results(self, answer: Any) -> list[dict[str, Any]]:
        """One answer in the task's shape."""

    # ---- the work ----

    def _run(
        self,
        queries: list[Query],
        *,
        num_shots: int = 4,
        order: Order = "best_last",
        selector: str | Selector | None = None,
        draft: bool | Literal["auto"] = "auto",
        max_new_tokens: int | None = None,
        **task_parameters: Any,
    ) -> dict[str, list[Any]]:
        max_new_tokens = max_new_tokens or self.default_max_new_tokens
        answer = self._answerer(max_new_tokens=max_new_tokens, **task_parameters)
        shots: list[tuple[Demonstration, ...]] = [()] * len(queries)
        shown: list[list[dict[str, Any]]] = [[] for _ in queries]
        if self.retriever is not None and num_shots:
            asked = self._with_drafts(queries, draft, max_new_tokens)
            step = -1 if order == "best_last" else 1
            if selector == "budget":
                selector = TokenBudget(self.lvlm, reserve=max_new_tokens, order=order)
            # any callable may stand in for a retriever: it is told of a selector only where there is one
            chosen: dict[str, Any] = {} if selector is None else {"selector": selector}
            for i, found in enumerate(self.retriever(asked, k=num_shots, **chosen)):
                shots[i] = found.demonstrations[::step]
                shown[i] = found.to_dict()["demonstrations"][::step]
        requests = [ICLRequest(query, seen) for query, seen in zip(queries, shots, strict=True)]
        return {"answer": answer(requests), "demonstrations": shown}

    def _answerer(self, *, max_new_tokens: int) -> Callable[[list[ICLRequest]], list[Any]]:
        """How requests are answered; whatever is wrong with its parameters raises before any work is done."""
        return lambda requests: self.lvlm.generate(requests, max_new_tokens=max_new_tokens)

    def _with_drafts(self, queries: list[Query], draft: bool | Literal["auto"], max_new_tokens: int) -> list[Query]:
        """The queries as the retriever gets them: each with its own draft, with the LVLM's, or with an empty one."""
        bare = [i for i, query in enumerate(queries) if query.draft is None]
        texts = [""] * len(bare)  # not None: a retriever with an LVLM of its own would ask that
        if bare and (getattr(self.retriever, "uses_drafts", False) if draft == "auto" else draft):
            texts = self.lvlm.generate([ICLRequest(queries[i]) for i in bare], max_new_tokens=max_new_tokens)
        asked = list(queries)
        for i, text in zip(bare, texts, strict=True):
            asked[i] = dataclasses.replace(queries[i], draft=text)
        return asked

    def _default_prompt(self) -> str:
        if self.retriever is None:
            return self.fallback_prompt
        support = self.retriever.support
        if self._common_prompt is None or self._common_prompt[0] is not support:
            self._common_prompt = (support, Counter(support.prompts).most_common(1)[0][0])
        return self._common_prompt[1]


class ICLVQAPipeline(ICLPipeline):
    """Visual question answering from demonstrations: task `icl-vqa`. Arguments are those of `ICLPipeline`.

    Every input needs a question: `vqa(image=…, question=…)`, or dicts with `image` and `question` (or `prompt`). The
    result is `[{"answer": str, "demonstrations": [{"id", "prompt", "response", "score"}, …]}]`, demonstrations in the
    order shown to the LVLM.
    """

    def __call__(self, image: Any = None, question: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Answer one question or many; `question` is what `ICLPipeline` calls the prompt."""
        return super().__call__(image, kwargs.pop("prompt", None) if question is None else question, **kwargs)

    def _default_prompt(self) -> str:
        raise RowError(
            "expected a question for every image, got none; pass question=, or dicts with 'image' and 'question'"
        )

    def _results(self, answer: str) -> list[dict[str, Any]]:
        return [{"answer": answer}]


class ICLImageCaptioningPipeline(ICLPipeline):
    """Captions from demonstrations: task `icl-image-captioning`. Arguments are those of `ICLPipeline`.

    The result is `[{"generated_text": str, "demonstrations": [{"id", "prompt", "response", "score"}, …]}]`,
    demonstrations in the order shown to the LVLM.
    """

    fallback_prompt = "Describe the image in one sentence."
    default_max_new_tokens = 64

    def _results(self, answer: str) -> list[dict[str, Any]]:
        return [{"generated_text": answer}]


class ICLImageClassificationPipeline(ICLPipeline):
    """Classification from demonstrations: task `icl-image-classification`.

    The LVLM scores every candidate label as its answer, and the scores of all labels sum to 1. The result is
    `[{"label": str, "score": float}, …]`, best first; with `return_demonstrations=True` each also holds the
    `demonstrations` of its image.

    An LVLM that can't score, as most endpoints, is asked for its answer instead, with the labels named in the prompt.
    The result is the label that it names, with a score of 1; or the label None, where it names none or several.

    Args:
        candidate_labels: the classes. Default: the labels of the support set.
        top_k: labels in the result; 5 unless told, as in `image-classification`.
        kwargs: see `ICLPipeline`. `max_new_tokens` limits the draft, and the answer of an LVLM that can't score.
    """

    fallback_prompt = "What does the image show?"
    default_return_demonstrations = False

    def _sanitize_parameters(  # type: ignore[override]
        self, candidate_labels: Sequence[str] | None = None, top_k: int | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if candidate_labels is not None:
            forward["candidate_labels"] = _checked_labels(candidate_labels)
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"expected top_k of at least 1, got {top_k}")
            postprocess["top_k"] = top_k
        return preprocess, forward, postprocess

    def _answerer(
        self, *, max_new_tokens: int, candidate_labels: tuple[str, ...] = ()
    ) -> Callable[[list[ICLRequest]], list[Any]]:
        labels = candidate_labels or (self.retriever.support.label_set if self.retriever is not None else ())
        if not labels:
            source = "there is no retriever" if self.retriever is None else "the support set has no labels"
            raise ValueError(
                f"expected candidate_labels=, since {source} to take them from; pass the list of classes, or a "
                "retriever whose support set has a column 'label'"
            )

        def answer(requests: list[ICLRequest]) -> list[Any]:
            asked = [ICLRequest(r.query, r.demonstrations, choices=labels) for r in requests]
            if hasattr(self.lvlm, "label_scores"):
                return [dict(zip(labels, self.lvlm.label_scores(r).tolist(), strict=True)) for r in asked]
            if self._scores:
                try:
                    each = [dataclasses.replace(r, responses=(label,)) for r in asked for label in labels]
                    scores = self.lvlm.score(each).reshape(len(asked), len(labels))
                    return [dict(zip(labels, row.tolist(), strict=True)) for row in scores]
                except ScoringUnsupportedError as error:
                    self._scores = False
                    logger.warning("labels are read from answers, since they can't be scored: %s", error)
            named = f"\nAnswer with one of: {', '.join(labels)}." if len(labels) <= _NAMED_LABELS else ""
            texts = self.lvlm.generate(
                [ICLRequest(_asked_further(r.query, named), r.demonstrations) for r in requests],
                max_new_tokens=max_new_tokens,
            )
            return [{named_label(text, labels): 0.0} for text in texts]

        return answer

    #: Whether the LVLM may be able to score; False once it said that it can't.
    _scores = True

    def _results(self, answer: dict[str | None, float], top_k: int = 5) -> list[dict[str, Any]]:
        best = sorted(answer.items(), key=lambda item: item[1], reverse=True)[:top_k]
        return [{"label": label, "score": math.exp(score)} for label, score in best]


def _asked_further(query: Query, text: str) -> Query:
    return Query(query.image, query.prompt + text, query.draft, query.id, query.group)


def named_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names as words of it; of labels within one another the longest. None: none or several.

    >>> named_label("It is a polar bear.", ["bear", "polar bear", "cat"])
    'polar bear'
    >>> named_label("a bear or a cat", ["bear", "polar bear", "cat"]) is None
    True
    """
    text, found = normalize_text(answer), set()
    for label in sorted(labels, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(normalize_text(label))}(?!\w)"
        if re.search(pattern, text):
            found.add(label)
            text = re.sub(pattern, "\n", text)
    return found.pop() if len(found) == 1 else None


_TASKS: dict[str, type[ICLPipeline]] = {
    "icl-vqa": ICLVQAPipeline,
    "icl-image-classification": ICLImageClassificationPipeline,
    "icl-image-captioning": ICLImageCaptioningPipeline,
}


def pipeline(
    task: str,
    model: Any = None,
    *,
    endpoint: str | Sequence[str] | None = None,
    retriever: DemoRetriever | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Any:
    """`transformers.pipeline` for the tasks of in-context learning, with the retriever's own LVLM as the default.

    Args:
        task: `icl-vqa`, `icl-image-classification` or `icl-image-captioning`.
        model: an image-text-to-text model: Hub id, directory, loaded model or `TransformersLVLM`; or any other `LVLM`,
            such as an `OpenAILVLM`. Default: the LVLM that the retriever learned from, at the revision it recorded.
        endpoint: address of a chat endpoint, or several; `model` is then its name there. The key is in the environment
            variable OPENAI_API_KEY; for other settings pass an `OpenAILVLM` as `model`.
        retriever: a `DemoRetriever`, its directory or Hub id; None answers zero-shot, without demonstrations.
        revision: of the model.
        token, local_files_only: for both, where they are named.
        kwargs: see `ICLPipeline` and `transformers.pipeline`.

    Returns:
        The task's `ICLPipeline`.

    Raises:
        ValueError: the task is not one of the three; there is neither a model nor a retriever that names one, or an
            endpoint without the model's name there; or an argument is out of range.
        OSError: there is no such model or retriever.
    """
    import transformers

    build: Any = transformers.pipeline  # typed for its own tasks alone
    if task not in _TASKS:
        raise ValueError(f"expected one of the tasks {', '.join(_TASKS)}, got {task!r}; use transformers.pipeline")
    loaded = find_retriever(retriever, token=token, local_files_only=local_files_only)
    if local_files_only:
        kwargs["local_files_only"] = True
    if endpoint is not None:
        from ..lvlm.endpoint.model import OpenAILVLM

        if not isinstance(model, str):
            raise ValueError(f"expected model= as the model's name at {endpoint!r}, got {type(model).__name__}")
        model = OpenAILVLM(model, base_url=endpoint, revision=revision)
    if _is_lvlm(model):
        return _TASKS[task](model, retriever=loaded, task=task, **kwargs)
    if isinstance(model, TransformersLVLM):
        kwargs |= {"lvlm": model, "processor": model.processor}
        model = model.model
    if isinstance(model, (str, os.PathLike)):
        model = resolve_name(model)
    if model is not None:
        return build(task, model=model, revision=revision, token=token, retriever=loaded, **kwargs)
    teacher = teacher_of(loaded)
    if teacher is None:
        found = "no retriever" if loaded is None else "a retriever that records no teacher"
        raise ValueError(
            f"expected model=, or a retriever that names the LVLM it learned from, got {found}; pass "
            f"model= with a directory or Hub id, such as {DEFAULT_LVLM[0]!r}"
        )
    name, recorded = teacher
    try:
        return build(
            task, model=resolve_name(name), revision=revision or recorded, token=token, retriever=loaded, **kwargs
        )
    except OSError as error:
        raise no_teacher(name, error) from error


def _is_lvlm(model: Any) -> bool:
    """Whether it is an LVLM that is none of transformers'."""
    return not isinstance(model, (torch.nn.Module, TransformersLVLM, str, os.PathLike)) and isinstance(model, LVLM)


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    # Pipeline lays a call's parameters over those of its construction: what is not given must not be there.
    return {name: value for name, value in parameters.items() if value is not None}


def _checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f"expected candidate_labels as a list of one text or more, got {labels!r}")
    stripped = tuple(label.strip() for label in labels)
    twice = [label for label, count in Counter(stripped).items() if count > 1]
    if twice:
        raise ValueError(f"expected distinct candidate_labels, got {twice[0]!r} more than once")
    return stripped


def _register() -> None:
    for task, pipeline_class in _TASKS.items():
        if PIPELINE_REGISTRY.supported_tasks.get(task, {}).get("impl") is not pipeline_class:
            PIPELINE_REGISTRY.register_pipeline(
                task,
                pipeline_class=pipeline_class,
                pt_model=AutoModelForImageTextToText,
                default={"model": (UnnamedLVLM(), None)},
                type="multimodal",
            )


_register()
