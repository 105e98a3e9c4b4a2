"""Train the playground's two models from seeds: ``python -m drum_hf.playground.build [--out DIR] [--work-dir DIR]``.

Runs on a CPU. Every stage checkpoints into the work directory, so a stopped build goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .curriculum import MAX_TURNS, ConversationMaker, build_lvlm, train_dialogue, train_induction, train_pairs
from .pretraining import (
    PATCH,
    PIXELS,
    Pool,
    build_clip,
    probe,
    render_pool,
    start_tower,
    train_clip,
    train_tower,
    train_vision,
)

logger = logging.getLogger(__name__)

#: What ships. `--quick` (tests) runs every stage for a few steps.
STEPS = {
    "scenes": 32_000,
    "digits": 8_000,
    "vision": 3_000,
    "clip": 700,
    "tower": 500,
    "induction": 800,
    "pairs": 800,
    "dialogue": 2_400,
    "long": 900,
}
QUICK = dict.fromkeys(STEPS, 3) | {"scenes": 1_500, "digits": 1_200}


def _pool(work: Path, seed: int, steps: dict[str, int]) -> Pool:
    from safetensors.torch import load_file, save_file

    pixels, facts = work / "pool.safetensors", work / "pool.json"
    if pixels.exists() and facts.exists():
        shown = json.loads(facts.read_text())
        return Pool(load_file(pixels)["pixels"], shown["values"], shown["frames"])
    pool = render_pool(seed, steps["scenes"], steps["digits"])
    save_file({"pixels": pool.pixels}, pixels)
    facts.write_text(json.dumps({"values": pool.values, "frames": pool.frames}))
    return pool


@torch.no_grad()
def _in_chunks(function: Callable[[torch.Tensor], torch.Tensor], pool: Pool, size: int = 500) -> torch.Tensor:
    return torch.cat([function(pool.normalised(slice(i, i + size))) for i in range(0, len(pool), size)])


def train_encoder(work: Path, *, seed: int, steps: dict[str, int], pool: Pool) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The CLIP: its image tower by names first, then both towers by contrast.

    Returns:
        model, processor, the image tower as it was after the first stage, and the figures of both.
    """
    clip, processor = build_clip(seed)
    report: dict[str, Any] = {}
    report["vision"] = train_vision(clip, pool, seed=seed, steps=steps["vision"], checkpoint=work / "vision.pt")
    tower = copy.deepcopy(clip.vision_model).requires_grad_(False)
    report["clip"] = train_clip(clip, processor, pool, seed=seed, steps=steps["clip"], checkpoint=work / "clip.pt")
    embeddings = _in_chunks(lambda x: clip.get_image_features(pixel_values=x).pooler_output, pool)
    report["clip"]["probes"] = probe(embeddings, pool)
    return clip, processor, tower, report


def train_lvlm(
    work: Path, source: Any, *, seed: int, steps: dict[str, int], pool: Pool
) -> tuple[Any, Any, dict[str, Any]]:
    """The LVLM: text warm-up, a tower after `source`, then conversations over the frozen tower's states."""
    model, processor = build_lvlm(seed)
    tower = model.model.vision_model.requires_grad_(False)
    maker = ConversationMaker(processor.tokenizer, pool)
    report: dict[str, Any] = {}
    report["induction"] = train_induction(model, seed=seed, steps=steps["induction"], checkpoint=work / "induction.pt")
    report["pairs"] = train_pairs(model, maker, seed=seed, steps=steps["pairs"], checkpoint=work / "pairs.pt")

    start_tower(tower, source)
    tower.requires_grad_(True)
    report["tower"] = train_tower(tower, source, pool, seed=seed, steps=steps["tower"], checkpoint=work / "tower.pt")
    tower.requires_grad_(False)
    mask = torch.ones(500, PIXELS // PATCH, PIXELS // PATCH, dtype=torch.bool)
    states = _in_chunks(lambda x: tower(pixel_values=x, patch_attention_mask=mask[: len(x)]).last_hidden_state, pool)
    report["tower"]["probes"] = probe(states.flatten(1), pool)

    for stage, turns, batch, rate in (("dialogue", (1, 6), 24, 1e-3), ("long", (2, MAX_TURNS), 10, 5e-4)):
        report[stage] = train_dialogue(
            model,
            maker,
            states.half(),
            name=f"LVLM {stage}",
            seed=seed,
            steps=steps[stage],
            checkpoint=work / f"{stage}.pt",
            turns=turns,
            batch=batch,
            learning_rate=rate,
            local=stage == "long",
        )
    return model, processor, report


def ship(model: Any, processor: Any, folder: Path) -> None:
    """Save weights as fp16, half the size, under a configuration that has them loaded as fp32, as CPUs need."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def build(out: Path, work: Path, *, seed: int = 7, steps: dict[str, int] | None = None) -> dict[str, Any]:
    """Train both models and save them under `out` as `clip/` and `lvlm/`; returns the figures of every stage."""
    steps = steps or STEPS
    work.mkdir(parents=True, exist_ok=True)
    pool = _pool(work, seed, steps)
    clip, clip_processor, tower, report = train_encoder(work, seed=seed, steps=steps, pool=pool)
    lvlm, lvlm_processor, learned = train_lvlm(work, tower, seed=seed, steps=steps, pool=pool)
    report |= learned
    ship(clip, clip_processor, out / "clip")
    ship(lvlm, lvlm_processor, out / "lvlm")
    report["training_seconds"] = round(sum(figures["seconds"] for figures in report.values()))
    facts = {"seed": seed, "steps": steps} | report
    (out / "build.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def main(argv: list[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m drum_hf.playground.build")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--work-dir", type=Path, default=Path("playground-build"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few steps a stage: to test the script, not to use")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = build(args.out, args.work_dir, seed=args.seed, steps=QUICK if args.quick else STEPS)
    logger.info("%s", json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
