"""Made batches of links."""

from __future__ import annotations

import pytest


@pytest.fixture
def make_links():
    """Callable: [(kind, image, number of objects, number of keypoint names)] -> LinkBatch with random targets."""
    import torch

    from vistallm.links import LINKS
    from vistallm.schema import LinkBatch

    def make(items, side=16, seed=0):
        draw = torch.Generator().manual_seed(seed)
        kind, image, group, object_link, points = [], [], [], [], []
        groups = {}
        for name, where, objects, names in items:
            first, scene = len(kind), name in ("DET", "POSE")
            key = (name, where) if scene else len(kind)
            for _ in range(1 + names):
                kind.append(LINKS.index(name))
                image.append(where)
                group.append(groups.setdefault(key, len(groups)))
            for _ in range(objects):
                points += [(len(object_link), first + n) for n in range(1, names + 1)]
                object_link.append(first)
        count = len(object_link)
        boxes = torch.cat(
            [torch.rand(count, 2, generator=draw) * 0.5 + 0.25] + [0.1 + 0.3 * torch.rand(count, 2, generator=draw)], 1
        )
        masks = 255 * torch.randint(0, 2, (count, side, side), generator=draw, dtype=torch.uint8)
        owner, name = torch.tensor(points, dtype=torch.long).reshape(-1, 2).unbind(1)
        keypoints = torch.cat(
            [torch.rand(len(owner), 2, generator=draw), torch.randint(0, 3, (len(owner), 1), generator=draw).float()], 1
        )
        long = (torch.tensor(values, dtype=torch.long) for values in (kind, image, image, group, object_link))
        return LinkBatch(*long, boxes, masks, torch.arange(count) % 3 > 0, owner, name, keypoints)

    return make


@pytest.fixture
def tiny_decoder():
    """A seeded decoder: 2 layers of width 32 over 2 encoder blocks of 4 x 4 patches; pixels are 32 a side."""
    import torch

    from vistallm.config import LinkConfig
    from vistallm.links.decoder import LinkDecoder

    torch.manual_seed(0)
    return LinkDecoder(LinkConfig(width=32, layers=2, heads=2, queries=4), 2, 24, 4, 20)


@pytest.fixture
def inputs():
    """Callable: (links, images) -> states, features and pixels for `tiny_decoder`."""
    import torch

    def make(count, images, seed=1):
        draw = torch.Generator().manual_seed(seed)
        features = [torch.randn(images, 16, 24, generator=draw) for _ in range(2)]
        return torch.randn(count, 5, 20, generator=draw), features, torch.randn(images, 3, 32, 32, generator=draw)

    return make
