"""Answer one prompt on given images.

    python tools/predict.py --ckpt RUN --image a.jpg [b.jpg] --prompt "..." [--save overlay.png]

Regions in the prompt are written in pixels of the image: `{box:x0,y0,x1,y1}` or `{point:x,y}`, with `@k` for image k
(`{point:40,60@2}`). The answer is printed as text and as JSON, each region with its `confidence`; `presence` is how
probable any region was against "no target" (`vistallm.evaluate.confidence`). The overlay shows masks, boxes and points
of the answer, the images side by side.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from vistallm.data.datamodule import build_sequencer
from vistallm.evaluate.confidence import set_confidence
from vistallm.evaluate.generate import Answerer
from vistallm.evaluate.grammar import Rule
from vistallm.model.checkpoint import load_run
from vistallm.regions.codec import RegionParseError
from vistallm.regions.overlay import draw_regions
from vistallm.schema import ImageInfo, Parsed, Region, Sample
from vistallm.train.run import quiet

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_GIVEN = re.compile(r"\{(box|point):([-\d.,\s]+)(?:@(\d+))?\}")


def read_images(paths: list[str]) -> list[np.ndarray]:
    """Read images as (H, W, 3) uint8 RGB; raises ValueError for a missing or unreadable file."""
    if not paths:
        raise ValueError("--image: expected at least one image, got none")
    images = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--image {path}: no such file")
        image = cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError(f"--image {path}: not an image that OpenCV can read")
        images.append(image)
    return images


def make_sample(images: list[np.ndarray], prompt: str) -> Sample:
    """Turn a prompt and its images into a sample; regions of the prompt become region placeholders."""
    regions: list[Region] = []

    def write(match: re.Match[str]) -> str:
        words, image = match[2].split(","), int(match[3] or 1) - 1
        numbers = len(words) == (4 if match[1] == "box" else 2) and all(_NUMBER.fullmatch(w.strip()) for w in words)
        if not numbers or not 0 <= image < len(images):
            raise ValueError(f"--prompt {match[0]}: expected {{box:x0,y0,x1,y1}} or {{point:x,y}}, with @k for image k")
        values = tuple(float(word) for word in words)
        regions.append(Region.from_json({"image": image, "kind": match[1], "object": len(regions), match[1]: values}))
        return f"{{regions:{len(regions) - 1}}}"

    text = _GIVEN.sub(write, prompt)
    infos = [ImageInfo(f"{i}.png", image.shape[1], image.shape[0]) for i, image in enumerate(images)]
    return Sample("prompt", "vqa", "user", infos, instruction=text, regions=regions, pixels=images)


def overlay(images: list[np.ndarray], parsed: Parsed | None) -> np.ndarray:
    """Draw the answer's regions on images (H, W, 3) uint8 RGB, scaled to one height >= 240 pixels, side by side."""
    height = max(240, *(image.shape[0] for image in images))
    panels: list[np.ndarray] = []
    for index, image in enumerate(images):
        regions = [] if parsed is None else [r for r in parsed.regions if r.image == index]
        panels += [draw_regions(image, regions, height / image.shape[0]), np.full((height, 8, 3), 255, np.uint8)]
    return np.concatenate(panels[:-1], axis=1)


def main(argv: list[str]) -> None:
    """Print the answer and its regions, each with its confidence, as JSON; save the overlay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint file")
    parser.add_argument("--image", nargs="*", default=[], help="one or several images")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--save", type=Path, help="write the overlay here")
    arguments = parser.parse_args(argv)
    quiet()
    sample = make_sample(read_images(arguments.image), arguments.prompt)
    model, config, _ = load_run(arguments.ckpt)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    builder = build_sequencer(config, model.vocabulary)
    sequence = builder.build_prompt(sample)
    answer = Answerer(model, config).answer([sequence], [Rule(images=len(sample.images))])[0]
    print(answer.text)
    parsed = None
    try:
        parsed = builder.codec.decode(answer.text, sequence.letterboxes)
        set_confidence(parsed, answer.regions, answer.presence)
        print(json.dumps(parsed.to_json()))
    except RegionParseError as error:
        print(f"the regions of this answer can't be read: {error}", file=sys.stderr)
    if arguments.save:
        picture, name = overlay(sample.pixels or [], parsed)[:, :, ::-1], str(arguments.save)
        if not cv2.haveImageWriter(name) or not cv2.imwrite(name, picture):
            raise ValueError(f"--save {arguments.save}: could not write; use a .png or .jpg name in an existing folder")
        print(f"overlay: {arguments.save}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"predict.py: {error}")
