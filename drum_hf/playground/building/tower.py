"""The LVLM's vision tower: what it is shown, and how it learns to name it before the decoder sees any of it.

Idefics3's tower has no class token. It starts from the blocks of the CLIP's tower and learns, through linear heads
that are thrown away, to tell everything that the playground asks about: of a scene from any of its patches, of a pair
of digits from the halves, of a group of objects from the quarters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...evaluation.benchmarks.benchmarks import side_by_side
from ..scenes import ATTRIBUTES, CELLS, DIGITS, FRAMES, digit_images, render_digit, render_group
from .lvlms import TinyLVLM
from .pretraining import PATCH, PIXELS, TRAINING_DIGITS, WIDTH, PicturePool, shifted, shrink, train_steps

__all__ = ["patch_states", "render_groups", "render_pairs", "start_tower", "train_tower"]

_GRID = PIXELS // PATCH
EMPTY = "nothing"


def random_digit(row: int, rng: np.random.Generator):
    """A handwritten digit in random colours."""
    colour, background = (str(rng.choice(ATTRIBUTES[name])) for name in ("colour", "background"))
    return render_digit(row, colour, background, str(rng.choice(sorted(FRAMES))), rng)


def random_group(rng: np.random.Generator) -> tuple[list[dict[str, str] | None], str]:
    """Objects in one to four of the cells, now and then several alike, and a background."""
    count = int(rng.integers(1, 5))
    places = rng.choice(len(CELLS), count, replace=False)
    things: list[dict[str, str] | None] = [None] * len(CELLS)
    palette = {name: rng.permutation(ATTRIBUTES[name])[: rng.integers(1, 4)] for name in ("shape", "colour")}
    for place in places:
        things[place] = {name: str(rng.choice(options)) for name, options in palette.items()}
    return things, str(rng.choice(ATTRIBUTES["background"]))


def render_pairs(seed: int | Sequence[int], count: int, digits_from: np.ndarray | None = None) -> PicturePool:
    """Two digits side by side: values "left" and "right"; of the training rows, unless others are given."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 11])
    labels = digit_images()[1]
    rows = np.arange(len(labels))[TRAINING_DIGITS] if digits_from is None else digits_from
    pixels, values = np.empty((count, 3, PIXELS, PIXELS), dtype=np.uint8), []
    for i in tqdm(range(count), desc="rendering pairs of digits", unit="picture", mininterval=2):
        left, right = (int(row) for row in rng.choice(rows, 2, replace=False))
        pixels[i] = shrink(side_by_side([random_digit(left, rng), random_digit(right, rng)]))
        values.append({"left": DIGITS[labels[left]], "right": DIGITS[labels[right]]})
    return PicturePool(torch.from_numpy(pixels), values, [""] * count)


def render_groups(seed: int | Sequence[int], count: int) -> PicturePool:
    """Groups of objects: values "0 shape", "0 colour", … of the filled cells, and the background."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 12])
    pixels, values = np.empty((count, 3, PIXELS, PIXELS), dtype=np.uint8), []
    for i in tqdm(range(count), desc="rendering groups of objects", unit="picture", mininterval=2):
        things, background = random_group(rng)
        pixels[i] = shrink(render_group(things, background, rng))
        shown = {
            f"{place} {name}": value for place, thing in enumerate(things) for name, value in (thing or {}).items()
        }
        values.append(shown | {"background": background})
    return PicturePool(torch.from_numpy(pixels), values, [""] * count)


def start_tower(tower: nn.Module, image_tower: nn.Module) -> None:
    """Copy a CLIP tower's patch embedding, positions (class token's left out) and blocks into an Idefics3 tower."""
    source = image_tower.state_dict()
    target = tower.state_dict()
    for name in target:
        if name == "embeddings.patch_embedding.bias":
            target[name].zero_()
        elif name == "embeddings.position_embedding.weight":
            target[name].copy_(source[name][1:])
        else:
            target[name].copy_(source[name])
    tower.load_state_dict(target)


def _means(states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean patch state of the whole, the left and right half, and the four quarters; each (B, width)."""
    grid = states.unflatten(1, (_GRID, _GRID))
    half = _GRID // 2
    found = {"whole": states.mean(1), "left": grid[:, :, :half].mean((1, 2)), "right": grid[:, :, half:].mean((1, 2))}
    for place, (top, left) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
        found[str(place)] = grid[:, top : top + half, left : left + half].mean((1, 2))
    return found


def _targets(pool: PicturePool) -> list[tuple[str, str, torch.Tensor]]:
    """(place, attribute, number of its value or -1 where it shows none) of everything a pool's pictures show."""
    options = {name: (*values, EMPTY) for name, values in ATTRIBUTES.items()} | {"digit": DIGITS}
    options |= {"frame": tuple(sorted(FRAMES))}
    found = []
    for key in sorted({key for values in pool.values for key in values} | ({"frame"} if any(pool.frames) else set())):
        place, _, name = key.partition(" ") if " " in key else ("whole", "", key)
        place, name = (key, "digit") if key in ("left", "right") else (place, name)
        number = {value: i for i, value in enumerate(options[name])}
        shown = pool.frames if key == "frame" else [values.get(key, "") for values in pool.values]
        missing = number[EMPTY] if place.isdigit() else -1
        found.append((place, name, torch.tensor([number.get(value, missing) for value in shown])))
    return found


def train_tower(
    lvlm: TinyLVLM, pools: Sequence[PicturePool], *, seed: int, steps: int, checkpoint: Path, batch: int = 64
) -> dict[str, float]:
    """Teach the tower to name what the pools' pictures show, `batch` of each in a step."""
    sizes = {name: len(values) + 1 for name, values in ATTRIBUTES.items()} | {"digit": 10, "frame": len(FRAMES)}
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})
    module = nn.ModuleDict({"tower": lvlm.tower, "heads": heads})
    targets = [_targets(pool) for pool in pools]

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 3, step])
        rows = [rng.choice(len(pool), batch, replace=False) for pool in pools]
        pixels = torch.cat([pool.normalised(own) for pool, own in zip(pools, rows, strict=True)])
        means = _means(lvlm.see(shifted(pixels, rng)))
        loss, right = torch.zeros(()), {}
        for number, (own, known) in enumerate(zip(rows, targets, strict=True)):
            for place, name, goals in known:
                goal = goals[own]
                shown = goal >= 0
                if not shown.any():
                    continue
                logits = heads[name](means[place][number * batch : (number + 1) * batch][shown])
                loss = loss + nn.functional.cross_entropy(logits, goal[shown]) / len(known)
                what = name if place == "whole" else f"{place} {name}"
                right[what] = (logits.argmax(1) == goal[shown]).float().mean().item()
        named = ("shape", "size", "digit", "left digit", "0 shape", "3 colour")
        return loss, {"loss": loss.item()} | {name: right[name] for name in named if name in right}

    return train_steps("LVLM vision tower", module, step_loss, steps, learning_rate=1e-3, checkpoint=checkpoint)


@torch.no_grad()
def patch_states(lvlm: TinyLVLM, pool: PicturePool, size: int = 500) -> torch.Tensor:
    """What the tower makes of a pool's pictures: (N, patches, width), half precision."""
    return torch.cat([lvlm.see(pool.normalised(slice(i, i + size))).half() for i in range(0, len(pool), size)])
