r"""Pretrain the mini encoder or the mini tokenizer: the counterparts of EVA-CLIP and of InstructBLIP's QFormer.

    python tools/pretrain_mini.py encoder --steps 2400 --batch 64 --lr 1.5e-3
    python tools/build_coinit.py mini --train 80000 --seed 1 --out data/mini-pretrain
    python tools/pretrain_mini.py tokenizer --root data/mini-pretrain --steps 2000
    python tools/pretrain_mini.py tokenizer --root data/mini-pretrain --steps 1200 --lr 6e-4 --seed 1 \
        --init assets/mini_tokenizer.safetensors

Linear heads, thrown away afterwards, predict objects: from a patch token the object that the patch lies on; from groups
of query tokens the objects that the instruction is about (all objects where it names none), left to right. No language
model takes part, and training scenes hold no held-out pair of shape and colour. Weights are written in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from webdataset import DataPipeline

from vistallm.coinit.shards import read_raw, split_shards
from vistallm.config import PAD_COLOUR, load_config
from vistallm.data.images import decode_sample
from vistallm.data.sequence import Sequence, SequenceBuilder, build_codec, build_sequencer, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.mini.scene import ATTRIBUTES, COLOURS, HELD_OUT, random_scene
from vistallm.model.build import build_model
from vistallm.model.encoder import ImageEncoder
from vistallm.model.vistallm import training_attention
from vistallm.regions.letterbox import square_resize
from vistallm.regions.masks import rle_box, rle_to_mask
from vistallm.schema import Sample

KEPT = 3.0  # weight of the distance to the tokens of --init
COVER = 0.3  # a patch is labelled with the object that covers at least this share of it
SLOTS, GRID, VERTICES = 4, 12, 12  # objects, cells of a mask per side of its box, vertices: at most
ASKED = {"pope": "question", "vqa": "question", "vcr": "question", "nlvr2": "statement"}  # objects by their words
NAMED = ("rec", "res", "grec", "gres", "v7w", "attcoseg", "pointqa", "boxqa", "reg")  # objects by their regions
binary_loss = F.binary_cross_entropy_with_logits


class Heads(nn.Module):
    """Linear heads for presence, attributes, box and `extra` outputs of an object, and the loss of the first three."""

    def __init__(self, width: int, extra: list[int], weight: float) -> None:
        super().__init__()
        self.extra, self.weight = extra, weight
        self.sizes = [1, *(len(values) for values in ATTRIBUTES.values()), 4, sum(extra)]
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, dict[str, float], tuple]:
        """Tokens (N, P, D), labels (N, P, 4) with -1 for no object, boxes (N, P, 4) -> loss, scores, extra outputs.

        A colour of -1 on an object has no name.
        """
        there, *kinds, box, extra = self.out(tokens).float().split(self.sizes, -1)
        on, present = labels[..., 0] >= 0, there.squeeze(-1)
        distance = (box[on] - boxes[on]).abs().mean()
        loss = binary_loss(present, on.float()) + 5 * distance
        scores = {"presence": ((present > 0) == on).float().mean().item(), "box_error": distance.item()}
        for kind, label, name in zip(kinds, labels.unbind(-1), ATTRIBUTES, strict=True):
            known = label >= 0
            loss = loss + self.weight * F.cross_entropy(kind[known], label[known])
            scores[name] = (kind[known].argmax(-1) == label[known]).float().mean().item()
        return loss, scores, extra.split(self.extra, -1)


def optimise(
    loss_of: Callable[..., tuple[Tensor, dict[str, float]]],
    parameters: list[nn.Parameter],
    rows: Iterable[tuple],
    weights: dict[str, Tensor],
    options: argparse.Namespace,
    metadata: dict[str, str] | None = None,
) -> None:
    """Train `parameters` on --steps rows; print, and write the `weights`, after each hundredth step and the last."""
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start, steps = time.monotonic(), options.steps
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for step, row in zip(range(steps), rows, strict=False):
        rate = min((step + 1) / 200, 1.0) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = options.lr * rate
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, scores = loss_of(*row)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            values = " ".join(f"{key} {value:.3f}" for key, value in scores.items())
            print(f"step {step} seconds {time.monotonic() - start:.0f} loss {loss:.6f} {values}", flush=True)
            half = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in weights.items()}
            save_file(half, options.out, metadata)


def unnamed_colour(rng: np.random.Generator, shape: str) -> tuple[float, ...]:
    """An RGB colour from anywhere, but not nearest to the colour that training never shows on this shape."""
    names, colours = list(COLOURS), np.array(list(COLOURS.values()))
    while True:
        rgb = rng.uniform(10, 250, 3)
        if (shape, names[((colours - rgb) ** 2).sum(1).argmin()]) not in HELD_OUT:
            return tuple(rgb.tolist())


def scenes(size: int, patch: int, seed: int, unnamed: float) -> Iterator[tuple[Tensor, ...]]:
    """Yield rendered scenes of `size` pixels a side with the targets of their P patches of `patch` pixels.

    Image (3, size, size) uint8, labels (P, 4) int64 with -1 off the objects, boxes (P, 4) float32 in [0, 1], pixels
    (P, patch^2) float32: which of them belong to the object. A share `unnamed` of the scenes has colours without a
    name, and -1 as their label: they teach shapes apart from colours.
    """
    rng, grid, side = np.random.default_rng([seed, 0]), size // patch, np.arange(size) + 0.5
    while True:
        scene = random_scene(rng, "train")
        if nameless := rng.random() < unnamed:
            for each in scene.objects:
                each.rgb = unnamed_colour(rng, each.attributes["shape"])
        image, masks = scene.render()
        square, box = square_resize(image, size, PAD_COLOUR)
        x, y = np.floor(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2) * (box.side / size) - box.padding).T
        inside = (x >= 0) & (y >= 0) & (x < box.width) & (y < box.height)
        x, y = x.clip(0, box.width - 1).astype(int), y.clip(0, box.height - 1).astype(int)
        tiles = (masks[:, y, x] & inside).reshape(-1, grid, patch, grid, patch).swapaxes(2, 3)
        tiles = tiles.reshape(len(masks), -1, patch**2)
        cover = tiles.mean(-1)
        owner = cover.argmax(0)
        facts = np.array([[names.index(o.attributes[key]) for key, names in ATTRIBUTES.items()] for o in scene.objects])
        if nameless:
            facts[:, list(ATTRIBUTES).index("colour")] = -1
        corners = [box.to_unit(np.array(o.box, float).reshape(2, 2)).ravel() for o in scene.objects]
        labels = np.where((cover.max(0) >= COVER)[:, None], facts[owner], -1)
        pixels = tiles[owner, np.arange(grid**2)].astype(np.float32)
        arrays = square.transpose(2, 0, 1).copy(), labels, np.array(corners, np.float32)[owner], pixels
        yield tuple(map(torch.from_numpy, arrays))


def pretrain_encoder(options: argparse.Namespace) -> None:
    """Train the encoder with heads on its last patch tokens and on the blocks that links read; writes the vision tower.

    With --init the tokens of scenes in named colours stay near those of that file, so that what reads them still does.
    """
    config = load_config(["model=mini", f"model.encoder.weights={options.init}"])
    encoder = ImageEncoder(config.model.encoder, read=config.links.blocks)
    former = deepcopy(encoder).requires_grad_(False) if options.init else None
    size, count = config.model.encoder.image_size, 1 + len(encoder.read)
    patch = size // int(encoder.patches**0.5)
    norms = nn.ModuleList([nn.LayerNorm(encoder.width) for _ in range(count)])
    heads = nn.ModuleList([Heads(encoder.width * n, [patch**2], weight=0.5) for n in (1, count - 1)])

    def loss_of(images: Tensor, labels: Tensor, boxes: Tensor, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
        with training_attention():
            tokens, blocks = encoder.features(images)
        last, *read = (norm(states) for norm, states in zip(norms, [tokens, *blocks], strict=True))
        on, loss = labels[..., 0] >= 0, torch.zeros(())
        for head, states in zip(heads, (last, torch.cat(read, -1)), strict=True):
            part, scores, (outline,) = head(states, labels, boxes)
            scores["pixels"] = ((outline[on] > 0) == (pixels[on] > 0.5)).float().mean().item()
            loss = loss + part + binary_loss(outline[on], pixels[on])
        if former is not None:
            with torch.no_grad():
                wanted, others = former.features(images)
            named = (on == (labels[..., list(ATTRIBUTES).index("colour")] >= 0)).all(1).float()
            pairs = zip([tokens, *blocks], [wanted, *others], strict=True)
            far = [(a - b).float().square().mean((1, 2)) @ named / b.float().var() for a, b in pairs]
            moved = torch.stack(far).mean() / named.sum().clamp(min=1)
            loss, scores = loss + KEPT * moved, scores | {"moved": moved.item()}
        return loss, scores

    dataset = DataPipeline(partial(scenes, size, patch, options.seed, options.unnamed))
    parameters = [*encoder.parameters(), *norms.parameters(), *heads.parameters()]
    rows = DataLoader(dataset, options.batch, num_workers=1)
    optimise(loss_of, parameters, rows, encoder.visual.state_dict(), options)


def slot_batches(shards: list[Path], builder: SequenceBuilder, size: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yield (Batch, labels, boxes, masks, corners) over the training shards without end, shards in a random order."""
    rng, rows = random.Random(seed), list[Sequence]()
    while True:
        for raw in (raw for shard in rng.sample(shards, len(shards)) for raw in read_raw(shard)):
            rows.append(builder.build(decode_sample(raw), rng))
            if len(rows) == size:
                targets = [slots(s, image, builder) for s in rows for image in range(len(s.images))]
                yield collate(rows, builder.vocabulary), *map(torch.stack, zip(*targets, strict=True))
                rows = []


