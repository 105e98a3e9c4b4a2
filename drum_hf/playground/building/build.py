"""Train the playground's models from seeds: ``python -m drum_hf.playground.building [--out DIR] [--work-dir DIR]``.

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

from ...tuning.episodes import Conversation
from .conversations import DEMANDING, EVERYDAY, ORDINARY, Album, Chat
from .curriculum import Encoder, train_chat, train_induction, train_pairs, train_widening
from .lvlms import BLUEPRINTS, TinyLVLM
from .pretraining import PicturePool, build_clip, probe, render_pool, train_clip, train_vision
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
#: Of the pictures, the encoder and the first LVLM.
SEED = 7
QUICK = dict.fromkeys(STEPS, 3) | {"scenes": 4_000, "digits": 1_500, "pairs": 400, "groups": 600}
#: The other LVLM sees the same pictures with another tower, which starts from nothing. It is there to have others'
#: retrievers tried on it, and can do with less chat.
OTHER_STEPS = {
    "tower": 2_500,
    "induction": 4_000,
    "widening": 3_000,
    "bare pairs": 2_000,
    "chat": 1_600,
    "last chat": 1_000,
    "tuning": 3_600,
}
#: How ordinary chat goes on, stage by stage: what it is about, most turns, draws; and what is special in training.
CHATS: dict[str, tuple[dict[str, float], int, dict[str, Any]]] = {
    "chat": (EVERYDAY, 6, {"learning_rate": 1e-3}),
    "more chat": (DEMANDING, 10, {"learning_rate": 8e-4, "early": 0.5}),
    "last chat": (ORDINARY, 10, {"learning_rate": 8e-4, "rehearse": True}),
}


def _kept(work: Path, name: str, render: Callable[[], PicturePool]) -> PicturePool:
    """A pool from the work directory, where it was rendered before."""
    from safetensors.torch import load_file, save_file

    pixels, facts = work / f"{name}.safetensors", work / f"{name}.json"
    if pixels.exists() and facts.exists():
        shown = json.loads(facts.read_text())
        return PicturePool(load_file(pixels)["pixels"], shown["values"], shown["frames"])
    pool = render()
    save_file({"pixels": pool.pixels}, pixels)
    facts.write_text(json.dumps({"values": pool.values, "frames": pool.frames}))
    return pool


def render_all(work: Path, *, seed: int, steps: dict[str, int]) -> tuple[PicturePool, PicturePool, PicturePool]:
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
def _in_chunks(function: Callable[[torch.Tensor], torch.Tensor], pool: PicturePool, size: int = 500) -> torch.Tensor:
    return torch.cat([function(pool.normalised(slice(i, i + size))) for i in range(0, len(pool), size)])


def train_encoder(
    work: Path, *, seed: int, steps: dict[str, int], pool: PicturePool
) -> tuple[Any, Any, Any, dict[str, Any]]:
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
    work: Path,
    lvlm: TinyLVLM,
    album: Album,
    pools: Sequence[PicturePool],
    *,
    seed: int,
    steps: dict[str, int],
    source: Any = None,
) -> dict[str, Any]:
    """Make a base LVLM: text warm-up, a tower (after `source`), then ordinary chat over the frozen tower's states.

    Returns:
        Each stage's figures.
    """
    lvlm.tower.requires_grad_(False)
    encoder = Encoder(lvlm.processor.tokenizer, album, lvlm.slot)
    report: dict[str, Any] = {}
    report["induction"] = train_induction(lvlm, seed=seed, steps=steps["induction"], checkpoint=work / "induction.pt")
    if "widening" in steps:
        report["widening"] = train_widening(lvlm, seed=seed, steps=steps["widening"], checkpoint=work / "widening.pt")
    report["bare pairs"] = train_pairs(
        lvlm, encoder, seed=seed, steps=steps["bare pairs"], checkpoint=work / "bare-pairs.pt"
    )
    if source is not None:
        start_tower(lvlm.tower, source)
    lvlm.tower.requires_grad_(True)
    report["tower"] = train_tower(lvlm, pools, seed=seed, steps=steps["tower"], checkpoint=work / "tower.pt")
    lvlm.tower.requires_grad_(False)
    seen = [patch_states(lvlm, pool) for pool in pools]
    report["tower"]["probes"] = probe(seen[0].float().flatten(1), pools[0])
    states = torch.cat(seen)
    for number, (name, (shares, most, how)) in enumerate(CHATS.items()):
        if name in steps:
            report[name] = train_chat(
                lvlm,
                encoder,
                _chat(album, shares, seed + number, most, 84, 5 + number),
                states,
                seed=seed,
                steps=steps[name],
                checkpoint=work / f"{name.replace(' ', '-')}.pt",
                name=f"LVLM {name}",
                **how,
            )
    return report


def ship(model: Any, processor: Any, folder: Path, *, videos: str | None = None) -> None:
    """Save weights as fp16, half the size, under a configuration that has them loaded as fp32, as CPUs need.

    Args:
        videos: class of the video processor, of a family that has one: `AutoProcessor` wants it described.
    """
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    if videos is not None:
        path = folder / "processor_config.json"
        described = {"video_processor": {"video_processor_type": videos, "do_sample_frames": True}}
        path.write_text(json.dumps(json.loads(path.read_text()) | described, indent=2) + "\n")


def _tuned(
    variant: str, start: Path, out: Path, album: Album, lvlm: TinyLVLM, report: dict[str, Any], **how: Any
) -> None:
    """Tune what is in `start`, ship it to `out`, and report on it."""
    began = time.perf_counter()
    folder = start.parent / "ablation" / tuning_folder(variant, start, steps=how["steps"], seed=how["seed"])
    tuner = tune(start, album, VARIANTS[variant], folder, **how)
    ship(tuner.lvlm().model, lvlm.processor, out, videos=lvlm.videos)
    losses = [entry["loss"] for entry in tuner.state.log_history if "loss" in entry]
    report[f"tuning, {VARIANTS[variant].about}"] = {
        "loss": losses[-1] if losses else tuner.state.log_history[-1]["train_loss"],
        "seconds": time.perf_counter() - began,
    }


def _report(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a build's facts beside what it made."""
    stages = [figures for figures in facts.values() if isinstance(figures, dict) and "seconds" in figures]
    facts["training_seconds"] = round(sum(figures["seconds"] for figures in stages))
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def build(out: Path, work: Path, *, seed: int = SEED, steps: dict[str, int] | None = None) -> dict[str, Any]:
    """Train the encoder and both forms of the LVLM, saved under `out` as `clip/`, `lvlm-base/` and `lvlm/`.

    Both LVLMs have had the same number of steps: the base's last ones were ordinary chat, the other's ICL tuning. The
    seconds of tuning are those of the last run, where it was taken up again.

    Returns:
        The stages' figures, which `build.json` keeps.
    """
    steps = steps or STEPS
    pools = render_all(work, seed=seed, steps=steps)
    clip, clip_processor, tower, report = train_encoder(work, seed=seed, steps=steps, pool=pools[0])
    album = Album(pools)
    lvlm = BLUEPRINTS["idefics"](seed)
    report |= train_base(work, lvlm, album, pools, seed=seed, steps=steps, source=tower)
    ship(clip, clip_processor, out / "clip")
    ship(lvlm.model, lvlm.processor, work / "start")
    for name, variant in (("lvlm-base", "base"), ("lvlm", "tuned")):
        _tuned(variant, work / "start", out / name, album, lvlm, report, steps=steps["tuning"], seed=seed)
    return _report(out / "build.json", {"seed": seed, "steps": steps} | report)


