"""`TransformersLVLM`: a model that runs here, scored and asked through stock transformers.

A score needs one forward pass over "conversation + response without its last token". Passes are batched by length,
left-padded, and give logits only where a response stands. Where the loaded family lets them (a probe decides, by
comparing the results), images go through the image processor and the vision tower once and are then kept.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .._compat import local_name, resolve_name
from ..errors import ContextOverflowError, NonFiniteScoreError
from ..types import ICLRequest
from ._fingerprint import compute_fingerprint
from ._images import ImageInputs
from .processors import load_processor
from .prompts import ChatFormat, ImagePosition, Row

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

__all__ = ["TransformersLVLM"]

logger = logging.getLogger(__name__)

# Answers tokenized and sorted by length together: enough for full batches, few enough to hold.
_ANSWERS_AT_ONCE = 8192

# Tokenizers without a limit of their own say 1e30; a context of more than this is such a "no limit".
_NO_LIMIT = 10_000_000


class TransformersLVLM:
    """A Hugging Face image-text-to-text model as an `LVLM`.

    The model is taken as frozen: its fingerprint and its images' features are computed once and kept.

    Args:
        model: any `AutoModelForImageTextToText` model; set to evaluation mode.
        processor: its processor, with a fast tokenizer and a chat template.
        name: what to call it; default: where it was loaded from, or the name of a model that ships with the package.
        revision: commit of the Hub repository `name` that the weights are from, unchanged. Where given, the
            fingerprint trusts it; else the weights are hashed.
        batch_size: sequences a forward pass.
        max_batch_tokens: tokens a forward pass, padding included; one longer sequence still runs alone. Our choice.
        image_position: a turn's image before ("first") or after ("last") its text.
        system: text of a system turn, or None.
        score_end_of_turn: whether the token that ends the assistant's turn counts as the response's last. It does not
            by default (our choice): the mean over few tokens would be dominated by it. Switch it on where one
            choice is the beginning of another.
        image_cache_bytes: features of the most recent images that are kept, on the model's device. Our choice of
            512 MiB holds some 200 images split in 17 tiles of 64 tokens x 576 floats.

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
        batch_size: int = 16,
        max_batch_tokens: int = 16_384,
        image_position: ImagePosition = "first",
        system: str | None = None,
        score_end_of_turn: bool = False,
        image_cache_bytes: int = 1 << 29,
    ) -> None:
        if batch_size < 1 or max_batch_tokens < 1:
            raise ValueError(f"expected positive batch limits, got {batch_size=} and {max_batch_tokens=}")
        self.model = model.eval()
        self.processor = processor
        self.name = local_name(name or getattr(model, "name_or_path", "") or type(model).__name__)
        self.revision = revision
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.format = ChatFormat(
            processor, image_position=image_position, system=system, score_end_of_turn=score_end_of_turn
        )
        self.tokenizer = self.format.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # any would do: padding is masked
        self._pad_id = self.tokenizer.pad_token_id or 0
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._images = ImageInputs(model, self.format, batch_size=batch_size, limit=image_cache_bytes)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        dtype: Any = "auto",
        device: str | torch.device | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 16,
        max_batch_tokens: int = 16_384,
        image_position: ImagePosition = "first",
        system: str | None = None,
        score_end_of_turn: bool = False,
        image_cache_bytes: int = 1 << 29,
        **model_kwargs: Any,
    ) -> TransformersLVLM:
        """Load model and processor from a directory or the Hub.

        Args:
            name_or_path: directory or Hub id; "playground/lvlm" is the one that ships with the package.
            revision, token, cache_dir, local_files_only, trust_remote_code: as everywhere in transformers.
            dtype: "auto" takes the one the weights are saved in.
            device: default: CUDA where there is one, else CPU. Leave it out with `device_map`.
            adapter: directory or Hub id of a PEFT adapter, merged into the weights.
            batch_size, max_batch_tokens, image_position, system, score_end_of_turn, image_cache_bytes: see the class.
            model_kwargs: for `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ChatTemplateError: see the class.
            OSError: there is no such model.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub["trust_remote_code"] = trust_remote_code
        if revision is not None:
            hub["revision"] = revision
        place = resolve_name(name_or_path)
        model: Any = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, **hub, **model_kwargs)
        commit = getattr(model.config, "_commit_hash", None)
        processor = load_processor(place, model.config, **hub)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(
                model, adapter, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            ).merge_and_unload()
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
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.model).__name__}, {self.model.dtype})"

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change with whatever a score depends on; computed on first use.

        That is: weights (an adapter's included), configuration, dtype, chat template, tokenizer, image processing,
        `image_position`, `system`, `score_end_of_turn`.
        """
        weights = f"{self.name}@{self.revision}" if self.revision else None
        return compute_fingerprint(self.model, self.format, weights)

    @property
    def context_length(self) -> int | None:
        """Tokens that fit the context, or None where the model states no limit."""
        limits = [
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            getattr(self.tokenizer, "model_max_length", None),
        ]
        stated = [int(limit) for limit in limits if limit and limit < _NO_LIMIT]
        return min(stated) if stated else None

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
        wanted: list[list[str]] = []
        for request in requests:
            responses = [_stripped(request, response, "response") for response in request.responses]
            if not responses:
                raise ValueError(f"expected at least one response to score, query {request.query.id!r} has none")
            if any(not weight > 0 for weight in request.weights):
                raise ValueError(f"expected positive weights, query {request.query.id!r} has {request.weights}")
            choices = _choices(request)
            strangers = [response for response in responses if choices and response not in choices]
            if strangers:
                raise ValueError(
                    f"expected responses among the choices {choices}, query {request.query.id!r} has {strangers}; add "
                    "them to the choices or leave the choices out"
                )
            wanted.append(choices or responses)
        scores = np.empty(len(requests))
        for i, parts in enumerate(self._logprobs(requests, wanted, progress)):
            if requests[i].choices:
                normalised = dict(zip(wanted[i], _log_softmax(np.array([part.sum() for part in parts])), strict=True))
                values = np.array([normalised[response.strip()] for response in requests[i].responses])
            else:
                values = np.array([part.mean() for part in parts])
            weights = np.array(requests[i].weights or [1.0] * len(values))
            scores[i] = np.logaddexp.reduce(values + np.log(weights / weights.sum()))
        return scores

    def score_tokens(self, requests: Sequence[ICLRequest], *, progress: bool = False) -> list[np.ndarray]:
        """Log-probability of every token of each request's first response; errors as in `score`.

        Returns:
            a float64 array for each request, as long as its response has tokens in its context.
        """
        wanted = []
        for request in requests:
            if not request.responses:
                raise ValueError(f"expected at least one response to score, query {request.query.id!r} has none")
            wanted.append([_stripped(request, request.responses[0], "response")])
        return [parts[0] for parts in self._logprobs(requests, wanted, progress)]

    def label_scores(self, request: ICLRequest) -> np.ndarray:
        """Log-probability of every choice, normalised over the choices.

        Returns:
            float64, shape (len(request.choices),); the exponentials sum to 1.

        Raises:
            ValueError: there are no choices, or two are the same; otherwise as in `score`.
        """
        choices = _choices(request)
        if not choices:
            raise ValueError(f"expected choices to score, query {request.query.id!r} has none")
        (parts,) = self._logprobs([request], [choices], progress=False)
        return _log_softmax(np.array([part.sum() for part in parts]))

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
            pad_token_id=self._pad_id,
            eos_token_id=self._stop_ids or None,
        )
        answers = [""] * len(rows)

        def run(batch: list[int]) -> int:
            inputs = self._encode([rows[i] for i in batch], new_tokens=max_new_tokens)
            out = self.model.generate(**inputs, generation_config=settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
            return len(batch)

        with _bar("generating", len(rows), progress) as bar:
            self._in_batches(rows, run, bar, new_tokens=max_new_tokens)
        return answers

    def count_tokens(self, requests: Sequence[ICLRequest]) -> list[int]:
        """Tokens of each conversation up to where the answer begins, images included. Answers nothing."""
        rows = self.format.prompt_rows(requests)
        counts = [0] * len(rows)

        def run(batch: list[int]) -> int:
            for i, ids in zip(batch, self._expand([rows[j] for j in batch])[0], strict=True):
                counts[i] = len(ids)
            return len(batch)

        self._in_batches(rows, run)
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

    # ---- from rows to tensors ----

    def _expand(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """Ids of each row with its images' tokens in place, and what else the model takes."""
        if not any(row.images for row in rows):
            return [row.ids for row in rows], {}
        return self._images.expand_kept(rows) if self._keeps_images else self._images.expand(rows)

    @cached_property
    def _keeps_images(self) -> bool:
        """Whether images pass the vision tower once and are then kept."""
        keeps = self._images.features_suffice(self._logits)
        if not keeps:
            logger.info("%s: every image is processed each time it is shown", self.name)
        return keeps

    def _encode(self, rows: list[Row], new_tokens: int = 0) -> dict[str, Any]:
        ids, extra = self._expand(rows)
        limit = self.context_length
        for row, own in zip(rows, ids, strict=True):
            if limit is not None and len(own) + new_tokens > limit:
                room = f" and {new_tokens} to generate" if new_tokens else ""
                raise ContextOverflowError(
                    f"expected at most {limit} tokens (the context of {self.name}), but the conversation of query "
                    f"{row.request.query.id!r} with {len(row.request.demonstrations)} demonstrations has "
                    f"{len(own)}{room}; use fewer shots or smaller images"
                )
        return self._images.pad(ids, extra)

    # ---- running ----

    def _logits(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions, (rows, keep, vocabulary)."""
        import torch

        with torch.inference_mode():
            if self._has_logits_to_keep:
                return self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
            return self.model(**inputs, use_cache=False).logits[:, -keep:]

    def _batches(self, rows: list[Row], new_tokens: int) -> Iterator[list[int]]:
        """Indices of rows, longest first, so that memory runs out early or never."""
        sizes = [len(row.ids) + len(row.images) * (self._images.tokens_an_image - 1) + new_tokens for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (bool(rows[i].images), sizes[i]), reverse=True)
        batch: list[int] = []
        for i in order:
            if batch:
                full = len(batch) == self.batch_size or (len(batch) + 1) * sizes[batch[0]] > self.max_batch_tokens
                # Processors take batches in which every conversation has images, or none has.
                if full or bool(rows[batch[0]].images) != bool(rows[i].images):
                    yield batch
                    batch = []
            batch.append(i)
        if batch:
            yield batch

    def _in_batches(
        self, rows: list[Row], run: Callable[[list[int]], int], bar: tqdm | None = None, new_tokens: int = 0
    ) -> None:
        """Call `run` on batches of row indices; a batch that doesn't fit the memory is halved, down to one row.

        `run` returns how many answers it has done.
        """
        import torch

        with torch.inference_mode():
            if any(row.images for row in rows):
                _ = self._keeps_images  # also learns how many tokens an image takes, before lengths are estimated
            for batch in self._batches(rows, new_tokens):
                waiting = [batch]
                while waiting:
                    part = waiting.pop()
                    try:
                        done = run(part)
                    except torch.OutOfMemoryError:
                        if len(part) == 1:
                            raise
                    else:
                        if bar is not None:
                            bar.update(done)
                        continue
                    # Outside of `except`, whose traceback would keep the failed batch's tensors alive.
                    logger.info("out of memory with %d sequences: trying half", len(part))
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    half = len(part) // 2
                    waiting += [part[half:], part[:half]]

    def _logprobs(
        self, requests: Sequence[ICLRequest], wanted: list[list[str]], progress: bool
    ) -> list[list[np.ndarray]]:
        """Log-probabilities of the tokens of every wanted answer of every request."""
        result: list[list[np.ndarray]] = []
        with _bar("scoring", sum(map(len, wanted)), progress) as bar:
            start = 0
            while start < len(requests):
                stop, answers = start + 1, len(wanted[start])
                while stop < len(requests) and answers + len(wanted[stop]) <= _ANSWERS_AT_ONCE:
                    answers += len(wanted[stop])
                    stop += 1
                result += self._run_answers(requests[start:stop], wanted[start:stop], bar)
                start = stop
        return result

    def _run_answers(
        self, requests: Sequence[ICLRequest], wanted: list[list[str]], bar: tqdm
    ) -> list[list[np.ndarray]]:
        import torch

        rows, placed = self.format.answer_rows(requests, wanted)
        in_row: list[list[tuple[int, int]]] = [[] for _ in rows]
        for r, answers in enumerate(placed):
            for a, answer in enumerate(answers):
                in_row[answer.row].append((r, a))
        result: list[list[np.ndarray]] = [[np.empty(0)] * len(answers) for answers in wanted]

        def run(batch: list[int]) -> int:
            here = [(b, r, a, placed[r][a]) for b, i in enumerate(batch) for r, a in in_row[i]]
            keep = max(answer.back + len(answer.ids) for *_, answer in here)
            inputs = self._encode([rows[i] for i in batch])
            logits = self._logits(inputs, keep).float()
            at = [
                (b, keep - answer.back - len(answer.ids) + j, t)
                for b, _, _, answer in here
                for j, t in enumerate(answer.ids)
            ]
            b, position, token = torch.tensor(at, device=logits.device).T
            picked = (logits[b, position, token] - logits.logsumexp(-1)[b, position]).cpu().numpy().astype(np.float64)
            done = 0
            for _, r, a, answer in here:
                values = picked[done : done + len(answer.ids)]
                done += len(answer.ids)
                if not np.isfinite(values).all():
                    raise NonFiniteScoreError(
                        f"expected finite log-probabilities, {self.name} gave {values} for the response "
                        f"{wanted[r][a]!r} of query {requests[r].query.id!r}; load it with dtype=torch.float32, and "
                        "check its weights"
                    )
                result[r][a] = values
            return len(here)

        self._in_batches(rows, run, bar)
        return result


def _bar(title: str, total: int, shown: bool) -> tqdm:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="answer", disable=not shown)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.logaddexp.reduce(values)


def _stripped(request: ICLRequest, text: str, kind: str) -> str:
    if not text.strip():
        raise ValueError(f"expected a {kind} with text, query {request.query.id!r} has {text!r}")
    return text.strip()


def _choices(request: ICLRequest) -> list[str]:
    choices = [_stripped(request, choice, "choice") for choice in request.choices]
    if len(set(choices)) < len(choices):
        raise ValueError(f"expected distinct choices, query {request.query.id!r} has {choices}")
    return choices
