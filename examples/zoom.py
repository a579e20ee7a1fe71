"""What crop and zoom is worth on small objects: mIoU of `segment` and of `crop` on objects under 2% of the picture.

    python examples/zoom.py [--ckpt assets/mini] [--samples 60] [--head text|link]

Test scenes of the mini world lie somewhere on a plain canvas of three times their sides; larger objects are left out.
"""

import argparse

import cv2
import numpy as np

from vistallm import VistaLLM
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.modules import run_calls
from vistallm.regions.masks import rle_to_mask


def small_object(serial: int) -> tuple[np.ndarray, np.ndarray, str]:
    """A picture (H, W, 3) uint8 RGB, the object's mask (H, W) bool, and an expression that means it alone."""
    sample, files = make_sample(MiniRecipe(), "test", "res", serial)
    image = cv2.imdecode(np.frombuffer(files[0][0], np.uint8), cv2.IMREAD_COLOR_RGB)
    own, rng = rle_to_mask(sample.regions[0].rle), np.random.default_rng(serial)
    height, width = own.shape
    canvas, mask = np.full((3 * height, 3 * width, 3), image[0, 0]), np.zeros((3 * height, 3 * width), bool)
    y, x = (int(rng.integers(2 * side)) for side in (height, width))
    canvas[y : y + height, x : x + width], mask[y : y + height, x : x + width] = image, own
    return canvas, mask, sample.fields["expr"]


def main() -> None:
    """Print the mean IoU of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="assets/mini")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--head", choices=("text", "link"), default="text")
    args = parser.parse_args()
    model, ious = VistaLLM.from_pretrained(args.ckpt), []
    for image, mask, words in map(small_object, range(args.samples)):
        if mask.mean() < 0.02:
            texts = (f"<module>{m}</module><instruction>{words}</instruction>" for m in ("segment", "crop"))
            found = [answer.regions for _, answer in run_calls("".join(texts), model, [image], args.head)]
            drawn = [np.any([region.mask() for region in regions] or [0 * mask], axis=0) for regions in found]
            ious.append([(one & mask).sum() / (one | mask).sum() for one in drawn])
    whole, zoomed = np.mean(ious, axis=0)
    means = f"{100 * whole:.1f} on the whole picture, {100 * zoomed:.1f} by crop and zoom"
    print(f"{len(ious)} objects under 2%: mIoU {means}")


if __name__ == "__main__":
    main()
