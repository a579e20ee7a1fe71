"""Region prompts: an object's mask -> what a user would draw on it, and that drawing -> the embedding of `<region>`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, masks_to_boxes

from vistallm.links.decoder import Place, mlp
from vistallm.schema import PROMPT_SHAPES


def draw_prompt(mask: np.ndarray, shape: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a prompt on an object: (H, W) bool mask -> (H, W) bool, never empty.

    point: a dot on it; box: its box, filled; circle: a disc around one of its pixels; scribble: one to three strokes
    between its pixels; polygon: the filled outline around some of its pixels; mask: itself. Dot, disc and strokes are
    cut to the mask, as VisionLLM v2 cuts its brushes; box and polygon may show what is beside it. Sizes follow the
    object's, so that a prompt looks alike at any resolution.

    Raises:
        ValueError: an unknown shape, or a mask without pixels.
    """
    rows, columns = np.nonzero(mask)
    if shape not in PROMPT_SHAPES or not len(rows):
        raise ValueError(
            f"prompt: expected one of {', '.join(PROMPT_SHAPES)} and a mask, got {shape!r}, {len(rows)} px"
        )
    if shape == "mask":
        return mask.astype(bool)
    drawn = np.zeros(mask.shape, np.uint8)
    side = max(1.0, len(rows) ** 0.5)

    def picked(count: int) -> np.ndarray:
        """Return so many pixels of the mask, (count, 2) int32 x, y."""
        chosen = rng.integers(len(rows), size=count)
        return np.stack([columns[chosen], rows[chosen]], 1).astype(np.int32)

    match shape:
        case "box":
            drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
        case "polygon":
            cv2.fillPoly(drawn, [cv2.convexHull(picked(int(rng.integers(6, 21))))], 1)
        case "scribble":
            for _ in range(int(rng.integers(1, 4))):
                thickness = max(1, round(float(rng.uniform(0.06, 0.15)) * side))
                cv2.polylines(drawn, [picked(int(rng.integers(2, 5)))], False, 1, thickness)
        case _:
            least, most = (0.06, 0.06) if shape == "point" else (0.25, 0.5)
            cv2.circle(drawn, picked(1)[0].tolist(), round(float(rng.uniform(least, most)) * side), 1, cv2.FILLED)
    return drawn.astype(bool) & (mask.astype(bool) | (shape in ("box", "polygon")))


class RegionEncoder(nn.Module):
    """Prompt masks -> embeddings of the language model's width: patches under the mask, a small convolution, a place.

    Args:
        blocks: encoder blocks whose patch tokens are read.
        encoder_width: of a patch token.
        width: of the language model.
    """

    def __init__(self, blocks: int, encoder_width: int, width: int) -> None:
        super().__init__()
        d = min(encoder_width, 256)
        self.norms = nn.ModuleList([nn.LayerNorm(encoder_width) for _ in range(blocks)])
        self.patches, self.place = nn.Linear(blocks * encoder_width, d), Place(d)
        self.conv = nn.Sequential(nn.Conv2d(4, d // 4, 7, 4, 3), nn.ReLU(), nn.Conv2d(d // 4, d, 3, 2, 1), nn.ReLU())
        self.out = nn.Sequential(nn.LayerNorm(d), mlp(d, width))

    def forward(self, features: Sequence[Tensor], pixels: Tensor, prompts: Tensor, prompt_image: Tensor) -> Tensor:
        """Return (R, width) embeddings.

        Args:
            features: per encoder block (N, P, encoder_width) patch tokens of a square grid.
            pixels: (N, 3, S, S) normalised.
            prompts: (R, S', S') uint8 0 or 1, each with at least one pixel; R may be 0.
            prompt_image: (R,) int64, which of the N images each lies in.
        """
        dtype = self.patches.weight.dtype
        masks = F.adaptive_avg_pool2d(prompts.to(dtype).unsqueeze(1), pixels.shape[-1])
        patches = self.patches(torch.cat([norm(f.to(dtype)) for norm, f in zip(self.norms, features, strict=True)], -1))
        pooled = torch.bmm(_weights(masks, math.isqrt(patches.shape[1])), patches[prompt_image].to(dtype)).squeeze(1)
        seen = self.conv(torch.cat([pixels.to(dtype)[prompt_image], masks], 1))
        near = torch.bmm(_weights(masks, seen.shape[-1]), seen.flatten(2).transpose(1, 2).to(dtype)).squeeze(1)
        corners = masks_to_boxes(masks[:, 0] > 0) + pixels.new_tensor([0, 0, 1, 1])  # theirs are the outermost pixels
        where = box_convert(corners / pixels.shape[-1], "xyxy", "cxcywh")
        return self.out(pooled + near + seen.mean((2, 3)) + self.place(where))


def _weights(masks: Tensor, side: int) -> Tensor:
    """Share of the mask (R, 1, S, S) that lies in each cell of a grid: (R, 1, side * side), each summing to 1."""
    shares = F.adaptive_avg_pool2d(masks, side).flatten(2)
    return shares / shares.sum(2, keepdim=True).clamp(min=1e-9)
