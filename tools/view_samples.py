"""Show samples of a shard folder: images with their regions, instruction and answer, on one page.

python tools/view_samples.py DIR [--split test] [--task res] [--n 24] [--template 0] --out page.html|sheet.png
"""

from __future__ import annotations

import argparse
import base64
import html
import random
import re
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vistallm.coinit.shards import read_index, read_shard
from vistallm.coinit.tasks import find_task, render
from vistallm.regions.masks import rle_to_mask
from vistallm.schema import Sample

TILE, GAP, LINE = 340, 8, 17  # width of a tile, space around it, height of a text line, in pixels
COLOURS = ((255, 0, 200), (0, 120, 255), (0, 170, 60), (255, 140, 0), (120, 60, 220), (0, 180, 190))


def draw_images(sample: Sample, files: list[bytes], width: int = TILE) -> np.ndarray:
    """The sample's images side by side with their regions, (h, width, 3) uint8 RGB.

    Region colours go by object number; masks are tinted and outlined by the exact pixels, numbered at their middle.
    """
    scale = (width - GAP * (len(files) - 1)) / sum(info.width for info in sample.images)
    panels: list[np.ndarray] = []
    for index, data in enumerate(files):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        factor = min(scale, width / 1.6 / pixels.shape[0])
        big = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)[:, :, ::-1].copy()
        for region in sample.regions:
            if region.image == index:
                _draw_region(big, region, factor)
        panels.append(big)
    height = max(panel.shape[0] for panel in panels)
    sheet = np.full((height, width, 3), 255, np.uint8)
    x = 0
    for panel in panels:
        part = panel[:, : width - x]
        sheet[: part.shape[0], x : x + part.shape[1]] = part
        x += panel.shape[1] + GAP
    return sheet


def _draw_region(image: np.ndarray, region, factor: float) -> None:  # noqa: ANN001
    colour = COLOURS[region.object % len(COLOURS)]
    if region.rle is not None:
        mask = rle_to_mask(region.rle).astype(np.uint8)
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        image[mask > 0] = (0.8 * image[mask > 0] + 0.2 * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, colour, 2)
        rows, columns = np.nonzero(mask)
        anchor = (int(columns.mean()) - 4, int(rows.mean()) + 5)
    elif region.box is not None:
        x0, y0, x1, y1 = (round(v * factor) for v in region.box)
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), colour, 2)
        anchor = (x0 + 3, y0 + 13)
    else:
        x, y = (round(v * factor) for v in region.point)
        cv2.circle(image, (x, y), 5, (255, 255, 255), -1)
        cv2.circle(image, (x, y), 4, colour, -1)
        return
    cv2.putText(image, str(region.object), anchor, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 3, cv2.LINE_AA)
    cv2.putText(image, str(region.object), anchor, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)


def sample_texts(sample: Sample, template: int) -> tuple[str, str, str]:
    """Heading, instruction and answer; placeholders are shortened to [0,2], an empty one to []."""
    texts = [re.sub(r"\{regions:([\d,]*)(:\w+)?\}", r"[\1]", text) for text in render(sample, template)]
    return f"{sample.task}  {sample.id}" + ("  held out" if sample.meta.get("held_out") else ""), texts[0], texts[1]


def png_sheet(tiles: list[tuple[tuple[str, str, str], np.ndarray]], columns: int = 4) -> np.ndarray:
    """Lay tiles out in rows, their text below: (H, W, 3) uint8 RGB."""
    font, drawn = ImageFont.load_default(13), []
    for (heading, instruction, answer), image in tiles:
        lines = [(heading, (150, 150, 150))]
        lines += [(line, (0, 0, 0)) for line in textwrap.wrap(instruction, 47)]
        lines += [(line, (0, 90, 200)) for line in textwrap.wrap(answer, 47)]
        canvas = Image.new("RGB", (TILE, image.shape[0] + LINE * len(lines) + 6), "white")
        canvas.paste(Image.fromarray(image), (0, 0))
        for row, (line, colour) in enumerate(lines):
            ImageDraw.Draw(canvas).text((0, image.shape[0] + 3 + row * LINE), line, fill=colour, font=font)
        drawn.append(np.asarray(canvas))
    rows = []
    for start in range(0, len(drawn), columns):
        group = drawn[start : start + columns]
        row = np.full((max(t.shape[0] for t in group) + 2 * GAP, columns * (TILE + 2 * GAP), 3), 255, np.uint8)
        for place, tile in enumerate(group):
            x = place * (TILE + 2 * GAP) + GAP
            row[GAP : GAP + tile.shape[0], x : x + TILE] = tile
        rows.append(row)
    return np.concatenate(rows)


def html_page(tiles: list[tuple[tuple[str, str, str], np.ndarray]]) -> str:
    """One self-contained page."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Samples</title><style>body{font:14px sans-serif;display:flex;"
        f"flex-wrap:wrap;gap:16px}}figure{{margin:0;width:{TILE}px}}small{{color:#888}}b{{color:#05a}}</style>"
    ]
    for texts, image in tiles:
        data = base64.b64encode(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()).decode()
        heading, instruction, answer = (html.escape(text) for text in texts)
        caption = f"<small>{heading}</small><br>{instruction}<br><b>{answer}</b>"
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'
        )
    return "\n".join(parts)


def choose(
    folder: Path, split: str | None, task: str | None, number: int, seed: int
) -> list[tuple[Sample, list[bytes]]]:
    """Up to `number` samples of a random shard order, evenly over the tasks when no task is named."""
    names = [name for name, row in read_index(folder)["shards"].items() if split in (None, row["split"])]
    random.Random(seed).shuffle(names)
    by_task: dict[str, list[tuple[Sample, list[bytes]]]] = {}
    for name in names[:4] if task is None else names:
        for sample, files in read_shard(folder / name):
            found = by_task.setdefault(sample.task, [])
            if task in (None, sample.task) and len(found) < number:
                found.append((sample, files))
    turns = [found[i] for i in range(number) for found in by_task.values() if i < len(found)]
    return sorted(turns[:number], key=lambda pair: list(by_task).index(pair[0].task))


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the user's is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", help="train, val, test, ... (default: any)")
    parser.add_argument("--task", help="one task (default: all)")
    parser.add_argument("--n", type=int, default=30, help="number of samples")
    parser.add_argument("--template", type=int, default=0, help="instruction template; 0 = evaluation's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .html or .png file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.task is not None:
            find_task(arguments.task)
        samples = choose(arguments.folder, arguments.split, arguments.task, arguments.n, arguments.seed)
        if not samples:
            raise ValueError(f"{arguments.folder}: no sample of split {arguments.split} and task {arguments.task}")
        tiles = [(sample_texts(s, arguments.template), draw_images(s, files)) for s, files in samples]
        if arguments.out.suffix == ".png":
            Image.fromarray(png_sheet(tiles)).save(arguments.out)
        elif arguments.out.suffix == ".html":
            arguments.out.write_text(html_page(tiles), encoding="utf-8")
        else:
            raise ValueError(f"--out: expected a .html or .png file, got {arguments.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(tiles)} samples -> {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
