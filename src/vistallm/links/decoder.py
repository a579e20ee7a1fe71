"""Slot states, patch tokens and pixels -> scores, boxes, masks and keypoints of each link.

A group is decoded as one set of tokens: Q object queries and the P phrases (links) that share them. A GRD or SEG link
has its slots as queries; a scene (DET, POSE) has the patches of its image, each with a box at its own place. Layers of
self-attention, cross-attention to the patch tokens of the group's image and MLP read them, and every answer is a dot
product: class = query . phrase, mask = query . pixel, heat of a keypoint = (query + phrase) . pixel. So a phrase picks
what is read out of a query, and masks and keypoints are computed for those queries alone that a loss or an answer asks
for. Before the layers each phrase is compared with each patch, and a loss says where its objects are: one matched query
an object teaches too little about names. This likeness is a part of a scene's scores, whose queries are patches; of a
link with queries of its own it steers their attention, and their masks and scores start from it.
A class is the product of its words, each compared with the patches by a linear map of the encoder's features, and the
layers only say whether there is an object. So a pair of words is found that training never names together; layers
learn such pairs as "not there". An expression (GRD) speaks of other objects, too: it is what its slots say.
Shape legend: L links, K slots, G groups, Q queries, P phrases of the largest group, N images, D decoder layers, d
width, E mask width, M side of a mask, W words of the longest phrase. Coordinates are shares of the letterbox square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, nms

from vistallm.config import LinkConfig
from vistallm.links import LINKS, SCENE_LINKS
from vistallm.schema import LinkBatch

OWN_LINKS = tuple(kind for kind in LINKS if kind not in SCENE_LINKS)  # each of these links is a group
_FREQUENCIES = 8  # octaves of the sine code of a coordinate
_SAME = 0.6  # candidates of one link whose boxes have this IoU are one object
_REACH = 0.25  # of a box's side: how far from its first guess a keypoint is looked for (standard deviation)


@dataclass
class Family:
    """What the decoder says about G groups that have the same number of queries; the last of D layers is the answer."""

    kind: Tensor  # (G,) int64, index in LINKS, CPU
    image: Tensor  # (G,) int64, row of `pixels`
    links: Tensor  # (G, P) int64, numbers of the links, -1 = no phrase, CPU
    asked: Tensor  # (G, P) bool: phrases that name a class; the others name keypoints or are padding
    patches: Tensor  # (G, P, C) logits: whether a patch shows an object of the phrase
    coarse: Tensor | None  # (G, M, M), of links with queries of their own: what their masks start from
    boxes: Tensor  # (D, G, Q, 4) float32, centre x, y, width, height
    scores: Tensor  # (D, G, Q, P) float32 logits
    embeddings: Tensor  # (D, G, Q, E + 1): mask embeddings and a bias
    pose: Tensor  # (D, G, Q, d), what the first guess of a keypoint and its visibility are read from
    readouts: Tensor  # (D, G, P, 3, d): x, y and visibility of a phrase's keypoint
    looks: Tensor  # (D, G, Q, E): what a query's keypoints have in common
    names: Tensor  # (D, G, P, E): what a phrase's keypoint looks like
    pixels: Tensor  # (N, E, M, M), of the images that have links

    def masks(self, group: Tensor, query: Tensor) -> Tensor:
        """Mask logits (D', n, m, M, M) of m queries (D', n, m) int64 in each group of (n,), in the last D' layers."""
        chosen = self._take(self.embeddings, group, query).transpose(0, 1)
        vectors, bias = chosen.flatten(1, 2).tensor_split([-1], 2)
        logits = vectors @ self.pixels[self.image[group]].flatten(2).to(vectors.dtype) + bias
        if self.coarse is not None:
            logits = logits + self.coarse[group].flatten(1)[:, None]
        return logits.unflatten(2, self.pixels.shape[2:]).unflatten(1, chosen.shape[1:3]).transpose(0, 1)

    def keypoints(self, group: Tensor, query: Tensor) -> Tensor:
        """Keypoints (D', n, m, P, 3) float32 of queries as in `masks`: x, y and a visibility logit.

        A first guess is a share of the sides of the query's box. The keypoint is the mean place of a heat map, which
        is the pixels' likeness to query and phrase, within about a quarter of the box around that guess.
        """
        readouts = self.readouts[-len(query) :, group].float()
        values = torch.einsum("lnmd,lnpcd->lnmpc", self._take(self.pose, group, query).float(), readouts)
        centre, size = self._take(self.boxes, group, query).unsqueeze(-2).split(2, -1)
        guess = centre + size * values[..., :2]
        wanted = self._take(self.looks, group, query).unsqueeze(3) + self.names[-len(query) :, group].unsqueeze(2)
        pixels = self.pixels[self.image[group]].to(wanted.dtype)
        heat = torch.einsum("lnmpe,neyx->lnmpyx", wanted, pixels).float()
        cells = (torch.arange(heat.shape[-1], device=heat.device) + 0.5) / heat.shape[-1]
        spread = (_REACH * size).detach().clamp(min=1 / heat.shape[-1])
        near = -0.5 * ((cells - guess.unsqueeze(-1)) / spread.unsqueeze(-1)).square()  # (D', n, m, P, 2, M)
        heat = heat + near[..., 0, None, :] + near[..., 1, :, None]
        share = heat.flatten(-2).softmax(-1).view_as(heat)
        x, y = share.sum(-2) @ cells, share.sum(-1) @ cells
        return torch.cat([torch.stack([x, y], -1), values[..., 2:]], -1)

    def _take(self, values: Tensor, group: Tensor, query: Tensor) -> Tensor:
        """Rows (D', n, m, C) of `values` (D, G, Q, C)."""
        return values[-len(query) :, group].gather(2, query.unsqueeze(-1).expand(*query.shape, values.shape[-1]))


