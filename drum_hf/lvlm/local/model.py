"""`TransformersLVLM`: a model that runs here, scored and asked through stock transformers.

A score needs one forward pass over "conversation + response without its last token", with logits only where the
response stands. Where the loaded family lets it (a trial decides, by comparing the results: see `capabilities`), an
image passes the vision tower once, demonstrations that several queries share pass the decoder once, and several
answers to one conversation share all but themselves. Where it doesn't, conversations are run whole, padded on the
left.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...types import ICLRequest
from ...utils.files import settled
from ...utils.hub import fetch_snapshot
from ...utils.optional import loading, local_name
from ...utils.safe_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_model, reading_adapter
from ..answers import combine_answers, log_softmax, wanted_answers
from ..fingerprint import Identity, describe
from ..prompts import ChatFormat, ImagePosition
from .capabilities import Capabilities
from .processors import load_processor
from .runner import Runner, progress_bar

if TYPE_CHECKING:
    import torch

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
        system: text of a system turn, or None.
        score_end_of_turn: whether the token that ends the assistant's turn counts as the response's last. It does not
            by default (our choice): the mean over few tokens would be dominated by it. Switch it on where one
            choice is the beginning of another.
        image_cache_bytes: features of the most recent images that are kept, in the host's memory. None: a quarter of
            what is free, at most 4 GiB (our choice), which holds some 29,000 images of 64 tokens x 576 floats.
        image_cache_dir: folder for the features that memory has no room for, so that they are read rather than
            computed again, by later runs too; a folder in it belongs to one `fingerprint`. None: they are dropped.

    Raises:
        ChatTemplateError: the processor has no chat template, or one that loses text or images.
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
        score_end_of_turn: bool = False,
        image_cache_bytes: int | None = None,
        image_cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if batch_size < 1 or (max_batch_tokens is not None and max_batch_tokens < 1):
            raise ValueError(f"expected positive batch limits, got {batch_size=} and {max_batch_tokens=}")
        self.model = model.eval()
        self.processor = processor
        self.name = local_name(name or getattr(model, "name_or_path", "") or type(model).__name__)
        self.revision = revision
        self.format = ChatFormat(
            processor, image_position=image_position, system=system, score_end_of_turn=score_end_of_turn
        )
        self.tokenizer = self.format.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # any would do: padding is masked
        self._runner = Runner(
            self.model,
            self.format,
            name=self.name,
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
        batch_size: int = 64,
        max_batch_tokens: int | None = None,
        image_position: ImagePosition = "first",
        system: str | None = None,
        score_end_of_turn: bool = False,
        image_cache_bytes: int | None = None,
        image_cache_dir: str | os.PathLike[str] | None = None,
        **model_kwargs: Any,
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
            batch_size, max_batch_tokens, image_position, system, score_end_of_turn, image_cache_bytes,
                image_cache_dir: see the class.
            model_kwargs: for `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ChatTemplateError: see the class.
            ModelError: there is no such model, or its files don't make one; an OSError, too.
            HubError: there is no such adapter.
            SavedFileError: the model's or adapter's files are damaged, are no safetensors, name code or other places,
                or the adapter is no LoRA, or for another model.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub["force_download"] = force_download
        with loading("an LVLM", name_or_path):
            source = find_model(name_or_path, revision=revision, trust_remote_code=trust_remote_code, **hub)
            options = {**source.options, **source.weights, **model_kwargs}
            model: Any = AutoModelForImageTextToText.from_pretrained(source.place, dtype=dtype, **options)
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
        if "device_map" not in model_kwargs:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            model,
            processor,
            name=str(name_or_path),
            revision=commit,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            image_position=image_position,
            system=system,
            score_end_of_turn=score_end_of_turn,
            image_cache_bytes=image_cache_bytes,
            image_cache_dir=image_cache_dir,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.model).__name__}, {self.model.dtype})"

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change with whatever a score depends on; computed on first use.

        That is: weights (an adapter's included), configuration, dtype, chat template, tokenizer, image processing,
        `image_position`, `system`, `score_end_of_turn`.
        """
        return self._described[0]

    @property
    def identity(self) -> Identity:
        """What the fingerprint is made of, by name; what is large stands there as a hash."""
        return dict(self._described[1])

    @cached_property
    def _described(self) -> tuple[str, Identity]:
        return describe(self.model, self.format, name=self.name, revision=self.revision)

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
        """Which savings leave this model's scores as they are; tried out on first use, on two small images."""
        return self._runner.capabilities

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
        """Greedy answers in the order of the requests, without special tokens, stripped.

        An answer ends at the model's end-of-sequence tokens or at the token by which its chat template ends a turn.

        Raises:
            ContextOverflowError: a conversation and `max_new_tokens` don't fit the context.
            RowError: a text holds the placeholder that stands for an image.
        """
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        rows = self.format.prompt_rows(requests)
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            max_new_tokens=max_new_tokens,
            max_length=None,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._stop_ids or None,
        )
        answers = [""] * len(rows)

        def run(batch: list[int]) -> int:
            inputs = self._runner.encode([rows[i] for i in batch], new_tokens=max_new_tokens)
            with self._runner.lock:
                out = self.model.generate(**inputs, generation_config=settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
            return len(batch)

        with progress_bar("generating", len(rows), progress) as bar:
            self._runner.in_batches(rows, run, bar, new_tokens=max_new_tokens)
        return answers

    def count_tokens(self, requests: Sequence[ICLRequest]) -> list[int]:
        """Tokens of each conversation up to where the answer begins, images included. Answers nothing."""
        rows = self.format.prompt_rows(requests)
        counts = [0] * len(rows)

        def run(batch: list[int]) -> int:
            for i, ids in zip(batch, self._runner.expand([rows[j] for j in batch])[0], strict=True):
                counts[i] = len(ids)
            return len(batch)

        self._runner.in_batches(rows, run)
        return counts

    @cached_property
    def _stop_ids(self) -> list[int]:
        stated = self.model.generation_config.eos_token_id
        stops = set(stated if isinstance(stated, list) else [] if stated is None else [stated])
        if self.tokenizer.eos_token_id is not None:
            stops.add(self.tokenizer.eos_token_id)
        after = self.tokenizer(self.format.end_of_turn, add_special_tokens=False)["input_ids"]
        stops.update([i for i in after if i in self.format.special_ids][:1])
        return sorted(stops)
