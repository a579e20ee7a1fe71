"""Show samples of a shard folder: images with their regions, instruction, answer, and the exact tokens of training.

python tools/view_samples.py DIR [key=value ...] [--split test] [--task res] [--n 24] [--run RUN] --out page.html|a.png

The page holds the tokens, those that are supervised coloured, and over the regions the shapes that the tokens say
(white, with their vertices). Tokens are those of --run (its vocabulary and settings), else of the mini model;
`points=16` or `coords=text` changes a setting. A .png is a sheet of images, regions and texts alone. Masks are drawn
whole, as stored.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
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
from vistallm.data.sequence import Sequence
from vistallm.regions.overlay import COLOURS, draw_regions
from vistallm.schema import IGNORE_INDEX, Region, Sample
from vistallm.tasks import find_task, render

TILE, GAP, LINE = 340, 8, 17  # of the sheet: width of a tile, space around it, height of a text line, in pixels
PAGE_SIDE = 480  # of the page: longer side of an image
STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1280px; color: #1a1a1a }
main { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)) }
figure { margin: 0; padding: 12px; border: 1px solid #d8d8d8; border-radius: 8px; min-width: 0 }
h2 { font-size: 13px; font-weight: 600; color: #555; margin: 0 0 8px; overflow-wrap: anywhere }
.images { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; font-size: 12px; color: #555 }
.images div:not(:only-child) { max-width: calc(50% - 4px) }
img { display: block; max-width: 100%; height: auto; border-radius: 3px }
p { margin: 8px 0 0; overflow-wrap: anywhere; white-space: pre-line } p b { color: #05458f; font-weight: 500 }
i { font-style: normal; font-weight: 600; border-bottom: 3px solid }
details { margin-top: 8px } summary { cursor: pointer; color: #555; font-size: 13px }
.tokens { font: 12px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; margin-top: 6px }
.tokens span { display: inline-block; max-width: 100%; line-height: 1.4; padding: 1px 3px; margin-right: 2px;
  border-radius: 3px; background: #eee; color: #555 }
p.tokens { margin-bottom: 10px }
.tokens .s { background: #bfe8c6; color: #0a3d16 } .tokens .r { font-weight: 600 }
"""


def draw_row(sample: Sample, width: int = TILE) -> np.ndarray:
    """The sample's images side by side with their regions, (h, width, 3) uint8 RGB."""
    assert sample.pixels
    scale = (width - GAP * (len(sample.pixels) - 1)) / sum(info.width for info in sample.images)
    panels = []
    for index, pixels in enumerate(sample.pixels):
        factor = min(scale, width / 1.6 / pixels.shape[0])
        panels.append(draw_regions(pixels, [r for r in sample.regions if r.image == index], factor))
    height = max(panel.shape[0] for panel in panels)
    row = np.hstack([_place(panel, height, panel.shape[1] + GAP) for panel in panels])
    return _place(row[:, :width], height, width)


