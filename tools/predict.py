"""Answer one prompt on given images.

    python tools/predict.py --ckpt RUN --image a.jpg [b.jpg] --prompt "..." [--out overlay.png]

Regions in the prompt are written in pixels of the stored image: `{box:x0,y0,x1,y1}` or `{point:x,y}`, with `@k` for
image k (`{point:40,60@2}`). The answer is printed as text and as JSON, each region with its `confidence`; `presence` is
the probability of any region against "no target" (`vistallm.evaluate.confidence`). The overlay shows the regions.
With `--link TASK` a model with links answers by them in the form of that task (res, rec, gres, det, interactive, ...);
the prompt's regions are region prompts then.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from vistallm.coinit.images import decode_pixels
from vistallm.regions.overlay import draw_regions
from vistallm.schema import ImageInfo, Region, Sample

_GIVEN = re.compile(r"\{(box|point):([^{}@]*)(?:@(\d+))?\}")


def make_sample(images: list[np.ndarray], prompt: str, task: str | None = None) -> Sample:
    """Turn a prompt and its images into a sample, of `task` if links answer; its regions become placeholders."""
    regions: list[Region] = []

    def placeholder(match: re.Match[str]) -> str:
        kind, image = match[1], int(match[3] or 1) - 1
        expected = (
            f"--prompt {match[0]}: expected {{box:x0,y0,x1,y1}} or {{point:x,y}} inside the image, @k for image k"
        )
        try:
            corners = np.array(match[2].split(","), float).reshape(2 if kind == "box" else 1, 2)
        except ValueError as error:
            raise ValueError(expected) from error
        size = images[image].shape[1::-1] if 0 <= image < len(images) else (0, 0)
        if not ((corners >= 0) & (corners <= size)).all() or (np.diff(corners, axis=0) <= 0).any():
            raise ValueError(f"{expected}; image {image + 1} has {size[0]}x{size[1]} pixels")
        values = corners.ravel().tolist()
        regions.append(Region.from_json({"image": image, "kind": kind, "object": len(regions), kind: values}))
        return f"{{region:{len(regions) - 1}:{kind}}}" if task else f"{{regions:{len(regions) - 1}}}"

    text = _GIVEN.sub(placeholder, prompt)
    infos = [ImageInfo(f"{i}.png", image.shape[1], image.shape[0]) for i, image in enumerate(images)]
    return Sample("prompt", task or "vqa", "user", infos, instruction=text, regions=regions, pixels=images)


def answer(ckpt: str, sample: Sample, by_link: bool) -> list[Region]:
    """Print a model's answer and its regions, each with its confidence; ValueError where unreadable."""
    import torch  # here: a wrong word on the command line is then refused at once

    from vistallm.data.datamodule import build_sequencer
    from vistallm.evaluate.confidence import set_confidence
    from vistallm.evaluate.generate import Answerer
    from vistallm.evaluate.grammar import Rule
    from vistallm.evaluate.links import read_link_answer
    from vistallm.metrics.detection import sure_regions
    from vistallm.model.checkpoint import load_run
    from vistallm.tasks import find_task
    from vistallm.train.run import quiet

    quiet()
    model, config, _ = load_run(ckpt)
    if by_link and (model.links is None or not find_task(sample.task).link):
        raise ValueError(f"--link {sample.task}: expected a model with links, and a task that they answer")
    builder = build_sequencer(config, model.vocabulary)
    sequence = builder.build(sample, answered=False, head="link" if by_link else "text")
    answerer = Answerer(model.to("cuda" if torch.cuda.is_available() else "cpu"), config)
    reply = answerer.answer([sequence], None if by_link else [Rule(images=len(sample.images))])[0]
    print(reply.text)
    if by_link:
        found, failure = read_link_answer(reply.text, reply.links, sequence.letterboxes, find_task(sample.task))
        if found is None:
            raise ValueError(f"the answer can't be read: {failure}")
        parsed = replace(found, regions=sure_regions(found.regions))
    else:
        parsed = builder.codec.decode(reply.text, sequence.letterboxes)
        set_confidence(parsed, reply.regions, reply.presence)
    print(json.dumps(parsed.to_json()))
    return parsed.regions


def main(argv: list[str]) -> None:
    """Check the arguments, answer, draw the overlay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint file")
    parser.add_argument("--image", nargs="+", type=Path, required=True, help="one or several images")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", "--save", type=Path, help="write the overlay here; the folder is made")
    parser.add_argument("--link", metavar="TASK", help="answer by links, in the form of this task")
    arguments = parser.parse_args(argv)
    images, out = [decode_pixels(path.read_bytes(), f"--image {path}") for path in arguments.image], arguments.out
    sample = make_sample(images, arguments.prompt, arguments.link)
    if out:
        if not cv2.haveImageWriter(str(out)) or out.is_dir():
            raise ValueError(f"--out {out}: expected the name of a .png or .jpg file")
        out.parent.mkdir(parents=True, exist_ok=True)
    regions = answer(arguments.ckpt, sample, arguments.link is not None)
    if out:
        height = max(240, *(image.shape[0] for image in images))
        strip, panels = np.full((height, 8, 3), 255, np.uint8), list[np.ndarray]()
        for index, image in enumerate(images):
            here = [region for region in regions if region.image == index]
            panels += [draw_regions(image, here, height / image.shape[0]), strip]
        if not cv2.imwrite(str(out), np.concatenate(panels[:-1], axis=1)[:, :, ::-1]):
            raise ValueError(f"--out {out}: could not be written")
        print(f"overlay: {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"predict.py: {error}")