@dataclass
class LinkAnswer:
    """What one link answers: its candidates by falling score."""

    scores: Tensor  # (Q,) float32 in [0, 1]; of a keypoint's link those of the class
    boxes: Tensor  # (Q, 4) float32, x0, y0, x1, y1
    masks: Tensor  # (Q, M, M) float32 logits; positive is inside
    keypoints: Tensor | None = None  # (Q, 3) float32, x, y and visibility in [0, 1]: of a link that names a keypoint


def link_answers(families: Sequence[Family], count: int, least: float = 0.05, limit: int = 100) -> list[LinkAnswer]:
    """Answers of the `count` links of a batch, in their order: the best candidate and those that score `least` or more.

    The candidates of a POSE group are those of its class, in one order. A SEG link has one candidate.
    """
    answers: dict[int, LinkAnswer] = {}
    for family in families:
        for g, row in enumerate(family.links.tolist()):
            kind, group = LINKS[family.kind[g]], torch.tensor([g], device=family.boxes.device)
            numbers = [number for number in row if number >= 0]
            named = numbers[1:] if kind == "POSE" else []  # links that name keypoints of the first one's objects
            boxes = box_convert(family.boxes[-1, g], "cxcywh", "xyxy")
            for p, number in enumerate(numbers[: len(numbers) - len(named)]):
                scores = family.scores[-1, g, :, p].sigmoid()[: 1 if kind == "SEG" else None]
                if kind in SCENE_LINKS:
                    order, scores = one_per_object(boxes, scores)
                else:
                    scores, order = scores.sort(descending=True, stable=True)
                order = order[: max(1, min(limit, int((scores >= least).sum())))]
                answers[number] = LinkAnswer(
                    scores=scores[: len(order)],
                    boxes=boxes[order],
                    masks=family.masks(group, order[None, None])[0, 0].float(),
                )
            if named:
                x, y, visible = family.keypoints(group, order[None, None])[0, 0].unbind(-1)
                places = torch.stack([x, y, visible.sigmoid()], -1)
                for p, number in enumerate(named, 1):
                    answers[number] = replace(answers[numbers[0]], keypoints=places[:, p])
    return [answers[number] for number in range(count)]