def _place(image: np.ndarray, height: int, width: int, margin: int = 0) -> np.ndarray:
    """The image at the upper left of a white canvas, (height, width, 3) uint8."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[margin : margin + image.shape[0], margin : margin + image.shape[1]] = image
    return canvas


def sample_texts(sample: Sample, template: int) -> tuple[str, str, str]:
    """Heading, instruction and answer; placeholders are shortened to [0,2], an empty one to []."""
    instruction, answer = map(_short, render(sample, template))
    return f"{sample.task}  {sample.id}" + ("  held out" if sample.meta.get("held_out") else ""), instruction, answer


def _short(text: str) -> str:
    return re.sub(r"\{regions:([\d,]*)(:\w+)?\}", r"[\1]", text)


def png_sheet(samples: list[Sample], template: int, columns: int = 4) -> np.ndarray:
    """Lay samples out in rows, their text below: (H, W, 3) uint8 RGB."""
    font, drawn = ImageFont.load_default(13), []
    for sample in samples:
        image, (heading, instruction, answer) = draw_row(sample), sample_texts(sample, template)
        lines = [(heading, (150, 150, 150))]
        lines += [(line, (0, 0, 0)) for line in textwrap.wrap(instruction, 47)]
        lines += [(line, (0, 90, 200)) for line in textwrap.wrap(answer, 47)]
        canvas = Image.new("RGB", (TILE, image.shape[0] + LINE * len(lines) + 6), "white")
        canvas.paste(Image.fromarray(image), (0, 0))
        for row, (line, colour) in enumerate(lines):
            ImageDraw.Draw(canvas).text((0, image.shape[0] + 3 + row * LINE), line, fill=colour, font=font)
        drawn.append(np.asarray(canvas))
    white, rows = np.full((1, 1, 3), 255, np.uint8), []
    for start in range(0, len(drawn), columns):
        group = drawn[start : start + columns]
        height = max(tile.shape[0] for tile in group) + 2 * GAP
        group += [white] * (columns - len(group))
        rows.append(np.hstack([_place(tile, height, TILE + 2 * GAP, GAP) for tile in group]))
    return np.concatenate(rows)


def load_builder(run: str | None, overrides: list[str], template: int):  # noqa: ANN201 (torch is imported for pages alone)
    """The sequence builder and the ids of the region tokens, of a run or of the mini model."""
    from vistallm.config import apply_overrides, config_from_file, load_config
    from vistallm.data.datamodule import build_codec, build_sequencer
    from vistallm.data.vocabulary import Vocabulary

    if run is None:
        config = load_config(overrides)
        vocabulary = Vocabulary.build(config.model, build_codec(config))
    else:
        config = apply_overrides(config_from_file(Path(run) / "config.yaml"), overrides)
        vocabulary = Vocabulary.load(Path(run) / "vocabulary")
    return dataclasses.replace(build_sequencer(config, vocabulary), template=template)


def token_spans(sequence: Sequence, builder) -> str:  # noqa: ANN001
    """Every token of a sequence as HTML, in order; a row of image slots is one span, supervised tokens have class s."""
    vocabulary, spans, slots = builder.vocabulary, [], 0
    known = set(vocabulary.region_tokens)
    names = vocabulary.lm.convert_ids_to_tokens(sequence.input_ids.tolist())
    for token_id, label, name in zip(sequence.input_ids.tolist(), sequence.labels.tolist(), names, strict=True):
        if token_id == vocabulary.image_id:
            slots += 1
            continue
        if slots:
            spans.append(f"<span>&lt;im_patch&gt; × {slots}</span>")
            slots = 0
        kind = " ".join(("s",) * (label != IGNORE_INDEX) + ("r",) * (name in known))
        spans.append(f'<span class="{kind}" title="{token_id}">{html.escape(name)}</span>')
    return "".join(spans)


def _words(text: str) -> str:
    """A text as HTML, the numbers of its placeholders [0,2] underlined in the colours of their objects."""

    def mark(number: re.Match[str]) -> str:
        return f'<i style="border-color:rgb{COLOURS[int(number[0]) % len(COLOURS)]}">{number[0]}</i>'

    return re.sub(r"\[\d+(?:,\d+)*\]", lambda found: re.sub(r"\d+", mark, found[0]), html.escape(text))


def figure(sample: Sample, builder) -> str:  # noqa: ANN001
    """One sample of the page."""
    from vistallm.schema import SampleReject

    assert sample.pixels
    written: list[Region] = []
    try:
        sequence = builder.build(sample)
        written = builder.codec.decode(sequence.answer, sequence.letterboxes).regions
        count, total = int((sequence.labels != IGNORE_INDEX).sum()), len(sequence.labels)
        tokens = f"<summary>{total} tokens, {count} supervised</summary>"
        tokens = f'<details open>{tokens}<div class="tokens">{token_spans(sequence, builder)}</div></details>'
    except SampleReject as reject:
        tokens = f"<p>No tokens, training would leave it out: {html.escape(f'{reject.reason}: {reject}')}</p>"
    pictures = []
    for index, pixels in enumerate(sample.pixels):
        factor = PAGE_SIDE / max(pixels.shape[:2]) / (1 if len(sample.pixels) == 1 else 2)
        here = [[r for r in regions if r.image == index] for regions in (sample.regions, written)]
        drawn = draw_regions(pixels, here[0], factor, over=here[1])
        data = base64.b64encode(cv2.imencode(".jpg", drawn[:, :, ::-1])[1].tobytes()).decode()
        number = f"Image {index + 1}" if len(sample.pixels) > 1 else ""
        pictures.append(f'<div><img src="data:image/jpeg;base64,{data}" alt="">{number}</div>')
    heading, instruction, answer = sample_texts(sample, builder.template)
    rounds = "".join(
        f"<p>{_words(_short(q))}</p><p><b>{_words(_short(a))}</b></p>" for q, a in sample.fields.get("rounds", ())
    )
    texts = f"{rounds}<p>{_words(instruction)}</p><p><b>{_words(answer)}</b></p>"
    shown = f'<h2>{html.escape(heading)}</h2><div class="images">{"".join(pictures)}</div>'
    return f"<figure>{shown}{texts}{tokens}</figure>"


def html_page(samples: list[Sample], builder, title: str) -> str:  # noqa: ANN001
    """One self-contained page."""
    legend = (
        '<span>given</span><span class="s">supervised</span><span class="s r">&lt;bin_1&gt;</span> a token\'s id shows '
        "under the pointer; white shapes are what the answer's tokens say"
    )
    figures = "\n".join(figure(sample, builder) for sample in samples)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><p>{html.escape(title)}: {len(samples)} samples</p><p class="tokens">{legend}</p><main>
{figures}
</main></body></html>
"""


