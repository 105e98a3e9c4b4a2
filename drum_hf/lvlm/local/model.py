"""`TransformersLVLM`: a model that runs here, scored and asked through stock transformers.

A score needs one forward pass over "conversation + response without its last token", with logits only where the
response stands. Where the loaded family lets it (a trial decides, by comparing the results: see `capabilities`), an
image passes the vision tower once, demonstrations that several queries share pass the decoder once, and several
answers to one conversation share all but themselves. Where it doesn't, conversations are run whole, padded on the
left, or one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DependencyError, ModelError, UnfinishedReasoningError
from ...types import ICLRequest
from ...utils.files import settled
from ...utils.hub import fetch_snapshot
from ...utils.optional import loading, local_name, require
from ...utils.safe_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_model, reading_adapter
from ..answers import REASONING_MARKERS, combine_answers, log_softmax, wanted_answers, without_reasoning
from ..fingerprint import Identity, describe
from ..prompts import ChatFormat, ImagePosition
from .processors import ImageBudget, coarsest, default_budget, image_tokens, load_processor, with_budget
from .runner import Capabilities, Runner, context_length, progress_bar

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["TransformersLVLM"]

logger = logging.getLogger(__name__)


class TransformersLVLM:
    """A Hugging Face image-text-to-text model as an `LVLM`.

    The model is taken as frozen: its fingerprint and its images' features are computed once and kept.

    Args:
        model: any `AutoModelForImageTextToText` model; set to evaluation mode.
        processor: its processor, with a fast tokenizer and a chat template.
        name: what to call it; default: where it was loaded from, or the name of a model that ships with the package.
        revision: commit of the Hub repository `name` that the weights are from, unchanged. Where given, the
            fingerprint trusts it; else the weights are hashed.
        batch_size: sequences a forward pass, at most.
        max_batch_tokens: tokens a forward pass, padding included; one longer sequence still runs alone. None: found
            from the model's size and the free memory. When memory runs out, batches are halved, and stay so.
        image_position: a turn's image before ("first") or after ("last") its text.
        system: text of a system turn, or None for what the template writes by itself.
        score_end_of_turn: whether the token that ends the assistant's turn counts as the response's last. None (our
            choice): where one choice of a request begins another, such as "1" and "10", since the longer one could
            never be likelier; and nowhere else, since the mean over few tokens would be dominated by it.
        chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": True}`. Reasoning is off
            where the template has a switch for it and this doesn't set it; a date that the template writes is always
            the same one (2024-07-26), unless this sets `date_string`.
        image_budget: how closely images are looked at: tokens an image, at most (the finest setting of the family that
            stays below), or arguments of the family's image processor, such as `{"do_image_splitting": False}`,
            `{"max_pixels": 401408}`, `{"max_patches": 4}`; "published" as the processor was saved. "auto" (our
            choice): as it was saved where eight shots fit the context so; else images aren't cut into tiles, and
            those of families that keep an image's size are made smaller.
        query_image_budget: the same for queries' images; None: `image_budget`.
        reasoning_markers: pairs of texts between which a model reasons before it answers; answers come without.
        image_cache_bytes: features of the most recent images that are kept, in the host's memory. None: a quarter of
            what is free, at most 4 GiB (our choice), which holds some 29,000 images of 64 tokens x 576 floats.
        image_cache_dir: folder for the features that memory has no room for, so that they are read rather than
            computed again, by later runs too; a folder in it belongs to one `fingerprint`. None: they are dropped.

    Raises:
        ChatTemplateError: the processor has no chat template, or one that loses text or images or knows nothing of a
            variable.
        ModelError: the model is no decoder of text: its answers can't be scored.
        ValueError: a limit is below 1, or the family has no image budget as asked for.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        batch_size: int = 64,
        max_batch_tokens: int | None = None,
        image_position: ImagePosition = "first",
        system: str | None = None,
        score_end_of_turn: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        image_budget: ImageBudget = "auto",
        query_image_budget: ImageBudget | None = None,
        reasoning_markers: Sequence[tuple[str, str]] = REASONING_MARKERS,
        image_cache_bytes: int | None = None,
        image_cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if batch_size < 1 or (max_batch_tokens is not None and max_batch_tokens < 1):
            raise ValueError(f"expected positive batch limits, got {batch_size=} and {max_batch_tokens=}")
        self.model = model.eval()
        self.name = local_name(name or getattr(model, "name_or_path", "") or type(model).__name__)
        self.revision = revision
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"expected a model that continues a conversation, but {self.name} ({type(model).__name__}) is an "
                "encoder with a decoder; use one of the families in docs/scoring.md"
            )
        self._published = processor
        self.image_budget: ImageBudget = image_budget
        if image_budget == "auto":
            tokenizer = getattr(processor, "tokenizer", processor)
            self.image_budget = default_budget(processor, context_length(model, tokenizer))
            if self.image_budget != "published":
                logger.info(
                    "%s: eight shots would not fit its context with images as published; image_budget=%s",
                    self.name,
                    self.image_budget,
                )
        self.query_image_budget = query_image_budget
        self.processor = with_budget(processor, self.image_budget)
        self._query_processor = None if query_image_budget is None else with_budget(processor, query_image_budget)
        self.reasoning_markers = tuple((begin, end) for begin, end in reasoning_markers)
        self.format = ChatFormat(
            self.processor,
            image_position=image_position,
            system=system,
            score_end_of_turn=score_end_of_turn,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.tokenizer = self.format.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # any would do: padding is masked
        self._runner = Runner(
            self.model,
            self.format,
            name=self.name,
            query_processor=self._query_processor,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            image_cache_bytes=image_cache_bytes,
            image_folder=None if image_cache_dir is None else lambda: Path(image_cache_dir) / self.fingerprint,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: Any = "auto",
        device: str | torch.device | None = None,
        adapter: str | None = None,
        adapter_revision: str | None = None,
        trust_remote_code: bool = False,
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> TransformersLVLM:
        """Load model and processor from a directory or the Hub.

        Args:
            name_or_path: directory or Hub id; "playground/lvlm" is the one that ships with the package.
            revision, token, cache_dir, local_files_only, force_download: as everywhere in transformers.
            trust_remote_code: load pickles, and run code that the model's files name. False: the files are checked,
                and only plain values, texts and safetensors are read.
            dtype: "auto" takes the one the weights are saved in.
            device: default: CUDA where there is one, else CPU. Leave it out with `device_map`.
            adapter, adapter_revision: directory or Hub id of a PEFT adapter, merged into the weights; branch, tag or
                commit of the latter.
            device_map, attn_implementation, quantization_config: as in transformers; "auto" spreads the model over
                all devices.
            load_in_4bit, load_in_8bit: quantize by bitsandbytes with its defaults.
            model_kwargs: more for `AutoModelForImageTextToText.from_pretrained`.
            settings: arguments of the class, such as `image_budget` and `chat_template_kwargs`.

        Raises:
            ChatTemplateError: see the class.
            ModelError: there is no such model, or one of a family that the Auto class doesn't know; an OSError, too.
            DependencyError: loading it needs a package that isn't installed.
            HubError: there is no such adapter.
            SavedFileError: the model's or adapter's files are damaged, are no safetensors, name code or other places,
                or the adapter is no LoRA, or for another model.
        """
        import torch

        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub["force_download"] = force_download
        if quantization_config is None and (load_in_4bit or load_in_8bit):
            quantization_config = _bitsandbytes(load_in_4bit, load_in_8bit)
        given = {"attn_implementation": attn_implementation, "device_map": device_map}
        given["quantization_config"] = quantization_config
        more = {**{key: value for key, value in given.items() if value is not None}, **(model_kwargs or {})}
        with loading("an LVLM", name_or_path):
            source = find_model(name_or_path, revision=revision, trust_remote_code=trust_remote_code, **hub)
            model = _load_model(source.place, dtype=dtype, **{**source.options, **source.weights, **more})
            commit = source.commit
            processor = load_processor(source.place, model.config, **source.options)
        if adapter is not None:
            from peft import PeftModel

            adapter = os.fspath(settled(adapter))
            if not os.path.isdir(adapter):  # peft would ask the Hub for what is in the cache, too
                adapter = os.fspath(
                    fetch_snapshot(
                        adapter,
                        patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS],  # no pickle
                        revision=adapter_revision,
                        **hub,
                    )
                )
            with reading_adapter(adapter):
                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
            commit = None  # the weights are no longer those of the commit
        if not {"device_map", "quantization_config"} & more.keys():
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, processor, name=str(name_or_path), revision=commit, **settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.model).__name__}, {self.model.dtype})"

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change with whatever a score depends on; computed on first use.

        That is: weights (an adapter's included), configuration, dtype, chat template, tokenizer, image processing,
        `image_position`, `system`, `score_end_of_turn`, `chat_template_kwargs`, the date, image budgets and
        `reasoning_markers`.
        """
        return self._described[0]

    @property
    def identity(self) -> Identity:
        """What the fingerprint is made of, by name; what is large stands there as a hash."""
        return dict(self._described[1])

    @cached_property
    def _described(self) -> tuple[str, Identity]:
        shown = {"image_budget": self.image_budget, "query_image_budget": self.query_image_budget}
        more: Identity = {k: None if v is None else json.dumps(v, sort_keys=True) for k, v in shown.items()}
        if self.reasoning_markers != REASONING_MARKERS:
            more["reasoning_markers"] = json.dumps(self.reasoning_markers)
        return describe(self.model, self.format, name=self.name, revision=self.revision, more=more)

    @property
    def batch_size(self) -> int:
        """Sequences a forward pass, at most."""
        return self._runner.limits.rows

    @property
    def max_batch_tokens(self) -> int:
        """Tokens a forward pass, at most; less than was set where memory ran out."""
        return self._runner.limits.tokens

    @property
    def capabilities(self) -> Capabilities:
        """Which ways of running this model leave its results as they are; tried out on first use, on small images."""
        runner = self._runner
        return dataclasses.replace(runner.capabilities, generation=runner.generation)

    def image_tokens(self, image: Image, *, query: bool = False) -> int:
        """Tokens that an image takes, beside others in a conversation, under the image budget.

        Args:
            query: whether it is a query's, which may have a budget of its own.

        Raises:
            RowError: the processor refuses the image, such as one 200 times as wide as it is high (Qwen-VL).
        """
        return self._runner.images.tokens_of(image, query=query)

    def other_budgets(self, image: Image) -> dict[str, int]:
        """Tokens that an image would take as published, and at the coarsest, by image budget."""
        found = {"published": image_tokens(self._published, image)}
        if (coarse := coarsest(self._published)) is not None:
            found[json.dumps(coarse)] = image_tokens(with_budget(self._published, coarse), image)
        return found

    def with_fewer_image_tokens(self, factor: int) -> TransformersLVLM:
        """This LVLM looking less closely: `factor` neighbouring image tokens are averaged into one.

        Cheaper by the tokens left out, and with features, and the memory of them, in common. Its scores are not this
        LVLM's, and neither is its fingerprint: it is for the first step of a `Cascade`. Our own addition.

        Raises:
            ValueError: `factor` is below 2, or the family counts positions by an image's grid, or has an image's
                tokens tokenized with the text beside it.
        """
        if factor < 2:
            raise ValueError(f"expected a factor of at least 2, got {factor}")
        other = copy.copy(self)
        other._runner = self._runner.with_fewer_image_tokens(factor)
        other.name = other._runner.name
        digest = hashlib.sha256(f"{self.fingerprint}:image tokens / {factor}".encode()).hexdigest()[:32]
        identity = {**self.identity, "image_tokens_divided_by": str(factor)}
        other.__dict__ |= {"fingerprint": digest, "_described": (digest, identity)}
        return other

    @property
    def context_length(self) -> int | None:
        """Tokens that fit the context, or None where the model states no limit."""
        return self._runner.context_length

    # ---- what the protocol asks for ----

    def score(self, requests: Sequence[ICLRequest], *, progress: bool = False) -> np.ndarray:
        """Log-likelihood of each request's gold response, given its conversation.

        One response: mean log-probability a token. Several: log of the weighted mean of their exponentials. With
        `choices`, a response's score is its summed log-probability minus the log-sum-exp over all choices' (DRUM;
        mean and weighting are our choice). Responses and choices are stripped of outer whitespace.

        Returns:
            float64, shape (len(requests),), at most 0, higher is better, in the order of the requests.

        Raises:
            ValueError: a response is missing, empty or not among its choices, or a weight is not positive.
            ContextOverflowError: a conversation doesn't fit the context; nothing is cut.
            NonFiniteScoreError: the model returned NaN or infinity.
            RowError: a text holds the placeholder that stands for an image.
        """
        wanted = [wanted_answers(request) for request in requests]
        # Requests that ask for one choice after another have their choices computed once.
        contents = [
            (r.query.key, tuple(d.key for d in r.demonstrations), tuple(w))
            for r, w in zip(requests, wanted, strict=True)
        ]
        first = {content: i for i, content in reversed(list(enumerate(contents)))}
        rows = sorted(first.values())
        parts = self._runner.logprobs([requests[i] for i in rows], [wanted[i] for i in rows], progress)
        of_row = dict(zip(rows, parts, strict=True))
        scores = [combine_answers(r, of_row[first[c]]) for r, c in zip(requests, contents, strict=True)]
        return np.array(scores, dtype=np.float64)

    def score_tokens(self, requests: Sequence[ICLRequest], *, progress: bool = False) -> list[np.ndarray]:
        """Log-probability of every token of each request's first response; errors as in `score`.

        Returns:
            a float64 array for each request, as long as its response has tokens in its context.
        """
        first = [dataclasses.replace(r, responses=r.responses[:1], weights=(), choices=()) for r in requests]
        wanted = [wanted_answers(request) for request in first]
        return [parts[0] for parts in self._runner.logprobs(requests, wanted, progress)]

    def label_scores(self, request: ICLRequest) -> np.ndarray:
        """Log-probability of every choice, normalised over the choices.

        Returns:
            float64, shape (len(request.choices),); the exponentials sum to 1.

        Raises:
            ValueError: there are no choices, or two are the same; otherwise as in `score`.
        """
        if not request.choices:
            raise ValueError(f"expected choices to score, query {request.query.id!r} has none")
        choices = wanted_answers(dataclasses.replace(request, responses=request.choices[:1], weights=()))
        (parts,) = self._runner.logprobs([request], [choices], progress=False)
        return log_softmax(np.array([part.sum() for part in parts]))

    def generate(
        self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32, progress: bool = False
    ) -> list[str]:
        """Greedy answers in the order of the requests, without special tokens and reasoning, stripped.

        Nothing is taken from the model's `generation_config` but its end-of-sequence tokens.

        An answer ends at the model's end-of-sequence tokens or at the token by which its chat template ends a turn.

        Raises:
            ContextOverflowError: a conversation and `max_new_tokens` don't fit the context.
            RowError: a text holds the placeholder that stands for an image, or the processor refuses an image.
            UnfinishedReasoningError: a model that reasons first was cut off before it answered; the other answers
                are its `partial`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        rows = self._runner.prompt_rows(requests)
        with progress_bar("generating", len(rows), progress) as bar:
            found = self._runner.generate(rows, max_new_tokens, bar)
        answers = {i: self._answer(ids) for i, ids in enumerate(found)}
        unfinished = [i for i, answer in answers.items() if answer is None]
        if unfinished:
            error = UnfinishedReasoningError(
                f"expected an answer to query {requests[unfinished[0]].query.id!r} (and {len(unfinished) - 1} others) "
                f"within {max_new_tokens} tokens, but {self.name} was still reasoning; raise max_new_tokens, or "
                "switch reasoning off with chat_template_kwargs"
            )
            error.partial = {i: answer for i, answer in answers.items() if answer is not None}
            raise error
        return [answer or "" for answer in answers.values()]

    def _answer(self, ids: list[int]) -> str | None:
        """An answer's text without its reasoning; None where it ends before it begins."""
        opening = self.format.opening
        begun = any(opening.rfind(begin) > opening.rfind(end) for begin, end in self.reasoning_markers)
        # A marker may be a special token, which decoding leaves out.
        whole = self.tokenizer.decode(ids, skip_special_tokens=False)
        if not begun and not any(begin in whole for begin, _ in self.reasoning_markers):
            return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        answer = without_reasoning(whole, self.reasoning_markers, begun=begun)
        for text in sorted(self.tokenizer.all_special_tokens, key=len, reverse=True):
            answer = answer and answer.replace(text, "")
        return answer if answer is None else answer.strip()

    def count_tokens(self, requests: Sequence[ICLRequest]) -> list[int]:
        """Tokens of each conversation up to where the answer begins, images included. Answers nothing."""
        rows = self._runner.prompt_rows(requests)
        counts = [0] * len(rows)

        def run(batch: list[int]) -> None:
            for i, count in zip(batch, self._runner.count([rows[j] for j in batch]), strict=True):
                counts[i] = count

        self._runner.in_batches(rows, run)
        return counts

    @property
    def _stop_ids(self) -> list[int]:
        return self._runner.stop_ids


def _load_model(place: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(place, **kwargs)
    except ValueError as error:
        text = str(error)
        if "Unrecognized configuration class" not in text and "model type" not in text:
            raise
        raise ModelError(
            f"expected a family that this transformers' AutoModelForImageTextToText knows, got {place!r}: "
            f"{text.splitlines()[0][:300]}. Update transformers; or load the model and its processor yourself and "
            "pass them to TransformersLVLM(model, processor); or serve it (vLLM) and use OpenAILVLM"
        ) from error
    except ImportError as error:
        raise DependencyError(f"{place!r} can't be loaded: {error}") from error


def _bitsandbytes(four: bool, eight: bool) -> Any:
    from transformers import BitsAndBytesConfig

    if four and eight:
        raise ValueError("expected one of load_in_4bit and load_in_8bit, got both; leave one out")
    require("bitsandbytes", "loading an LVLM in 4 or 8 bits")
    return BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=eight)