def one_per_object(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Join candidates that show one object: queries (n,) int64 and their summed scores (n,), by falling score.

    Matching picks one of several near queries, and picks another one the next time, so each learns its share of the
    certainty. The best of them stays, with the sum.

    Args:
        boxes: (Q, 4) float32, x0, y0, x1, y1.
        scores: (Q,) float32 in [0, 1].
    """
    kept = nms(boxes, scores, _SAME)
    owner = (box_iou(boxes[kept], boxes) > _SAME).int().argmax(0)  # the best one that a candidate overlaps
    summed = torch.zeros_like(scores[kept]).index_add(0, owner, scores).clamp(max=1)
    order = summed.argsort(descending=True, stable=True)
    return kept[order], summed[order]


class Attention(nn.Module):
    """Attention of `heads` heads that takes a batch without rows, which nn.MultiheadAttention refuses."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.query, self.key = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """States x (G, T, d) read keys and values (G, S, d) where `mask` (G, 1, 1, S) is true, or with it as a bias."""
        parts = (self.query(x), self.key(keys), self.value(values))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention among queries and phrases, cross-attention to patches, MLP; pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.within, self.across = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, place: Tensor, mask: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """States x and `place` (G, T, d), `mask` (G, 1, 1, T) of the real ones, patches (G, S, d) and their bias."""
        y = self.norms[0](x)
        x = x + self.within(y + place, y + place, y, mask)
        x = x + self.across(self.norms[1](x) + place, memory, memory, bias)
        return x + self.mlp(self.norms[2](x))


def mlp(width: int, out: int) -> nn.Sequential:
    """Two layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(layer, nn.ReLU())


class Place(nn.Linear):
    """Embeds boxes (..., 4) in [0, 1], float32 -> (..., width): sines and cosines in octaves from half a wave."""

    def __init__(self, width: int) -> None:
        super().__init__(4 * 2 * _FREQUENCIES, width)

    def forward(self, boxes: Tensor) -> Tensor:
        """Return the embeddings in the weights' dtype."""
        angle = boxes.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(_FREQUENCIES, device=boxes.device)
        return super().forward(torch.cat([angle.sin(), angle.cos()], -1).flatten(-2).to(self.weight.dtype))


def grid_boxes(grid: int, device: torch.device) -> Tensor:
    """Boxes (grid * grid, 4), centre x, y, width, height, of the patches row by row."""
    centre = (torch.arange(grid, device=device) + 0.5) / grid
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 1 / grid), torch.full_like(x, 1 / grid)], -1).flatten(0, 1)