def choose(folder: Path, split: str | None, task: str | None, number: int, seed: int) -> list[Sample]:
    """Up to `number` decoded samples of a random shard order, evenly over the tasks when no task is named."""
    names = [name for name, row in read_index(folder)["shards"].items() if split in (None, row["split"])]
    random.Random(seed).shuffle(names)
    by_task: dict[str, list[Sample]] = {}
    for name in names[:4] if task is None else names:
        for sample, files in read_shard(folder / name):
            found = by_task.setdefault(sample.task, [])
            if task in (None, sample.task) and len(found) < number:
                sample.pixels = [cv2.imdecode(np.frombuffer(f, np.uint8), cv2.IMREAD_COLOR_RGB) for f in files]
                found.append(sample)
        if task is not None and len(by_task.get(task, ())) >= number:
            break
    turns = [found[i] for i in range(number) for found in by_task.values() if i < len(found)]
    return sorted(turns[:number], key=lambda sample: list(by_task).index(sample.task))


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the user's is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the tokens, as for train.py")
    parser.add_argument("--split", help="train, val, test, ... (default: any)")
    parser.add_argument("--task", help="one task (default: all)")
    parser.add_argument("--n", type=int, default=30, help="number of samples")
    parser.add_argument("--template", type=int, default=0, help="instruction template; 0 = evaluation's")
    parser.add_argument("--run", help="run folder whose vocabulary and settings make the tokens (default: mini)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .html or .png file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.task is not None:
            find_task(arguments.task)
        if arguments.out.suffix not in (".png", ".html"):
            raise ValueError(f"--out: expected a .html or .png file, got {arguments.out}")
        samples = choose(arguments.folder, arguments.split, arguments.task, arguments.n, arguments.seed)
        if not samples:
            raise ValueError(f"{arguments.folder}: no sample of split {arguments.split} and task {arguments.task}")
        if arguments.out.suffix == ".png":
            Image.fromarray(png_sheet(samples, arguments.template)).save(arguments.out)
        else:
            builder = load_builder(arguments.run, arguments.overrides, arguments.template)
            arguments.out.write_text(html_page(samples, builder, str(arguments.folder)), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(samples)} samples -> {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
