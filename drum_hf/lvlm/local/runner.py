"""Runs conversations through a local model: whole from their pixels, or by a plan that shares what may be shared."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ContextOverflowError, NonFiniteScoreError
from ...types import ICLRequest
from ...utils.optional import bar_options
from ..prompts import Answer, ChatFormat, Row
from .capabilities import Capabilities, find_capabilities, probe_requests
from .engine import Engine, Limits, halving
from .images import ImageInputs
from .plan import MIN_SHARED, Line, Target, make_plan

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

__all__ = ["Runner", "progress_bar"]

logger = logging.getLogger(__name__)

# Answers tokenized and sorted by length together: enough for full batches, few enough to hold.
_ANSWERS_AT_ONCE = 4096

#: Tokens a forward pass where the user sets no limit: enough to fill the device, and no more. Our choice; on two
#: cores at the shape of SmolVLM-256M, 2,700 and 5,400 were the fastest of 700 to 11,000.
_MOST_TOKENS = {"cpu": 4_096, "other": 65_536}

#: Share of the free memory that a forward pass may take, by our estimate. Our choice.
_SHARE_OF_MEMORY = 0.5

# Tokenizers without a limit of their own say 1e30; a context of more than this is such a "no limit".
_NO_LIMIT = 10_000_000


class Runner:
    """What `TransformersLVLM` runs on.

    Args:
        model, chat: what runs, and the format of its conversations.
        name: of the model, for messages.
        batch_size, max_batch_tokens, image_cache_bytes, image_folder: see `TransformersLVLM` and `ImageInputs`.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        *,
        name: str,
        batch_size: int,
        max_batch_tokens: int | None,
        image_cache_bytes: int | None,
        image_folder: Callable[[], Path] | None,
    ) -> None:
        self.model, self.format, self.name = model, chat, name
        self.limits = Limits(batch_size, max_batch_tokens or _affordable_tokens(model))
        self.images = ImageInputs(model, chat, batch_size=batch_size, limit=image_cache_bytes, folder=image_folder)
        self.engine = Engine(model, self.images, self.limits)
        self.lock = threading.RLock()  # one forward pass at a time: it may carry a hook
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def context_length(self) -> int | None:
        """Tokens that fit the context, or None where the model states no limit."""
        limits = [
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            getattr(self.format.tokenizer, "model_max_length", None),
        ]
        stated = [int(limit) for limit in limits if limit and limit < _NO_LIMIT]
        return min(stated) if stated else None

    def with_fewer_image_tokens(self, factor: int) -> Runner:
        """The same model and limits, `factor` neighbouring image tokens averaged into one.

        Raises:
            ValueError: the family counts positions by an image's grid, or has an image's tokens tokenized with the
                text beside it.
        """
        inner = getattr(self.model, "model", self.model)
        if (
            not self.capabilities.image_features
            or hasattr(inner, "get_rope_index")
            or self.format.expansions is not None
        ):
            raise ValueError(
                f"expected a family whose image tokens may be joined, and {type(self.model).__name__} is not one; use "
                "a smaller LVLM as the cheaper one"
            )
        other = copy.copy(self)
        other.name = f"{self.name} with image tokens / {factor}"
        other.images = self.images.fewer_tokens(factor)
        other.engine = Engine(self.model, other.images, self.limits)
        other.__dict__["keeps_images"] = True
        return other

    @cached_property
    def capabilities(self) -> Capabilities:
        """Which savings leave this model's scores as they are; tried out on first use, on two small images."""
        requests, wanted = probe_requests()
        if not self.images.can_keep or self.model.get_output_embeddings() is None:
            reason = "the processor or the model has no interface for features computed apart"
            reasons = dict.fromkeys(("image_features", "shared_prefix", "packed_answers"), reason)
            return Capabilities(False, False, False, _attention(self.model), reasons)

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
                self.images.learn_expansion(
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

    # ---- from rows to tensors ----

    def expand(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """Ids of each row with its images' tokens in place, and what else the model takes."""
        if not any(row.images for row in rows):
            return [row.ids for row in rows], {}
        return self.images.expand_kept(rows) if self.keeps_images else self.images.expand(rows)

    @cached_property
    def keeps_images(self) -> bool:
        """Whether conversations that are run whole, padded on the left, may take kept features too."""
        if not self.capabilities.image_features:
            return False
        requests, _ = probe_requests()
        rows = self.format.prompt_rows(requests)
        plain, kept = self.images.expand(rows), self.images.expand_kept(rows)
        if plain[0] != kept[0]:
            return False
        ours, theirs = (self._logits(self.images.pad(*expanded), 1) for expanded in (kept, plain))
        tolerance = 1e-4 if self.model.dtype in (_torch().float32, _torch().float64) else 5e-2
        return _torch().allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)

    def encode(self, rows: list[Row], new_tokens: int = 0) -> dict[str, Any]:
        """Inputs of whole conversations, padded on the left; with room for `new_tokens`."""
        ids, extra = self.expand(rows)
        self._check_lengths(rows, ids, new_tokens)
        return self.images.pad(ids, extra)

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

        with torch.inference_mode(), self.lock:
            if self._has_logits_to_keep:
                return self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
            return self.model(**inputs, use_cache=False).logits[:, -keep:]

    def _batches(self, rows: list[Row], new_tokens: int) -> Iterator[list[int]]:
        """Indices of rows, longest first, so that memory runs out early or never."""
        sizes = [len(row.ids) + len(row.images) * (self.images.tokens_an_image - 1) + new_tokens for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (bool(rows[i].images), sizes[i]), reverse=True)
        batch: list[int] = []
        for i in order:
            if batch:
                full = len(batch) == self.limits.rows or (len(batch) + 1) * sizes[batch[0]] > self.limits.tokens
                # Processors take batches in which every conversation has images, or none has.
                if full or bool(rows[batch[0]].images) != bool(rows[i].images):
                    yield batch
                    batch = []
            batch.append(i)
        if batch:
            yield batch

    def in_batches(
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
                _ = self.keeps_images  # also learns how many tokens an image takes, before lengths are estimated
            for batch in self._batches(rows, new_tokens):
                halving(batch, part, self.limits)

    def logprobs(
        self, requests: Sequence[ICLRequest], wanted: list[list[str]], progress: bool
    ) -> list[list[np.ndarray]]:
        """Log-probabilities of the tokens of every wanted answer of every request."""
        result: list[list[np.ndarray]] = []
        with progress_bar("scoring", sum(map(len, wanted)), progress) as bar:
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
        with self.lock:
            keys, pictures = self.images.keyed(rows)
            kept = self.images.keep(pictures)
            ids = [self.images.place(row, own, kept) for row, own in zip(rows, keys, strict=True)]
            self._check_lengths(rows, ids)
            lines = _lines(rows, placed, ids, keys, self.images)
            plan = make_plan(lines, share=share, pack=pack, least=least)
            self.engine.run(plan, pictures, results.read)

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
            ids, extra = self.images.expand(some) if any(row.images for row in some) else ([r.ids for r in some], {})
            self._check_lengths(some, ids)
            logits = self._logits(self.images.pad(ids, extra), keep).float()
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
            halving(batch, run, self.limits)


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


def _attention(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def _torch() -> Any:
    import torch

    return torch


def progress_bar(title: str, total: int, shown: bool) -> tqdm:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="answer", **bar_options(shown))