def slots(sequence: Sequence, image: int, builder: SequenceBuilder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets of one image: labels (SLOTS, 4) with -1 for no object, boxes (SLOTS, 4) in [0, 1], masks (SLOTS, GRID^2).

    The fourth is the corners (SLOTS, VERTICES, 2) in [0, 1] that the codec writes, parts in a row, -1 beyond the last.
    Masks and corners are known (not -1) only where the sample holds the object's RLE.
    """
    sample, letterboxes, codec = sequence.sample, sequence.letterboxes, builder.codec
    to_unit = letterboxes[image].to_unit
    labels, boxes = torch.full((SLOTS, len(ATTRIBUTES)), -1), torch.zeros(SLOTS, 4)
    masks, corners = torch.full((SLOTS, GRID**2), -1.0), torch.full((SLOTS, VERTICES, 2), -1.0)
    for slot, (*names, x0, y0, x1, y1) in enumerate(relevant_objects(sample, image)[:SLOTS]):
        labels[slot] = torch.tensor([values.index(n) for n, values in zip(names, ATTRIBUTES.values(), strict=True)])
        boxes[slot] = torch.from_numpy(to_unit(np.array([[x0, y0], [x1, y1]], float)).ravel())
        for region in sample.regions:
            if region.image == image and region.rle is not None and whole(rle_box(region.rle)) == (x0, y0, x1, y1):
                crop = rle_to_mask(region.rle)[y0:y1, x0:x1].astype(np.uint8) * 255
                cells = cv2.resize(crop, (GRID, GRID), interpolation=cv2.INTER_AREA) > 127
                masks[slot] = torch.from_numpy(cells.astype(np.float32).ravel())
                written = codec.decode(codec.encode([region], letterboxes, "mask"), letterboxes)
                vertices = to_unit(np.concatenate(written.regions[0].polygons or []))[:VERTICES]
                corners[slot, : len(vertices)] = torch.from_numpy(vertices).float()
    return labels, boxes, masks, corners


def whole(box: tuple[float, ...]) -> tuple[int, ...]:
    """A box in whole pixels, which names its object."""
    return tuple(round(v) for v in box)


def relevant_objects(sample: Sample, image: int) -> list[tuple]:
    """Return (shape, colour, size, texture, x0, y0, x1, y1) of the objects that the instruction is about."""
    objects = [tuple(o) for o in sample.meta["scenes"][image]]
    if sample.task in NAMED:
        wanted = sample.fields.get("targets", [0])
        regions = [r for r in sample.regions if r.object in wanted and r.image == image]
        boxes = {whole(rle_box(r.rle) if r.rle is not None else r.box) for r in regions if r.rle or r.box}
        boxes |= {nearest(*r.point, [o[4:] for o in objects]) for r in regions if r.kind == "point"}
        objects = [o for o in objects if o[4:] in boxes]
    elif sample.task in ASKED:
        words = set(re.findall(r"[a-z]+", str(sample.fields[ASKED[sample.task]]).split("?")[0].lower()))
        named = [{v for v in values if words & {v, v + "s", v + "es"}} for values in ATTRIBUTES.values()]
        objects = [o for o in objects if all(o[i] in values for i, values in enumerate(named) if values)]
    return sorted(objects, key=lambda o: o[4] + o[6])


def nearest(x: float, y: float, boxes: list[tuple]) -> tuple[int, ...]:
    """The box with the nearest centre among those that hold the point (among all where none does)."""
    holding = [b for b in boxes if b[0] <= x <= b[2] and b[1] <= y <= b[3]] or boxes
    return min(holding, key=lambda b: abs(x - (b[0] + b[2]) / 2) + abs(y - (b[1] + b[3]) / 2))


def bin_loss(logits: Tensor, values: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., bins) against values (...) in [0, 1], spread over neighbouring bins."""
    bins = torch.linspace(0, 1, logits.shape[-1])
    near = torch.softmax(-0.5 * ((values[..., None] - bins) * (len(bins) - 1)) ** 2, -1)
    return -(near * logits.log_softmax(-1)).sum(-1).mean()


def pretrain_tokenizer(options: argparse.Namespace) -> None:
    """Train the QFormer with its heads on groups of queries; writes it without its projection."""
    config = load_config(["model=mini", f"model.tokenizer.weights={options.init}"])
    vocabulary, bins = Vocabulary.build(config.model, build_codec(config)), config.num_bins
    model = build_model(config, vocabulary)
    model.encoder.requires_grad_(False)
    heads = Heads(config.model.tokenizer.hidden_size, [GRID**2, 4 * bins, 2 * VERTICES * bins, VERTICES], weight=0.3)

    def loss_of(
        batch: Any, labels: Tensor, boxes: Tensor, masks: Tensor, corners: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            patch_tokens = model.encoder(batch.images)
        with training_attention():
            words = (rows[batch.image_owner] for rows in (batch.instruction_ids, batch.instruction_mask))
            queries = model.tokenizer.query_states(patch_tokens, *words)
        loss, scores, (cells, sides, walk, more) = heads(queries.unflatten(1, (SLOTS, -1)).mean(2), labels, boxes)
        on, drawn = labels[..., 0] >= 0, masks[..., 0] >= 0
        # Coordinates as a language model writes them: one class per bin, the neighbours count too.
        walk, exists = walk[drawn].unflatten(-1, (VERTICES, 2, -1)), corners[drawn][..., 0] >= 0
        loss = loss + binary_loss(cells[drawn], masks[drawn])
        loss = loss + 0.3 * bin_loss(sides[on].unflatten(-1, (4, -1)), boxes[on])
        loss = loss + 0.5 * bin_loss(walk[exists], corners[drawn][exists])
        scores["cells"] = ((cells[drawn] > 0) == (masks[drawn] > 0.5)).float().mean().item()
        scores["corner_error"] = (walk.argmax(-1) / (bins - 1) - corners[drawn])[exists].abs().mean().item()
        return loss + binary_loss(more[drawn], exists.float()), scores

    weights = {k: p for k, p in model.tokenizer.named_parameters() if not k.startswith("projection.")}
    names = json.dumps([vocabulary.qformer.convert_ids_to_tokens(i) for i in range(len(vocabulary.qformer))])
    builder, shards = build_sequencer(config, vocabulary), split_shards(options.root, "train")
    dataset = DataPipeline(partial(slot_batches, shards, builder, options.batch, options.seed))
    rows = DataLoader(dataset, None, num_workers=1)
    optimise(loss_of, [*weights.values(), *heads.parameters()], rows, weights, options, {"tokens": names})


if __name__ == "__main__":
    cv2.setNumThreads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="encoder|tokenizer")
    for pretrain in (pretrain_encoder, pretrain_tokenizer):
        name = pretrain.__name__.removeprefix("pretrain_")
        part = parts.add_parser(name, description=pretrain.__doc__)
        part.set_defaults(pretrain=pretrain)
        part.add_argument("--steps", type=int, default=2500)
        part.add_argument("--batch", type=int, default=48)
        part.add_argument("--lr", type=float, default=1e-3)
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--out", type=Path, default=Path(f"assets/mini_{name}.safetensors"))
        part.add_argument("--init", default="", help="go on from this file (the heads start anew)")
    parts.choices["encoder"].add_argument(
        "--unnamed", type=float, default=0.0, help="share of scenes whose colours have no name (default 0)"
    )
    part.add_argument("--root", type=Path, required=True, help="a mini set; its training split is used")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.pretrain(options)
