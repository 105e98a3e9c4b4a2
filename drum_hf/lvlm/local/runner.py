"""Runs conversations through a local model, the cheapest way that a trial finds to leave its results as they are.

Whole from their pixels, one by one or padded on the left; or by a plan that shares what may be shared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import ContextOverflowError, NonFiniteScoreError
from ...types import Demonstration, ICLRequest, Query
from ...utils.optional import bar_options
from ..prompts import Answer, ChatFormat, Row
from .engine import MIN_SHARED, Engine, Limits, Line, Target, halving, make_plan
from .images import ImageInputs

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

__all__ = ["Capabilities", "Runner", "context_length", "progress_bar"]

logger = logging.getLogger(__name__)

#: How conversations are run to be answered: beside one another with features that are kept, or from their pixels, or
#: one by one from their pixels.
Generation = Literal["features", "pixels", "alone"]

# Answers tokenized and sorted by length together: enough for full batches, few enough to hold.
_ANSWERS_AT_ONCE = 4096

#: Tokens a forward pass where the user sets no limit: enough to fill the device, and no more. Our choice; on two
#: cores at the shape of SmolVLM-256M, 2,700 and 5,400 were the fastest of 700 to 11,000.
_MOST_TOKENS = {"cpu": 4_096, "other": 65_536}

#: Share of the free memory that a forward pass may take, by our estimate. Our choice.
_SHARE_OF_MEMORY = 0.5

# Tokenizers without a limit of their own say 1e30; a context of more than this is such a "no limit".
_NO_LIMIT = 10_000_000

#: Tokens that each conversation of the trial is answered with, and of each the likeliest that are compared.
_TRIAL_TOKENS = 3
_TRIAL_LIKELIEST = 10


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """The ways of running this model that leave its results as they are, found by trial.

    Every way is compared with conversations that run alone and from their pixels: text alone, one image, several,
    and several answers, beside one another.

    Attributes:
        image_features: an image passes the vision tower once, whatever it is shown with.
        shared_prefix: demonstrations that several queries share pass the decoder once.
        packed_answers: answers to one conversation branch within one sequence.
        batches: conversations that are run whole may run beside one another.
        generation: how conversations are answered: beside one another with "features" that are kept or from their
            "pixels", or "alone" from their pixels; None: not tried yet.
        attention: the decoder's attention implementation.
        reasons: why something is not done, by its name.
    """

    image_features: bool
    shared_prefix: bool
    packed_answers: bool
    batches: bool = True
    generation: Generation | None = None
    attention: str | None = None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def describe(self) -> str:
        """One line for a log or a terminal."""
        names = ["image_features", "shared_prefix", "packed_answers", *(["batches"] if not self.batches else [])]
        parts = [
            f"{name} {'yes' if getattr(self, name) else 'no (' + self.reasons.get(name, 'not tried') + ')'}"
            for name in names
        ]
        if self.generation not in (None, "features"):
            parts.append(f"generation {self.generation} ({self.reasons.get('generation', 'no features are kept')})")
        return ", ".join([*parts, f"attention {self.attention}"])


def _probes() -> list[tuple[ICLRequest, list[str]]]:
    """Requests unlike one another, in images of two shapes, with their answers."""
    from PIL import Image

    noise = np.random.default_rng(0)
    wide, tall = (Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((48, 64), (64, 40)))
    shown = (Demonstration("probe", wide, "what is in this picture?", "it is red"),)
    text = (Demonstration("probe text", None, "which colour comes next?", "blue"),)
    return [
        (ICLRequest(Query(tall, "what is it?"), shown), ["it is red", "blue"]),
        (ICLRequest(Query(wide, "which colour has it, then?"), shown), ["it is red"]),
        (ICLRequest(Query(None, "which one?")), ["blue"]),
        (ICLRequest(Query(wide, "what is in this picture?"), text), ["red, it is"]),
    ]


class Runner:
    """What `TransformersLVLM` runs on.

    Args:
        model, chat: what runs, and the format of its conversations.
        name: of the model, for messages.
        query_processor, batch_size, max_batch_tokens, image_cache_bytes, image_folder: see `TransformersLVLM` and
            `ImageInputs`.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        *,
        name: str,
        query_processor: Any,
        batch_size: int,
        max_batch_tokens: int | None,
        image_cache_bytes: int | None,
        image_folder: Callable[[], Path] | None,
    ) -> None:
        self.model, self.format, self.name = model, chat, name
        self.limits = Limits(batch_size, max_batch_tokens or _affordable_tokens(model))
        self.images = ImageInputs(
            model,
            chat,
            query_processor=query_processor,
            batch_size=batch_size,
            limit=image_cache_bytes,
            folder=image_folder,
        )
        self.engine = Engine(model, self.images, self.limits)
        self.lock = threading.RLock()  # one forward pass at a time: it may carry a hook
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def context_length(self) -> int | None:
        """Tokens that fit the context, or None where the model states no limit."""
        return context_length(self.model, self.format.tokenizer)

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
            or self.images.budgets_differ
        ):
            raise ValueError(
                f"expected a family whose image tokens may be joined, and {type(self.model).__name__} is not one; use "
                "a smaller LVLM as the cheaper one"
            )
        other = copy.copy(self)
        other.name = f"{self.name} with image tokens / {factor}"
        other.images = self.images.fewer_tokens(factor)
        other.engine = Engine(self.model, other.images, self.limits)
        other.__dict__["generation"] = "features"
        return other

    # ---- what a trial finds ----

    @cached_property
    def _trial(self) -> list[tuple[ICLRequest, list[str], list[np.ndarray]]]:
        """Requests, answers and their tokens' log-probabilities, each answer alone and from its pixels.

        What the family can't run at all, such as several images, is left out.
        """
        found, failure = [], None
        self.images.try_text(self.format)
        for request, answers in _probes():
            try:
                alone = [self._answers([(request, [answer])], self._run_alone)[0][0] for answer in answers]
            except _FAULTS as error:
                if _is_memory(error):
                    raise
                failure = error
                logger.debug("the trial leaves a conversation out: %s: %s", type(error).__name__, error)
            else:
                found.append((request, answers, alone))
        if not found and failure is not None:
            raise failure
        return found

    def _answers(
        self,
        asked: Sequence[tuple[ICLRequest, list[str]]],
        run: Callable[[list[Row], list[list[Answer]], _Results], None],
    ) -> list[list[np.ndarray]]:
        requests, wanted = [request for request, _ in asked], [answers for _, answers in asked]
        rows, placed = self.format.answer_rows(requests, wanted)
        results = _Results(requests, wanted, self.name, strict=False)
        run(rows, placed, results)
        return results.values

    @cached_property
    def _tolerance(self) -> float:
        """Largest difference of a token's log-probability that rounding explains."""
        if self._is_exact:
            return 1e-4
        request, answers, alone = self._trial[0]
        copies = self._answers([(request, answers[:1])] * 4, self._run_whole)
        return max(0.1, 4 * max(float(np.abs(one[0] - alone[0]).max()) for one in copies))

    @property
    def _is_exact(self) -> bool:
        import torch

        return self.model.dtype in (torch.float32, torch.float64)

    @cached_property
    def capabilities(self) -> Capabilities:
        """Ways to score that leave this model's results as they are; tried out on first use."""
        reasons: dict[str, str] = {}
        asked = [(request, answers) for request, answers, _ in self._trial]
        expected = [value for _, _, alone in self._trial for value in alone]

        def works(name: str, run: Callable[[list[Row], list[list[Answer]], _Results], None]) -> bool:
            try:
                found = [value for values in self._answers(asked, run) for value in values]
            except _FAULTS as error:
                if _is_memory(error):
                    raise
                reasons[name] = f"{type(error).__name__}: {error}"
                logger.debug("%s: %s", name, reasons[name])
                return False
            worst = max(
                float(np.abs(a - b).max(initial=0.0) if a.shape == b.shape else np.inf)
                for a, b in zip(found, expected, strict=True)
            )
            if not worst <= self._tolerance:
                reasons[name] = f"log-probabilities differ by {worst:.2g}"
            return worst <= self._tolerance

        def planned(name: str, share: bool, pack: bool) -> bool:
            return works(
                name, lambda rows, placed, results: self._run_planned(rows, placed, results, share, pack, least=1)
            )

        features = shares = packs = False
        if not self.images.can_keep or self.model.get_output_embeddings() is None:
            reasons["image_features"] = "the processor or the model has no interface for features computed apart"
        else:
            features = self._learn(reasons) and planned("image_features", False, False)
        kinds = _layer_kinds(self.model.config.get_text_config())
        if features:
            shares = planned("shared_prefix", True, False)
            if kinds == {"full_attention"}:
                packs = planned("packed_answers", shares, True)
            else:
                # A window or a convolution sees neighbours in the sequence, which in another branch are strangers.
                reasons["packed_answers"] = f"layers of the kinds {', '.join(sorted(kinds))}"
        else:
            self.format.expansions = None
            for name in ("shared_prefix", "packed_answers"):
                reasons[name] = "needs image_features"
        batches = features or works("batches", self._run_whole)
        found = Capabilities(features, shares, packs, batches, None, _attention(self.model), reasons)
        logger.info("%s: %s", self.name, found.describe())
        return found

    def _learn(self, reasons: dict[str, str]) -> bool:
        rows = self.format.prompt_rows([request for request, _, _ in self._trial])
        try:
            self.images.learn_expansion([image for row in rows for image in row.images])
        except _FAULTS as error:
            if _is_memory(error):
                raise
            reasons["image_features"] = f"{type(error).__name__}: {error}"
            return False
        return True

    def prepare(self) -> None:
        """Try out what isn't yet, before anything is tokenized: it is found how images are put in place.

        Raises:
            ValueError: queries' images are to be shown otherwise than demonstrations', and the family's images can't
                be computed apart.
        """
        able = self.capabilities
        if self.images.budgets_differ and not self.images.apart:
            if not able.image_features or self.generation != "features":
                reason = able.reasons.get("image_features") or able.reasons.get("generation")
                raise ValueError(
                    f"expected a family whose images can be computed apart, to show queries' otherwise, and "
                    f"{type(self.model).__name__} is not one ({reason}); leave query_image_budget out"
                )
            self.images.apart = True

    @cached_property
    def generation(self) -> Generation:
        """How conversations are answered: the cheapest way by which their first tokens are those of each alone."""
        requests = [request for request, _, _ in self._trial]
        able = self.capabilities
        rows = self.format.prompt_rows(requests)
        tolerance = 1e-3 if self._is_exact else 0.25
        expected = [self._first_steps([row], "alone")[0] for row in rows]
        ways: tuple[Generation, ...] = ("features", "pixels") if able.image_features else ("pixels",)
        for way in ways:
            try:
                found = self._first_steps(rows, way)
            except _FAULTS as error:
                if _is_memory(error):
                    raise
                able.reasons["generation"] = f"{way}: {type(error).__name__}: {error}"
                continue
            worst = max(_difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
            if worst <= tolerance:
                return way
            able.reasons["generation"] = f"{way}: log-probabilities differ by {worst:.2g}"
        logger.info("%s answers one conversation at a time: %s", self.name, able.reasons["generation"])
        return "alone"

    def _first_steps(self, rows: list[Row], way: Generation) -> list[tuple[list[int], np.ndarray]]:
        """Of each row the first tokens of its answer, and the log-probabilities (tokens, vocabulary) they are from."""
        import torch

        found: dict[int, tuple[list[int], np.ndarray]] = {}
        for batch in self._batches(rows, _TRIAL_TOKENS, alike=way != "features"):
            inputs = self._encoded([rows[i] for i in batch], way)
            with self._greedy(_TRIAL_TOKENS, stops=False) as settings:
                settings.update(return_dict_in_generate=True, output_logits=True)
                out = self.model.generate(**inputs, generation_config=settings)
            steps = torch.stack(out.logits, 1).float().log_softmax(-1).cpu().numpy()
            new = out.sequences[:, -steps.shape[1] :].tolist()
            found.update(zip(batch, zip(new, steps, strict=True), strict=True))
        return [found[i] for i in range(len(rows))]

    @property
    def keeps_images(self) -> bool:
        """Whether conversations that are answered beside one another may take kept features."""
        return self.generation == "features"

    # ---- from rows to tensors ----

    def prompt_rows(self, requests: Sequence[ICLRequest]) -> list[Row]:
        """A row for each conversation, up to where the model begins to answer; see `ChatFormat.prompt_rows`."""
        self.prepare()
        return self.format.prompt_rows(requests)

    def count(self, rows: list[Row]) -> list[int]:
        """Tokens of each row with its images' in place."""
        if self.capabilities.image_features:
            keys, pictures = self.images.keyed(rows)
            kept = self.images.keep(pictures)
            return [len(self.images.place(row, own, kept)) for row, own in zip(rows, keys, strict=True)]
        return [len(ids) for ids in self.images.expand(rows)[0]]

    def _encoded(self, rows: list[Row], way: Generation, new_tokens: int = 0) -> dict[str, Any]:
        """Inputs of whole conversations, padded on the left; with room for `new_tokens`."""
        pictured = any(row.images for row in rows)
        ids, extra = self.images.expand_kept(rows) if pictured and way == "features" else self.images.expand(rows)
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

    # ---- answering ----

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and what ends a turn in the chat template."""
        stated = self.model.generation_config.eos_token_id
        stops = set(stated if isinstance(stated, list) else [] if stated is None else [stated])
        if self.format.tokenizer.eos_token_id is not None:
            stops.add(self.format.tokenizer.eos_token_id)
        stops.update(self.format.special_in(self.format.stop + self.format.end_of_turn)[:1])
        return sorted(stops)

    @contextlib.contextmanager
    def _greedy(self, max_new_tokens: int, *, stops: bool = True) -> Iterator[Any]:
        """Settings of a greedy answer, and nothing of the model's own, which transformers would add to them."""
        from transformers import GenerationConfig

        with self.lock:
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.format.tokenizer.pad_token_id,
                eos_token_id=(self.stop_ids or None) if stops else None,
            )
            own = self.model.generation_config
            self.model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
            try:
                yield settings
            finally:
                self.model.generation_config = own

    def generate(self, rows: list[Row], max_new_tokens: int, bar: tqdm) -> list[list[int]]:
        """Token ids of a greedy answer to each row, what ends it included."""
        answers: list[list[int]] = [[]] * len(rows)
        way = self.generation if rows else "alone"

        def run(batch: list[int]) -> None:
            inputs = self._encoded([rows[i] for i in batch], way, max_new_tokens)
            with self._greedy(max_new_tokens) as settings:
                out = self.model.generate(**inputs, generation_config=settings)
            for i, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[i] = ids
            bar.update(len(batch))

        self.in_batches(rows, run, max_new_tokens, alike=way != "features", alone=way == "alone")
        return answers

    # ---- running ----

    def _logits(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions, (rows, keep, vocabulary)."""
        import torch

        with torch.inference_mode(), self.lock:
            if self._has_logits_to_keep:
                return self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
            return self.model(**inputs, use_cache=False).logits[:, -keep:]

    def _batches(self, rows: list[Row], new_tokens: int, *, alike: bool) -> Iterator[list[int]]:
        """Indices of rows, longest first, so that memory runs out early or never.

        With `alike`, conversations run beside others with as many images: to Mllama, missing ones are others.
        Processors take batches in which every conversation has images, or none has.
        """
        sizes = [len(row.ids) + len(row.images) * (self.images.tokens_an_image - 1) + new_tokens for row in rows]
        kinds = [len(row.images) if alike else bool(row.images) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (kinds[i], sizes[i]), reverse=True)
        batch: list[int] = []
        for i in order:
            if batch:
                full = len(batch) == self.limits.rows or (len(batch) + 1) * sizes[batch[0]] > self.limits.tokens
                if full or kinds[batch[0]] != kinds[i]:
                    yield batch
                    batch = []
            batch.append(i)
        if batch:
            yield batch

    def in_batches(
        self,
        rows: list[Row],
        run: Callable[[list[int]], None],
        new_tokens: int = 0,
        *,
        alike: bool = True,
        alone: bool = False,
    ) -> None:
        """Call `run` on batches of row indices; a batch that doesn't fit the memory is halved, down to one row."""
        import torch

        with torch.inference_mode():
            for batch in self._batches(rows, new_tokens, alike=alike):
                for part in [[i] for i in batch] if alone else [batch]:
                    halving(part, run, self.limits)

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
        self.prepare()
        able = self.capabilities
        rows, placed = self.format.answer_rows(requests, wanted)
        results = _Results(requests, wanted, self.name, bar)
        if able.image_features:
            self._run_planned(rows, placed, results, able.shared_prefix, able.packed_answers)
        elif able.batches:
            self._run_whole(rows, placed, results)
        else:
            self._run_alone(rows, placed, results)
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

    def _run_alone(self, rows: list[Row], placed: list[list[Answer]], results: _Results) -> None:
        """Every conversation whole, from its pixels and by itself."""
        self._run_whole(rows, placed, results, alone=True)

    def _run_whole(
        self, rows: list[Row], placed: list[list[Answer]], results: _Results, *, alone: bool = False
    ) -> None:
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
            ids, extra = self.images.expand(some)
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

        self.in_batches(rows, run, alone=alone)


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
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]

    def largest(name: str, default: int) -> int:
        return max(getattr(layer, name, None) or default for layer in layers)

    hidden = largest("hidden_size", 1)
    heads = largest("num_attention_heads", 1)
    width = largest("head_dim", hidden // heads)
    kept = 6 * text.num_hidden_layers * largest("num_key_value_heads", heads) * width
    wide = 8 * hidden + 4 * largest("intermediate_size", 4 * hidden)
    a_token = (kept + wide) * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    most = _MOST_TOKENS.get(model.device.type, _MOST_TOKENS["other"])
    return max(512, min(most, int(_SHARE_OF_MEMORY * free / a_token)))


def _attention(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def context_length(model: Any, tokenizer: Any) -> int | None:
    """Tokens that fit a model's context, or None where neither it nor its tokenizer states a limit."""
    limits = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    stated = [int(limit) for limit in limits if limit and limit < _NO_LIMIT]
    return min(stated) if stated else None


def _layer_kinds(config: Any) -> set[str]:
    stated = getattr(config, "layer_types", None)
    if stated:
        return set(stated)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return {"sliding_attention" if windowed else "full_attention"}


#: What a model or a processor raises on something that its family can't do.
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _is_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _difference(ours: tuple[list[int], np.ndarray], theirs: tuple[list[int], np.ndarray]) -> float:
    """Largest difference of the likeliest tokens' log-probabilities, up to where the answers part."""
    worst = 0.0
    for mine, yours, a, b in zip(ours[0], theirs[0], ours[1], theirs[1], strict=True):
        likeliest = np.argsort(b)[-_TRIAL_LIKELIEST:]
        worst = max(worst, float(np.abs(a[likeliest] - b[likeliest]).max()))
        if mine != yours:
            break
    return worst


def progress_bar(title: str, total: int, shown: bool) -> tqdm:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="answer", **bar_options(shown))
