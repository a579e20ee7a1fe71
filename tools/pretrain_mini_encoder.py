"""Pretrain the mini encoder on rendered training scenes and write assets/mini_encoder.safetensors.

The real model starts from EVA-CLIP; this is its counterpart for `model=mini`. Scenes are rendered on the fly from the
training split, so no held-out combination of shape and colour is seen. Each patch token must tell, through linear heads
that are thrown away, the object it lies on: shape, colour, size, texture, box, and which of its pixels belong to it.

    python tools/pretrain_mini_encoder.py --steps 3000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vistallm.config import PAD_COLOUR, load_config
from vistallm.mini.scene import ATTRIBUTES, Scene, random_scene
from vistallm.model.attention import training_attention
from vistallm.model.encoder import ImageEncoder
from vistallm.regions.letterbox import Letterbox, square_resize

COVER = 0.3  # a patch is labelled with the object that covers at least this share of it


class SceneStream(IterableDataset):
    """Endless (image, labels, boxes, pixels) of rendered scenes: `size` pixels a side, patches of `patch` pixels."""

    def __init__(self, size: int, patch: int, seed: int) -> None:
        super().__init__()
        self.size, self.patch, self.seed = size, patch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        info = get_worker_info()
        rng = np.random.default_rng([self.seed, 0 if info is None else info.id])
        while True:
            scene = random_scene(rng, "train")
            image, masks = scene.render()
            square, letterbox = square_resize(image, self.size, PAD_COLOUR)
            yield (torch.from_numpy(square.transpose(2, 0, 1).copy()), *self._targets(scene, masks, letterbox))

    def _targets(self, scene: Scene, masks: np.ndarray, letterbox: Letterbox) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (P, 4) int64 with -1 off the objects, boxes (P, 4) float32 in [0, 1], pixels (P, patch^2) float32."""
        grid, patch, side = self.size // self.patch, self.patch, np.arange(self.size) + 0.5
        spots = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2) * (letterbox.side / self.size) - letterbox.padding
        x, y = np.floor(spots).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < letterbox.width) & (y < letterbox.height)
        stack = masks[:, y.clip(0, letterbox.height - 1), x.clip(0, letterbox.width - 1)] & inside
        tiles = (
            stack.reshape(len(stack), grid, patch, grid, patch)
            .transpose(0, 1, 3, 2, 4)
            .reshape(len(stack), -1, patch**2)
        )
        cover = tiles.mean(-1)
        owner, on = cover.argmax(0), cover.max(0) >= COVER
        facts = [[names.index(getattr(o, key)) for key, names in ATTRIBUTES.items()] for o in scene.objects]
        corners = [letterbox.to_unit(np.array(o.box, float).reshape(2, 2)).ravel() for o in scene.objects]
        labels = np.where(on[:, None], np.array(facts)[owner], -1)
        boxes = np.array(corners, np.float32)[owner]
        pixels = tiles[owner, np.arange(tiles.shape[1])].astype(np.float32)
        return torch.from_numpy(labels), torch.from_numpy(boxes), torch.from_numpy(pixels)


class Heads(nn.Module):
    """Linear heads on patch tokens, and their loss."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [1, *(len(names) for names in ATTRIBUTES.values()), 4, patch**2]
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor, labels: Tensor, boxes: Tensor, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and the accuracies for tokens (N, P, D) and the targets of `SceneStream`."""
        on_object, *kinds, box, outline = self.out(self.norm(tokens)).float().split(self.sizes, -1)
        on = labels[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(on_object.squeeze(-1), on.float())
        loss = loss + F.binary_cross_entropy_with_logits(outline[on], pixels[on])
        distance = (box[on] - boxes[on]).abs().mean()
        loss = loss + 5 * distance
        scores = {
            "box_error": distance.item(),
            "pixels": ((outline[on] > 0) == (pixels[on] > 0.5)).float().mean().item(),
        }
        for number, name in enumerate(ATTRIBUTES):
            loss = loss + 0.5 * F.cross_entropy(kinds[number][on], labels[..., number][on])
            scores[name] = (kinds[number][on].argmax(-1) == labels[..., number][on]).float().mean().item()
        return loss, scores


def main() -> None:
    """Train for `--steps`, print the accuracies, write the vision tower in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("assets/mini_encoder.safetensors"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    config = load_config(["model=mini", "model.encoder.weights="]).model.encoder
    encoder = ImageEncoder(config)
    patch = config.image_size // int(encoder.patches**0.5)
    heads = Heads(encoder.width, patch)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    loader = DataLoader(SceneStream(config.image_size, patch, arguments.seed), arguments.batch, num_workers=1)
    start = time.monotonic()
    for step, (images, *targets) in zip(range(arguments.steps), loader, strict=False):
        rate = min((step + 1) / 200, 1.0) * (0.5 + 0.5 * np.cos(np.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        optimizer.zero_grad()
        with training_attention(), torch.autocast("cpu", torch.bfloat16):
            loss, scores = heads(encoder(images), *targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in scores.items())
            seconds = time.monotonic() - start
            pace = (step + 1) * arguments.batch / seconds
            print(f"step {step} seconds {seconds:.0f} images/s {pace:.0f} loss {loss:.3f} {told}", flush=True)
            save(encoder, arguments.out)
    save(encoder, arguments.out)


def save(encoder: ImageEncoder, path: Path) -> None:
    """Write the vision tower's weights in bfloat16, which halves the file and costs no accuracy that we could see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in encoder.visual.state_dict().items()}, path)


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