class PixelMap(nn.Module):
    """Patch tokens and a light convolutional stem on the pixels -> one vector per pixel at half the image's side."""

    def __init__(self, inputs: int, grid: int, channels: int, stem: bool) -> None:
        super().__init__()
        fine, coarse, self.grid = channels // 2, 3 * channels // 2, grid
        self.patches = nn.Linear(inputs, coarse)
        self.stem = nn.ModuleList([_conv(3, fine, 2), _conv(fine, coarse, 2)] if stem else [])
        self.fuse = nn.Sequential(_conv(coarse, coarse), nn.Conv2d(coarse, fine, 1))
        self.out = nn.Sequential(_conv(fine, fine), nn.Conv2d(fine, channels, 1))
        self.to(memory_format=torch.channels_last)  # a third quicker on CPUs

    def forward(self, patches: Tensor, pixels: Tensor) -> Tensor:
        """Patches (N, P, C) and normalised pixels (N, 3, S, S) -> (N, E, S / 2, S / 2)."""
        side = pixels.shape[-1]
        quarter = _resized(self.patches(patches).transpose(1, 2).unflatten(2, (self.grid, self.grid)), side // 4)
        if not self.stem:
            return self.out(_resized(self.fuse(quarter), side // 2))
        half = self.stem[0](pixels.contiguous(memory_format=torch.channels_last))
        return self.out(_resized(self.fuse(quarter + self.stem[1](half)), side // 2) + half)


def _resized(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x.contiguous(memory_format=torch.channels_last), size=(side, side), mode="bilinear")


class LinkDecoder(nn.Module):
    """The decoder of all kinds of links.

    Args:
        config: sizes.
        blocks: encoder blocks whose patch tokens are read.
        encoder_width: of a patch token.
        grid: patches per side.
        width: of a slot's hidden state in the language model.
    """

    def __init__(self, config: LinkConfig, blocks: int, encoder_width: int, grid: int, width: int) -> None:
        super().__init__()
        d, channels, self.grid = config.width, config.width // 4, grid
        if d % (4 * config.heads):
            raise ValueError(
                f"links.width={d} links.heads={config.heads}: expected a width that 4 * heads divides; change one"
            )
        self.slots = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d))
        self.words = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d))
        self.phrase = mlp(d, d)
        self.own_queries = nn.Parameter(torch.randn(len(OWN_LINKS), config.queries, d))
        self.scene_queries = nn.Parameter(torch.randn(len(SCENE_LINKS), 1, d))  # what the patches of a scene share
        self.block_norms = nn.ModuleList([nn.LayerNorm(encoder_width) for _ in range(blocks)])
        self.memory, self.place = nn.Linear(blocks * encoder_width, d), Place(d)
        self.layers = nn.ModuleList([DecoderLayer(d, config.heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(d)
        self.first_box, self.box = mlp(d, 4), mlp(d, 4)
        self.search, self.seen = nn.Linear(d, d), nn.Linear(d, d, bias=False)  # a bias would add the same to all cells
        self.shown, self.named, self.patch_bias = mlp(d, d), mlp(d, d), nn.Parameter(torch.tensor([-2.0]))
        self.class_query, self.class_phrase = nn.Linear(d, d), nn.Linear(d, d)
        self.class_bias = nn.Parameter(torch.tensor([-3.0]))  # few queries hold an object
        self.shown_word, self.word = nn.Linear(blocks * encoder_width, d), mlp(d, d)
        self.shown_any, self.class_any = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.strongest = nn.Parameter(torch.tensor([0.5]))  # weight of the patch that shows a phrase best in its score
        self.coarse = nn.Parameter(torch.ones(1))  # weight of the patches in a mask
        self.mask, self.pose, self.readout = mlp(d, channels + 1), mlp(d, d), nn.Linear(d, 3 * d)
        self.look, self.name = nn.Linear(d, channels), nn.Linear(d, channels)
        self.pixels = PixelMap(blocks * encoder_width, grid, channels, config.stem)

    def forward(self, states: Tensor, links: LinkBatch, features: Sequence[Tensor], pixels: Tensor) -> list[Family]:
        """Decode the links of a batch.

        Args:
            states: (L, K + W, width), last hidden states of the slots, then the embeddings of the phrase's tokens; a
                row of zeros stands for none.
            links: of the same L links; targets are not read.
            features: per encoder block (N, grid * grid, encoder_width) patch tokens of all images of the batch.
            pixels: (N, 3, S, S) normalised; S divides by 4, and M is S / 2.

        Returns:
            The family of the links with queries of their own (GRD, SEG), and that of the scene links (DET, POSE).
            Either may have no group: the parts are run all the same, so that each weight has a gradient in each step.
        """
        if pixels.shape[-1] % 4:
            raise ValueError(f"pixels: expected a side that 4 divides, got {pixels.shape[-1]}; set links.image_size")
        dtype, device = self.memory.weight.dtype, states.device
        table = torch.stack([links.kind, links.image, links.group]).cpu()  # the shapes below depend on it
        used, table[1] = table[1].unique(return_inverse=True)  # images without a link cost nothing
        used = used.to(device)
        blocks = [norm(f[used].to(dtype)) for norm, f in zip(self.block_norms, features, strict=True)]
        patches = torch.cat(blocks, -1)
        memory = self.memory(patches) + self.place(grid_boxes(self.grid, device))
        shown, shown_word = self.shown(memory), self.shown_word(patches)
        pixel_map = self.pixels(patches, pixels[used].to(dtype))
        slots, words, spoken = self._phrases(states.to(dtype), links)
        families = []
        for names, queries in ((OWN_LINKS, self.own_queries), (SCENE_LINKS, self.scene_queries)):
            links_GP, kind, image = _layout(table, [LINKS.index(name) for name in names])
            number = torch.tensor([names.index(LINKS[k]) for k in kind], dtype=torch.long)
            learned, image = queries[number.to(device)], image.to(device)
            start = torch.zeros(1, 4, device=device)  # logits of the boxes from which the queries set out
            if names is SCENE_LINKS:
                learned, start = learned + memory[image], torch.logit(grid_boxes(self.grid, device))
            index, present = links_GP.clamp(min=0).to(device), (links_GP >= 0).to(device)
            named = spoken[index].any(2, keepdim=True)
            shows = _alike(shown[image], torch.where(named, self.shown_any, self.named(slots[index].mean(2))))
            says = _said(shown_word[image], words[index], spoken[index])
            likeness = _joint(shows + self.patch_bias, says).transpose(1, 2)  # (G, P, C)
            bias = likeness[:, None].to(dtype) if names is OWN_LINKS else None  # such a group has one phrase
            hidden, boxes = self._decode(learned, start, slots[index], present, memory[image], bias)
            asked = links_GP >= 0
            asked[kind == LINKS.index("POSE"), 1:] = False
            y, phrases = hidden.tensor_split([boxes.shape[2]], 2)
            scores = _alike(self.class_query(y), torch.where(named, self.class_any, self.class_phrase(phrases)))
            if names is SCENE_LINKS:
                scores, coarse = _joint(scores + shows + self.class_bias, says), None
            else:
                scores = scores + self.class_bias + self.strongest * likeness.amax(2)[:, None]
                grid = self.coarse * likeness.unflatten(2, (self.grid, self.grid))
                coarse = _resized(grid, pixel_map.shape[-1])[:, 0].to(dtype)
            answers = (scores, *self._answers(y, phrases), pixel_map)
            families.append(Family(kind, image, links_GP, asked.to(device), likeness, coarse, boxes, *answers))
        return families

    def _phrases(self, states: Tensor, links: LinkBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Slots (L, K, d), words (L, W, d), and which of these are there (L, W) bool: of named classes alone."""
        count = self.own_queries.shape[1]
        states, tokens = states[:, :count], states[:, count:]
        spoken = tokens.ne(0).any(2)
        mean = tokens.sum(1, keepdim=True) / spoken.sum(1).clamp(min=1)[:, None, None]
        spoken = spoken & (links.kind != LINKS.index("GRD")).to(spoken.device)[:, None]
        return self.slots(states) + self.words(mean), self.word(self.words(tokens)), spoken

    def _decode(
        self, learned: Tensor, start: Tensor, slots: Tensor, present: Tensor, memory: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers: learned queries (G, Q, d) and slots (G, P, K, d) -> (D, G, Q + P, d), boxes (D, G, Q, 4)."""
        count, phrases = learned.shape[1], slots.shape[1]
        weight = (present / present.sum(1, keepdim=True).clamp(min=1)).to(slots.dtype)
        mean = torch.einsum("gpkd,gp->gkd", slots, weight)
        queries = learned + mean[:, torch.arange(count, device=mean.device) % mean.shape[1]]
        x = torch.cat([queries, self.phrase(slots.mean(2))], 1)
        mask = F.pad(present, (count, 0), value=True)[:, None, None]
        logits = start + self.first_box(queries).float()
        states, boxes = [], []
        for layer in self.layers:
            place = F.pad(self.place(logits.sigmoid()), (0, 0, 0, phrases))
            x = layer(x, place, mask, memory, bias)
            y = self.norm(x)
            refined = self._located(y[:, :count], memory) + self.box(y[:, :count]).float()
            states.append(y)
            boxes.append(refined.sigmoid())
            logits = refined.detach()
        return torch.stack(states), torch.stack(boxes)

    def _located(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Logits (G, Q, 4) of a box around the patches that a query looks at: their mean place and its spread."""
        cells = grid_boxes(self.grid, memory.device)[:, :2]
        scores = self.search(queries) @ self.seen(memory).transpose(1, 2)
        share = (scores.float() / queries.shape[-1] ** 0.5).softmax(-1)
        mean = share @ cells
        spread = (share @ cells.square() - mean.square()).clamp(min=1e-5).sqrt()
        # The side of a uniform square is 12 ** .5 = 3.5 times the spread of its pixels.
        return torch.logit(torch.cat([mean, 3.5 * spread], -1).clamp(0.01, 0.99))

    def _answers(self, queries: Tensor, phrases: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries (D, G, Q, d) and phrases (D, G, P, d) -> the tensors of a Family from `embeddings` on."""
        return (
            self.mask(queries),
            self.pose(queries),
            self.readout(phrases).unflatten(-1, (3, -1)) / queries.shape[-1] ** 0.5,
            self.look(queries),
            self.name(phrases),
        )


def _alike(seen: Tensor, phrases: Tensor) -> Tensor:
    """Scaled products (..., S, P) float32 of what is seen (..., S, d) and phrases (..., P, d)."""
    return (seen @ phrases.transpose(-1, -2)).float() / seen.shape[-1] ** 0.5


def _said(seen: Tensor, words: Tensor, spoken: Tensor) -> Tensor:
    """Log-probability (G, C, P) float32 that a patch (G, C, d) shows all words (G, P, W, d) of a phrase."""
    logits = torch.einsum("gcd,gpwd->gcpw", seen, words).float() / seen.shape[-1] ** 0.5
    return (F.logsigmoid(logits) * spoken[:, None]).sum(3)


def _joint(logits: Tensor, others: Tensor) -> Tensor:
    """Logit of the product of probabilities: one given as logits, the others as the sum of their logarithms."""
    share = (F.logsigmoid(logits) + others).clamp(max=-1e-6)
    return share - torch.log(-torch.expm1(share))


def _layout(table: Tensor, kinds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Links of these kinds by group: their numbers (G, P) with -1 as padding, and kind and image (G,) of each group.

    `table` (3, L) int64 on the CPU: kind, image and group of every link.
    """
    number = torch.isin(table[0], torch.tensor(kinds)).nonzero()[:, 0]
    number = number[table[2, number].argsort(stable=True)]
    _, group, counts = table[2, number].unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    links = torch.full((len(counts), max(counts.tolist(), default=1)), -1)
    links[group, torch.arange(len(number)) - first[group]] = number
    return links, table[0, number[first]], table[1, number[first]]
