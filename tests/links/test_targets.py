"""What a link has to find, against masks that are counted by hand."""

from __future__ import annotations

import numpy as np

from vistallm.links.targets import link_target
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region


def _rectangle(x0, y0, x1, y1):
    mask = np.zeros((32, 64), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_the_objects_of_a_segment_link_are_one_target_and_those_of_a_phrase_are_not():
    masks = [_rectangle(4, 8, 12, 16), _rectangle(40, 0, 60, 24)]
    regions = [Region(0, "mask", number, rle=mask_to_rle(mask)) for number, mask in enumerate(masks)]
    letterbox = Letterbox(64, 32, 64)
    several, one = (link_target(kind, 0, regions, letterbox, 64) for kind in ("GRD", "SEG"))
    assert len(several.boxes) == 2
    assert (several.masks[:, 16:48] == 255 * np.stack(masks)).all()  # the square adds 16 rows above and below
    assert (one.masks[0, 16:48] == 255 * (masks[0] | masks[1])).all()
    np.testing.assert_allclose(one.boxes, [[32 / 64, (16 + 12) / 64, 56 / 64, 24 / 64]])
    assert one.has_mask.tolist() == [True]
    regions[0] = Region(0, "mask", 0, box=(4.0, 8.0, 12.0, 16.0))
    assert link_target("SEG", 0, regions, letterbox, 64).has_mask.tolist() == [False]  # a part of its pixels is unknown
