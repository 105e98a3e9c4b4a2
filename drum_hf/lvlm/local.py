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
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._compat import local_name, resolve_name
from ..errors import ContextOverflowError, NonFiniteScoreError
from ..types import ICLRequest
from ._answers import combine_answers, log_softmax, wanted_answers
from ._engine import Engine, Limits, halving
from ._fingerprint import Identity, describe
from ._images import ImageInputs
from ._plan import MIN_SHARED, Line, Target, make_plan
from .capabilities import Capabilities, find_capabilities, probe_requests
from .processors import load_processor
from .prompts import Answer, ChatFormat, ImagePosition, Row

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

__all__ = ["TransformersLVLM"]

logger = logging.getLogger(__name__)

# Answers tokenized and sorted by length together: enough for full batches, few enough to hold.
_ANSWERS_AT_ONCE = 4096

#: Tokens a forward pass where the user sets no limit: enough to fill the device, and no more. Our choice; on the CPU
#: the fastest of 1,024 to 16,384 at the shape of SmolVLM-256M, since activations that are larger leave the caches.
_MOST_TOKENS = {"cpu": 4_096, "other": 65_536}

#: Share of the free memory that a forward pass may take, by our estimate. Our choice.
_SHARE_OF_MEMORY = 0.5

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
        self._pad_id = self.tokenizer.pad_token_id or 0
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._limits = Limits(batch_size, max_batch_tokens or _affordable_tokens(model))
        self._images = ImageInputs(
            model,
            self.format,
            batch_size=batch_size,
            limit=image_cache_bytes,
            folder=None if image_cache_dir is None else lambda: Path(image_cache_dir) / self.fingerprint,
        )
        self._engine = Engine(model, self._images, self._limits)
        self._lock = threading.RLock()  # one forward pass at a time: it may carry a hook

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
            revision, token, cache_dir, local_files_only, trust_remote_code: as everywhere in transformers.
            dtype: "auto" takes the one the weights are saved in.
            device: default: CUDA where there is one, else CPU. Leave it out with `device_map`.
            adapter: directory or Hub id of a PEFT adapter, merged into the weights.
            batch_size, max_batch_tokens, image_position, system, score_end_of_turn, image_cache_bytes,
                image_cache_dir: see the class.
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
        return self._limits.rows

    @property
    def max_batch_tokens(self) -> int:
        """Tokens a forward pass, at most; less than was set where memory ran out."""
        return self._limits.tokens

    @cached_property
    def capabilities(self) -> Capabilities:
        """Which savings leave this model's scores as they are; tried out on first use, on two small images."""
        requests, wanted = probe_requests()
        if not self._images.can_keep or self.model.get_output_embeddings() is None:
            reason = "the processor or the model has no interface for features computed apart"
            reasons = dict.fromkeys(("image_features", "shared_prefix", "packed_answers"), reason)
            return Capabilities(False, False, False, self._attention, reasons)

        def answers(run: Callable[[list[Row], list[list[Answer]], _Results], None], one_by_one: bool = False) -> Any:
            parts = [(requests, wanted)]
            if one_by_one:
                parts = [([r], [[w]]) for r, ws in zip(requests, wanted, strict=True) for w in ws]
            found = []
            for some, asked in parts:
                rows, placed = self.format.answer_rows(some, asked)
                results = _Results(some, asked, self.name, strict=False)
                run(rows, placed, results)
                found += results.values
            return found

        tolerance = 1e-4
        plain = answers(self._run_whole)
        if self.model.dtype not in (_torch().float32, _torch().float64):
            # Rounding differs from batch to batch; a saving may differ as much.
            flat = [values for parts in plain for values in parts]
            alone = [values for parts in answers(self._run_whole, one_by_one=True) for values in parts]
            tolerance = max(0.1, 4 * max(float(np.abs(a - b).max()) for a, b in zip(flat, alone, strict=True)))

        def trial(share: bool, pack: bool) -> Any:
            if not share and not pack:
                self._images.learn_expansion(
                    [image for row in self.format.prompt_rows(requests) for image in row.images]
                )
            return answers(
                lambda rows, placed, results: self._run_planned(rows, placed, results, share, pack, least=1)
            )

        found = find_capabilities(self.model.config.get_text_config(), lambda: plain, trial, tolerance=tolerance)
        if not found.image_features:
            self.format.expansions = None
        logger.info("%s: %s", self.name, found.describe())
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
        if (
            not self.capabilities.image_features
            or hasattr(getattr(self.model, "model", self.model), "get_rope_index")
            or self.format.expansions is not None
        ):
            raise ValueError(
                f"expected a family whose image tokens may be joined, and {type(self.model).__name__} is not one; use "
                "a smaller LVLM as the cheaper one"
            )
        other = copy.copy(self)
        other.name = f"{self.name} with image tokens / {factor}"
        other._images = self._images.fewer_tokens(factor)
        other._engine = Engine(self.model, other._images, self._limits)
        digest = hashlib.sha256(f"{self.fingerprint}:image tokens / {factor}".encode()).hexdigest()[:32]
        identity = {**self.identity, "image_tokens_divided_by": str(factor)}
        other.__dict__ |= {"_keeps_images": True, "fingerprint": digest, "_described": (digest, identity)}
        return other

    @property
    def _attention(self) -> str | None:
        return getattr(self.model.config.get_text_config(), "_attn_implementation", None)

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
        parts = self._logprobs(requests, [wanted_answers(request) for request in requests], progress)
        return np.array([combine_answers(r, p) for r, p in zip(requests, parts, strict=True)], dtype=np.float64)

    def score_tokens(self, requests: Sequence[ICLRequest], *, progress: bool = False) -> list[np.ndarray]:
        """Log-probability of every token of each request's first response; errors as in `score`.

        Returns:
            a float64 array for each request, as long as its response has tokens in its context.
        """
        first = [dataclasses.replace(r, responses=r.responses[:1], weights=(), choices=()) for r in requests]
        wanted = [wanted_answers(request) for request in first]
        return [parts[0] for parts in self._logprobs(requests, wanted, progress)]

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
        (parts,) = self._logprobs([request], [choices], progress=False)
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
            pad_token_id=self._pad_id,
            eos_token_id=self._stop_ids or None,
        )
        answers = [""] * len(rows)

        def run(batch: list[int]) -> int:
            inputs = self._encode([rows[i] for i in batch], new_tokens=max_new_tokens)
            with self._lock:
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
        """Whether conversations that are run whole, padded on the left, may take kept features too."""
        if not self.capabilities.image_features:
            return False
        requests, _ = probe_requests()
        rows = self.format.prompt_rows(requests)
        plain, kept = self._images.expand(rows), self._images.expand_kept(rows)
        if plain[0] != kept[0]:
            return False
        ours, theirs = (self._logits(self._images.pad(*expanded), 1) for expanded in (kept, plain))
        tolerance = 1e-4 if self.model.dtype in (_torch().float32, _torch().float64) else 5e-2
        return _torch().allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)

    def _encode(self, rows: list[Row], new_tokens: int = 0) -> dict[str, Any]:
        ids, extra = self._expand(rows)
        self._check_lengths(rows, ids, new_tokens)
        return self._images.pad(ids, extra)

    def _check_lengths(self, rows: list[Row], ids: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
        limit = self.context_length
        for row, own in zip(rows, ids, strict=True):
            if limit is not None and len(own) + new_tokens > limit:
                room = f" and {new_tokens} to generate" if new_tokens else ""
                raise ContextOverflowError(
                    f"expected at most {limit} tokens (the context of {self.name}), but the conversation of query "
                    f"{row.request.query.id!r} with {len(row.request.demonstrations)} demonstrations has "
                    f"{len(own)}{room}; use fewer shots or smaller images"
                )

    # ---- running ----

    def _logits(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions, (rows, keep, vocabulary)."""
        import torch

        with torch.inference_mode(), self._lock:
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

        def part(batch: list[int]) -> None:
            done = run(batch)
            if bar is not None:
                bar.update(done)

        with torch.inference_mode():
            if any(row.images for row in rows):
                _ = self._keeps_images  # also learns how many tokens an image takes, before lengths are estimated
            for batch in self._batches(rows, new_tokens):
                halving(batch, part, self._limits)

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
        able = self.capabilities
        rows, placed = self.format.answer_rows(requests, wanted)
        results = _Results(requests, wanted, self.name, bar)
        if able.image_features:
            self._run_planned(rows, placed, results, able.shared_prefix, able.packed_answers)
        else:
            self._run_whole(rows, placed, results)
        return results.values

    def _run_planned(
        self,
        rows: list[Row],
        placed: list[list[Answer]],
        results: _Results,
        share: bool,
        pack: bool,
        least: int = MIN_SHARED,
    ) -> None:
        """With kept images, sharing what may be shared."""
        with self._lock:
            keys, pictures = self._images.keyed(rows)
            kept = self._images.keep(pictures)
            ids = [self._images.place(row, own, kept) for row, own in zip(rows, keys, strict=True)]
            self._check_lengths(rows, ids)
            lines = _lines(rows, placed, ids, keys, self._images)
            plan = make_plan(lines, share=share, pack=pack, least=least)
            self._engine.run(plan, pictures, results.read)

    def _run_whole(self, rows: list[Row], placed: list[list[Answer]], results: _Results) -> None:
        """Every conversation whole and from its pixels, padded on the left."""
        import torch

        in_row: list[list[Target]] = [[] for _ in rows]
        for r, answers in enumerate(placed):
            for a, answer in enumerate(answers):
                in_row[answer.row].append(Target(r, a, answer.back, tuple(answer.ids)))

        def run(batch: list[int]) -> None:
            here = [(b, target) for b, i in enumerate(batch) for target in in_row[i]]
            keep = max(target.start + len(target.ids) for _, target in here)
            some = [rows[i] for i in batch]
            ids, extra = self._images.expand(some) if any(row.images for row in some) else ([r.ids for r in some], {})
            self._check_lengths(some, ids)
            logits = self._logits(self._images.pad(ids, extra), keep).float()
            at = [
                (b, keep - target.start - len(target.ids) + j, t)
                for b, target in here
                for j, t in enumerate(target.ids)
            ]
            b, position, token = torch.tensor(at, device=logits.device).T
            picked = (logits[b, position, token] - logits.logsumexp(-1)[b, position]).cpu().numpy().astype(np.float64)
            done = 0
            for _, target in here:
                results.read(target, picked[done : done + len(target.ids)])
                done += len(target.ids)

        for batch in self._batches(rows, 0):
            halving(batch, run, self._limits)


class _Results:
    """Log-probabilities of every wanted answer's tokens, as they come in."""

    def __init__(
        self,
        requests: Sequence[ICLRequest],
        wanted: list[list[str]],
        name: str,
        bar: tqdm | None = None,
        strict: bool = True,
    ) -> None:
        self.requests, self.wanted, self.name, self.bar, self.strict = requests, wanted, name, bar, strict
        self.values: list[list[np.ndarray]] = [[np.empty(0)] * len(answers) for answers in wanted]

    def read(self, target: Target, values: np.ndarray) -> None:
        if self.strict and not np.isfinite(values).all():
            raise NonFiniteScoreError(
                f"expected finite log-probabilities, {self.name} gave {values} for the response "
                f"{self.wanted[target.request][target.answer]!r} of query "
                f"{self.requests[target.request].query.id!r}; load it with dtype=torch.float32, and check its weights"
            )
        own = self.values[target.request]
        if self.bar is not None and not len(own[target.answer]):
            self.bar.update(1)
        own[target.answer] = values


def _lines(
    rows: list[Row],
    placed: list[list[Answer]],
    ids: list[list[int]],
    keys: list[list[str]],
    images: ImageInputs,
) -> list[Line]:
    """Rows with their images in place, as the plan takes them."""
    number: dict[str, int] = {}
    lines = []
    kept = images.kept_ids
    for row, own, shown in zip(rows, ids, keys, strict=True):
        whole = np.asarray(own, dtype=np.int64)
        tags = whole.copy()
        spots = np.flatnonzero(whole == images.image_id)
        starts, done = [], 0
        for key in shown:
            count = kept[key]
            starts.append(int(spots[done]))
            tags[spots[done : done + count]] = -1 - number.setdefault(key, len(number))
            done += count
        group = tuple(demonstration.key for demonstration in row.request.demonstrations)
        lines.append(Line(0, group, whole, tags, shown, starts, []))
    for r, answers in enumerate(placed):
        for a, answer in enumerate(answers):
            line = lines[answer.row]
            line.request = r
            line.targets.append(Target(r, a, len(line.ids) - answer.back - len(answer.ids), tuple(answer.ids)))
    return lines


def _affordable_tokens(model: Any) -> int:
    """Tokens that surely fit a forward pass: keys and values three times over, and the widest activations."""
    import psutil
    import torch

    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 6 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    wide = 8 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    a_token = (kept + wide) * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    most = _MOST_TOKENS.get(model.device.type, _MOST_TOKENS["other"])
    return max(512, min(most, int(_SHARE_OF_MEMORY * free / a_token)))


def _torch() -> Any:
    import torch

    return torch


def _bar(title: str, total: int, shown: bool) -> tqdm:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="answer", disable=not shown)