def build_other(
    out: Path,
    work: Path,
    *,
    seed: int = 8,
    steps: dict[str, int] | None = None,
    pictures: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Train the LVLM of another architecture and seed, saved under `out` as `internvl/`; returns the stages' figures.

    Args:
        pictures: how many the album has; the encoder's and the first LVLM's, under the name of their seed.
    """
    steps = steps or OTHER_STEPS
    pools = render_all(work, seed=SEED, steps=pictures or STEPS)
    album = Album(pools)
    lvlm = BLUEPRINTS["internvl"](seed)
    folder = work / "internvl"
    report = train_base(folder, lvlm, album, pools, seed=seed, steps=steps)
    ship(lvlm.model, lvlm.processor, folder / "start", videos=lvlm.videos)
    _tuned("tuned", folder / "start", out / "internvl", album, lvlm, report, steps=steps["tuning"], seed=seed)
    return _report(out / "build-internvl.json", {"seed": seed, "steps": steps} | report)


def main(argv: list[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m drum_hf.playground.building.build")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "models")
    parser.add_argument("--work-dir", type=Path, default=Path("playground-build"))
    parser.add_argument("--which", choices=("main", "internvl"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="a few steps a stage: to test the script, not to use")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.which in (None, "main"):
        report = build(args.out, args.work_dir, steps=QUICK if args.quick else STEPS)
        logger.info("%s", json.dumps(report, indent=1))
    if args.which in (None, "internvl"):
        quick = dict.fromkeys(OTHER_STEPS, 3) if args.quick else None
        report = build_other(args.out, args.work_dir, steps=quick, pictures=QUICK if args.quick else None)
        logger.info("%s", json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
