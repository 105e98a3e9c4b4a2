"""`drum-hf bench score`: the scoring engine against the ways it replaces, in one run on one machine."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...types import ICLRequest
from .machine import Measured, describe_machine, measure_gemm, measure_memory
from .shapes import SHAPES, Shape, all_pairs, build, decoder_flops, vision_flops

__all__ = ["bench_score", "describe"]

logger = logging.getLogger(__name__)

#: Pairs of the sample that the slow ways are timed on, and the batch of the batched one. Our choice.
_PLAIN, _BATCHED, _BATCH = 12, 24, 8


@dataclasses.dataclass(frozen=True)
class _Case:
    shape: str
    rows: int
    dtype: str
    device: str
    threads: int | None
    sample: int | None

    def load(self) -> tuple[Any, Any, list[ICLRequest]]:
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        model, processor = build(self.shape, getattr(torch, self.dtype), self.device)
        return model, processor, all_pairs(SHAPES[self.shape], self.rows)


def bench_score(
    shape: str = "smolvlm-256m",
    *,
    rows: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    sample: int | None = None,
) -> dict[str, Any]:
    """Score each of `rows` rows after each of the others, in three ways.

    plain: one pair a forward pass, both images from their pixels, all logits: the way of published research code.
    plain_batched: the same in batches of 8, padded.
    engine: `TransformersLVLM` behind `CachedLVLM` and a new score store, in one call; then once more, to be read back.

    Where all pairs would take the first two ways too long, they are timed on a sample, spread evenly. On the CPU each
    way has a process of its own. Loading a model, and the engine's trial of what it may share, are not in the times.

    Args:
        shape: one of `SHAPES`.
        rows: rows * (rows - 1) pairs.
        dtype: of the weights, as torch calls it.
        device: "cpu" or "cuda".
        threads: of torch on the CPU; its own choice by default.
        sample: pairs that the slow ways are timed on; by default 12 and 24, on a GPU four times as many.

    Returns:
        `shape`, `pairs`, `plain`, `plain_batched`, `engine` (`pairs_per_s`, `peak_mb`, `pairs` timed), `ratio_plain`,
        `ratio_batched`, `ratio_count` (by FLOPs alone), `floor_share` (the least FLOPs at the rate of a matrix
        product, against the engine's time), `rerun_share` (a second run over the same pairs, against the first),
        `gflop_a_pair` (least, and plain), `largest_difference` (between the engine's scores and the plain way's on its
        sample), `machine`.
    """
    case = _Case(shape, rows, dtype, device, threads, sample)
    pairs = rows * (rows - 1)
    times = 4 if device.startswith("cuda") else 1
    import torch

    kind = getattr(torch, dtype)
    gemm = measure_gemm(kind, device)
    found: dict[str, Measured] = {}
    ways: Sequence[tuple[str, Any, int]] = (
        ("plain", _plain, min(pairs, sample or _PLAIN * times)),
        ("plain_batched", _batched, min(pairs, sample or _BATCHED * times)),
        ("engine", _engine, pairs),
    )
    for name, way, count in ways:
        logger.info("%s: %d of %d pairs", name, count, pairs)
        found[name] = measure_memory(way, case, count, device=device)
        logger.info("%s: %.3g pairs/s, %.0f MiB", name, found[name].result["rate"], found[name].peak_mb)
    gemm = max(gemm, measure_gemm(kind, device))  # the machine at its best, before or after
    engine = found["engine"].result
    least, plain_flops = _least(SHAPES[shape], engine, pairs)
    common = [(engine["scores"][i], score) for i, score in found["plain"].result["scores"].items()]
    return {
        "shape": shape,
        "pairs": pairs,
        **{
            name: {
                "pairs_per_s": round(measured.result["rate"], 4),
                "peak_mb": round(measured.peak_mb),
                "pairs": count,
            }
            for (name, _, count), measured in zip(ways, found.values(), strict=True)
        },
        "ratio_plain": round(engine["rate"] / found["plain"].result["rate"], 2),
        "ratio_batched": round(engine["rate"] / found["plain_batched"].result["rate"], 2),
        "floor_share": round(least / gemm / engine["seconds"], 3),
        "rerun_share": round(engine["rerun_seconds"] / engine["seconds"], 5),
        "ratio_count": round(plain_flops * pairs / least, 2),
        "gflop_a_pair": {"least": round(least / pairs / 1e9, 1), "plain": round(plain_flops / 1e9, 1)},
        "gemm_gflops": round(gemm / 1e9),
        "largest_difference": float(max(abs(a - b) for a, b in common)),
        "capabilities": engine["capabilities"],
        "dtype": dtype,
        "machine": describe_machine(device) | ({"torch_threads": threads} if threads else {}),
    }


def _least(shape: Shape, engine: dict[str, Any], pairs: int) -> tuple[float, float]:
    """The least FLOPs that give all scores, and those of one pair run whole."""
    tokens, prefix, suffix = engine["tokens"], engine["prefix_tokens"], engine["suffix_tokens"]
    rows = engine["images"]
    seen = (tokens - suffix) * prefix / 2 + suffix * (prefix + suffix / pairs / 2)
    least = rows * vision_flops(shape) + decoder_flops(shape, tokens, seen / tokens, engine["answer_tokens"])
    whole = round(prefix + suffix / pairs)
    plain = 2 * vision_flops(shape) + decoder_flops(shape, whole, whole / 2, whole)
    return least, plain


# ---- the three ways; each is called in a process of its own ----


def _spread(pairs: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, pairs - 1, count)})


def _synchronise(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _plain(case: _Case, count: int, batch: int = 1) -> dict[str, Any]:
    model, processor, requests = case.load()
    chosen = _spread(len(requests), count)
    batches = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    _whole(model, processor, [requests[i] for i in batches[0]])  # a warm-up
    _synchronise(case.device)
    start = time.perf_counter()
    scores: dict[int, float] = {}
    for numbers in batches:
        scores.update(zip(numbers, _whole(model, processor, [requests[i] for i in numbers]), strict=True))
    _synchronise(case.device)
    return {"rate": len(chosen) / (time.perf_counter() - start), "scores": scores}


def _batched(case: _Case, count: int) -> dict[str, Any]:
    return _plain(case, count, _BATCH)


def _whole(model: Any, processor: Any, requests: list[ICLRequest]) -> list[float]:
    """Mean log-probability of each answer, as research code computes it; all conversations padded on the left."""
    import torch

    from ...lvlm.prompts import build_messages

    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    texts, images, answers = [], [], []
    for request in requests:
        prompt = processor.apply_chat_template(build_messages(request), add_generation_prompt=True, tokenize=False)
        texts.append(f"{prompt} {request.responses[0]}")
        images.append([d.image for d in request.demonstrations] + [request.query.image])
        answers.append(len(tokenizer(request.responses[0], add_special_tokens=False)["input_ids"]))
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False).to(
        model.device
    )
    for name, value in inputs.items():
        if torch.is_floating_point(value):
            inputs[name] = value.to(model.dtype)
    with torch.inference_mode():
        logits = model(**inputs).logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return [float(chosen[row, -size:].mean()) for row, size in enumerate(answers)]


def _engine(case: _Case, count: int) -> dict[str, Any]:
    from ...lvlm.local.model import TransformersLVLM
    from ...scores.cached import CachedLVLM
    from ...scores.store import ScoreStore

    model, processor, requests = case.load()
    lvlm = TransformersLVLM(model, processor, name=f"random weights at the shape of {case.shape}")
    capabilities, _ = lvlm.capabilities, lvlm.fingerprint
    sizes = lvlm.count_tokens([requests[0]])[0]
    with tempfile.TemporaryDirectory() as folder, ScoreStore(Path(folder) / "scores.sqlite") as store:
        cached = CachedLVLM(lvlm, store)
        _synchronise(case.device)
        start = time.perf_counter()
        scores = cached.score(requests, progress=False)
        seconds = time.perf_counter() - start
        again = time.perf_counter()
        second = cached.score(requests, progress=False)
        rerun = time.perf_counter() - again
    if not np.array_equal(scores, second):
        raise RuntimeError("the store gave other scores than were put in")
    rows = len({request.query.key for request in requests})
    answer = [len(processor.tokenizer(r.responses[0], add_special_tokens=False)["input_ids"]) for r in requests]
    prompts = lvlm.count_tokens([dataclasses.replace(r, demonstrations=()) for r in requests[:: rows - 1]])
    # A demonstration's turns end with its answer and what closes the turn; a query's run lacks its last token.
    suffix = float(np.mean(prompts) * len(requests) + sum(answer) - len(requests))
    prefix = sizes - prompts[0]
    return {
        "rate": len(requests) / seconds,
        "seconds": seconds,
        "rerun_seconds": rerun,
        "scores": scores.tolist(),
        "images": rows,
        "prefix_tokens": prefix,
        "suffix_tokens": suffix,
        "tokens": suffix + rows * prefix,
        "answer_tokens": sum(answer),
        "capabilities": capabilities.describe(),
    }


def describe(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [f"{result['shape']}, {result['dtype']}: {result['pairs']} pairs, {result['machine']['gpu'] or 'CPU'}"]
    lines.append(f"  engine: peak {result['engine']['peak_mb']:,} MiB")
    for name in ("plain", "plain_batched"):
        way = result[name]
        part = "" if way["pairs"] == result["pairs"] else f" (timed on {way['pairs']} of them)"
        speed = result["engine"]["pairs_per_s"] / way["pairs_per_s"]
        lines.append(f"  {name}: the engine is {speed:.1f} x as fast; peak {way['peak_mb']:,} MiB{part}")
    least, plain = result["gflop_a_pair"]["least"], result["gflop_a_pair"]["plain"]
    lines.append(
        f"  {least} GFLOP a pair at least, {plain} when run whole, {result['ratio_count']:.1f} x by count; "
        f"{result['floor_share']:.0%} of the floor"
    )
    lines.append(f"  a second run takes {result['rerun_share']:.2%} of the first's time")
    lines.append(f"  largest difference from the plain way: {result['largest_difference']:.1e}")
    return "\n".join(lines)
