"""Train the playground's models from seeds: ``python -m drum_hf.playground.build [--out DIR] [--work-dir DIR]``.

Runs on a CPU. Every stage checkpoints into the work directory, so a stopped build goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.episodes import Conversation
from .conversations import DEMANDING, EVERYDAY, ORDINARY, Album, Chat
from .curriculum import Encoder, build_lvlm, train_chat, train_induction, train_pairs
from .pretraining import Pool, build_clip, probe, render_pool, train_clip, train_vision
from .tower import patch_states, render_groups, render_pairs, start_tower, train_tower
from .tuning import VARIANTS, tune, tuning_folder

logger = logging.getLogger(__name__)

#: What ships: pictures, and steps of each stage. `--quick` (tests) runs every stage for a few steps.
STEPS = {
    "scenes": 32_000,
    "digits": 8_000,
    "pairs": 12_000,
    "groups": 12_000,
    "vision": 3_000,
    "clip": 700,
    "tower": 1_500,
    "induction": 1_200,
    "bare pairs": 800,
    "chat": 1_600,
    "more chat": 1_600,
    "last chat": 1_300,
    "tuning": 3_600,
}
QUICK = dict.fromkeys(STEPS, 3) | {"scenes": 4_000, "digits": 1_500, "pairs": 400, "groups": 600}


def _kept(work: Path, name: str, render: Callable[[], Pool]) -> Pool:
    """A pool from the work directory, where it was rendered before."""
    from safetensors.torch import load_file, save_file

    pixels, facts = work / f"{name}.safetensors", work / f"{name}.json"
    if pixels.exists() and facts.exists():
        shown = json.loads(facts.read_text())
        return Pool(load_file(pixels)["pixels"], shown["values"], shown["frames"])
    pool = render()
    save_file({"pixels": pool.pixels}, pixels)
    facts.write_text(json.dumps({"values": pool.values, "frames": pool.frames}))
    return pool


def render_all(work: Path, *, seed: int, steps: dict[str, int]) -> tuple[Pool, Pool, Pool]:
    """Scenes and digits, pairs of digits, groups of objects."""
    work.mkdir(parents=True, exist_ok=True)
    return (
        _kept(
            work,
            f"pool-{seed}-{steps['scenes']}-{steps['digits']}",
            lambda: render_pool(seed, steps["scenes"], steps["digits"]),
        ),
        _kept(work, f"pairs-{seed}-{steps['pairs']}", lambda: render_pairs(seed, steps["pairs"])),
        _kept(work, f"groups-{seed}-{steps['groups']}", lambda: render_groups(seed, steps["groups"])),
    )


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


def _chat(
    album: Album, shares: dict[str, float], seed: int, most: int, turns: int, stream: int
) -> Callable[[int, int], list[Conversation]]:
    """Draws a step's conversations: 1 to `most` turns each, the same for all, about `turns` in all."""
    chats = {n: Chat(album, turns=(n, n), shares=shares, seed=seed) for n in range(1, most + 1)}

    def draw(seed: int, step: int) -> list[Conversation]:
        n = int(np.random.default_rng([seed, stream, step]).integers(1, most + 1))
        return [chats[n].draw(1000 * step + i, images=False) for i in range(max(6, turns // n))]

    return draw


def train_base(
    work: Path, source: Any, album: Album, pools: Sequence[Pool], *, seed: int, steps: dict[str, int]
) -> tuple[Any, Any, dict[str, Any]]:
    """The base LVLM: text warm-up, a tower after `source`, then ordinary chat over the frozen tower's states."""
    model, processor = build_lvlm(seed)
    tower = model.model.vision_model.requires_grad_(False)
    encoder = Encoder(processor.tokenizer, album)
    report: dict[str, Any] = {
        "induction": train_induction(model, seed=seed, steps=steps["induction"], checkpoint=work / "induction.pt"),
        "bare pairs": train_pairs(
            model, encoder, seed=seed, steps=steps["bare pairs"], checkpoint=work / "bare-pairs.pt"
        ),
    }
    start_tower(tower, source)
    tower.requires_grad_(True)
    report["tower"] = train_tower(tower, pools, seed=seed, steps=steps["tower"], checkpoint=work / "tower.pt")
    tower.requires_grad_(False)
    seen = [patch_states(tower, pool) for pool in pools]
    report["tower"]["probes"] = probe(seen[0].float().flatten(1), pools[0])
    states = torch.cat(seen)
    stages: dict[str, dict[str, Any]] = {
        "chat": {"draw": _chat(album, EVERYDAY, seed, 6, 84, 5), "learning_rate": 1e-3},
        "more chat": {"draw": _chat(album, DEMANDING, seed + 1, 10, 84, 6), "learning_rate": 8e-4, "early": 0.5},
        "last chat": {"draw": _chat(album, ORDINARY, seed + 2, 10, 84, 7), "learning_rate": 8e-4, "rehearse": True},
    }
    for name, how in stages.items():
        report[name] = train_chat(
            model,
            encoder,
            states=states,
            seed=seed,
            steps=steps[name],
            checkpoint=work / f"{name.replace(' ', '-')}.pt",
            name=f"LVLM {name}",
            **how,
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
    """Train all models and save them under `out` as `clip/`, `lvlm-base/` and `lvlm/`; returns the stages' figures.

    Both LVLMs have had the same number of steps: the base's last ones were ordinary chat, the other's ICL tuning. The
    seconds of tuning are those of the last run, where it was taken up again.
    """
    steps = steps or STEPS
    pools = render_all(work, seed=seed, steps=steps)
    clip, clip_processor, tower, report = train_encoder(work, seed=seed, steps=steps, pool=pools[0])
    album = Album(pools)
    base, processor, learned = train_base(work, tower, album, pools, seed=seed, steps=steps)
    report |= learned
    ship(clip, clip_processor, out / "clip")
    ship(base, processor, work / "start")
    for name, variant in (("lvlm-base", "base"), ("lvlm", "tuned")):
        began = time.perf_counter()
        folder = work / "ablation" / tuning_folder(variant, work / "start", steps=steps["tuning"], seed=seed)
        tuner = tune(work / "start", album, VARIANTS[variant], folder, steps=steps["tuning"], seed=seed)
        ship(tuner.lvlm().model, processor, out / name)
        losses = [entry["loss"] for entry in tuner.state.log_history if "loss" in entry]
        report[f"tuning, {VARIANTS[variant].about}"] = {
            "loss": losses[-1] if losses else tuner.state.log_history[-1]["train_loss"],
            "seconds": time.perf_counter() - began,
        }
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
