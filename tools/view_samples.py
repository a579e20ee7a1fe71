"""Show samples of a shard folder: images with their regions, instruction, answer, and the exact tokens of training.

python tools/view_samples.py DIR [key=value ...] [--split test] [--task res] [--n 24] [--run RUN] --out page.html|a.png

Regions are drawn as stored, and over them in white what the tokens say. Tokens are those of --run (its vocabulary and
settings), else of the mini model; `points=16` or `coords=text` changes a setting. A .png has no tokens. With
--answers RUN a .png holds the answers of that model:

    python tools/view_samples.py data/mini --answers assets/mini --ids mini-test-res-000096 --out a.png
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import itertools
import random
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vistallm.coinit.images import decode_pixels
from vistallm.coinit.shards import read_index, read_shard
from vistallm.regions.overlay import COLOURS, draw_regions
from vistallm.schema import IGNORE_INDEX, Region, Sample, SampleReject
from vistallm.tasks import find_task, render

if TYPE_CHECKING:  # torch is imported for pages alone
    from vistallm.data.sequence import Sequence, SequenceBuilder

TILE, GAP, LINE = 340, 8, 17  # of the sheet: width of a tile, space around it, height of a text line, in pixels
PAGE_SIDE = 480  # of the page: longer side of an image
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light }} * {{ box-sizing: border-box }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1280px; color: #1a1a1a }}
main {{ display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)) }}
figure {{ margin: 0; padding: 12px; border: 1px solid #d8d8d8; border-radius: 8px; min-width: 0 }}
h2 {{ font-size: 13px; font-weight: 600; color: #555; margin: 0 0 8px; overflow-wrap: anywhere }}
.images {{ display: flex; flex-wrap: wrap; gap: 8px; align-items: end; font-size: 12px; color: #555 }}
.images div:not(:only-child) {{ max-width: calc(50% - 4px) }}
img {{ display: block; max-width: 100%; height: auto; border-radius: 3px }}
p {{ margin: 8px 0 0; overflow-wrap: anywhere; white-space: pre-line }} p b {{ color: #05458f; font-weight: 500 }}
i {{ font-style: normal; font-weight: 600; border-bottom: 3px solid }}
details {{ margin-top: 8px }} summary {{ cursor: pointer; color: #555; font-size: 13px }}
.tokens {{ font: 12px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; margin-top: 6px }}
.tokens span {{ display: inline-block; max-width: 100%; line-height: 1.4; padding: 1px 3px; margin-right: 2px;
  border-radius: 3px; background: #eee; color: #555 }} p.tokens {{ margin-bottom: 10px }}
.tokens .s {{ background: #bfe8c6; color: #0a3d16 }} .tokens .r {{ font-weight: 600 }}
</style></head><body><p>{title}: {number} samples</p>
<p class="tokens"><span>given</span><span class="s">supervised</span>
<span class="s r">&lt;bin_1&gt;</span> a token's id shows under the pointer; white shapes are what the tokens say</p>
<main>
{figures}
</main></body></html>
"""


def texts_of(sample: Sample, template: int) -> tuple[str, list[tuple[str, str]]]:
    """Heading, and (instruction, answer) of each round; placeholders are shortened to [0,2], an empty one to []."""
    rounds = [*sample.fields.get("rounds", ()), render(sample, template)]
    short = [tuple(re.sub(r"\{regions:([\d,]*)(:\w+)?\}", r"[\1]", text) for text in pair) for pair in rounds]
    return f"{sample.task}  {sample.id}" + ("  held out" if sample.meta.get("held_out") else ""), short


def draw_panels(sample: Sample, written: list[Region], scales: list[float]) -> list[np.ndarray]:
    """The sample's images with their regions, and over them in white the `written` ones; each (h, w, 3) uint8 RGB."""
    here = [[[r for r in regions if r.image == i] for regions in (sample.regions, written)] for i in range(len(scales))]
    return [
        draw_regions(pixels, own, scale, over=over)
        for pixels, (own, over), scale in zip(sample.pixels or (), here, scales, strict=True)
    ]


def png_sheet(samples: list[Sample], template: int, columns: int = 4) -> np.ndarray:
    """Lay samples out in rows, their text below: (H, W, 3) uint8 RGB."""
    font, tiles = ImageFont.load_default(13), []
    for sample in samples:
        width = (TILE - GAP * (len(sample.images) - 1)) / sum(info.width for info in sample.images)
        panels = draw_panels(sample, [], [min(width, TILE / 1.6 / info.height) for info in sample.images])
        heading, rounds = texts_of(sample, template)
        lines = [(heading, (150, 150, 150))]
        for text, colour in zip(rounds[-1], ((0, 0, 0), (0, 90, 200)), strict=True):
            lines += [(line, colour) for line in textwrap.wrap(text, 47)]
        below = max(panel.shape[0] for panel in panels) + 3
        tiles.append(Image.new("RGB", (TILE + 2 * GAP, below + LINE * len(lines) + 2 * GAP), "white"))
        left = GAP
        for panel in panels:
            tiles[-1].paste(Image.fromarray(panel), (left, GAP))
            left += panel.shape[1] + GAP
        for row, (line, colour) in enumerate(lines):
            ImageDraw.Draw(tiles[-1]).text((GAP, GAP + below + row * LINE), line, fill=colour, font=font)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (columns * (TILE + 2 * GAP), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (j * (TILE + 2 * GAP), sum(heights[:i])))
    return np.asarray(sheet)


def load_builder(run: str | None, overrides: list[str], template: int) -> SequenceBuilder:
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


def token_spans(sequence: Sequence, builder: SequenceBuilder) -> str:
    """Every token of a sequence as HTML, in order; a row of image slots is one span, supervised tokens have class s."""
    vocabulary, spans = builder.vocabulary, []
    known = set(vocabulary.region_tokens)
    ids, labels = sequence.input_ids.tolist(), sequence.labels.tolist()
    tokens = zip(ids, labels, vocabulary.lm.convert_ids_to_tokens(ids), strict=True)
    for is_image, group in itertools.groupby(tokens, lambda token: token[0] == vocabulary.image_id):
        if is_image:
            spans.append(f"<span>&lt;im_patch&gt; × {len(list(group))}</span>")
            continue
        for token_id, label, name in group:
            kind = " ".join(("s",) * (label != IGNORE_INDEX) + ("r",) * (name in known))
            spans.append(f'<span class="{kind}" title="{token_id}">{html.escape(name)}</span>')
    return "".join(spans)


def paragraph(text: str) -> str:
    """A text as HTML, the numbers of its placeholders [0,2] underlined in the colours of their objects."""

    def mark(number: re.Match[str]) -> str:
        return f'<i style="border-color:rgb{COLOURS[int(number[0]) % len(COLOURS)]}">{number[0]}</i>'

    return re.sub(r"\[\d+(?:,\d+)*\]", lambda slot: re.sub(r"\d+", mark, slot[0]), html.escape(text))


def figure(sample: Sample, builder: SequenceBuilder) -> str:
    """One sample of the page."""
    written: list[Region] = []
    try:
        sequence = builder.build(sample)
        written = builder.codec.decode(sequence.answer, sequence.letterboxes).regions
        count, total = int((sequence.labels != IGNORE_INDEX).sum()), len(sequence.labels)
        tokens = f"<summary>{total} tokens, {count} supervised</summary>"
        tokens = f'<details open>{tokens}<div class="tokens">{token_spans(sequence, builder)}</div></details>'
    except SampleReject as reject:
        tokens = f"<p>No tokens, training would leave it out: {html.escape(f'{reject.reason}: {reject}')}</p>"
    several = len(sample.images) > 1
    scales = [PAGE_SIDE / max(info.width, info.height) / (1 + several) for info in sample.images]
    pictures = ""
    for number, panel in enumerate(draw_panels(sample, written, scales), 1):
        data = base64.b64encode(cv2.imencode(".jpg", panel[:, :, ::-1])[1].tobytes()).decode()
        caption = f"Image {number}" if several else ""
        pictures += f'<div><img src="data:image/jpeg;base64,{data}" alt="">{caption}</div>'
    heading, rounds = texts_of(sample, builder.template)
    texts = "".join(f"<p>{paragraph(asked)}</p><p><b>{paragraph(answer)}</b></p>" for asked, answer in rounds)
    return f'<figure><h2>{html.escape(heading)}</h2><div class="images">{pictures}</div>{texts}{tokens}</figure>'


def html_page(samples: list[Sample], builder: SequenceBuilder, title: str) -> str:
    """One self-contained page."""
    figures = "\n".join(figure(sample, builder) for sample in samples)
    return PAGE.format(title=html.escape(title), number=len(samples), figures=figures)


def answered(samples: list[Sample], run: str) -> list[Sample]:
    """The samples with a model's answers in place of their own; regions that the prompt gives stay."""
    from vistallm.data.datamodule import build_sequencer
    from vistallm.evaluate.gallery import short_text
    from vistallm.evaluate.generate import Answerer, make_prediction
    from vistallm.model.checkpoint import load_run

    model, config, _ = load_run(run)
    builder, answerer, copies = build_sequencer(config, model.vocabulary), Answerer(model, config), []
    for sample in samples:
        sequence = builder.build(sample)
        one = make_prediction(sequence, answerer.answer([sequence])[0], builder, benchmark="")
        texts = (str(short_text(text).striptags()) for text in (one.prompt, one.text))
        prompt, answer = (re.sub(r"\s+([.,:])", r"\1", text) for text in texts)
        regions = [Region.from_json(record) for record in one.target.get("given", [])]
        regions += one.parsed.regions if one.parsed else []
        copies.append(dataclasses.replace(sample, instruction=prompt, answer=answer, regions=regions))
    return copies


def choose(
    folder: Path, split: str | None, task: str | None, number: int, seed: int, ids: list[str] | None = None
) -> list[Sample]:
    """Up to `number` decoded samples of a random shard order, evenly over the tasks when no task is named.

    With `ids` exactly these samples, in this order.
    """
    names = [name for name, row in read_index(folder)["shards"].items() if split in (None, row["split"])]
    random.Random(seed).shuffle(names)
    by_task: dict[str, list[Sample]] = {}
    for name in names[:4] if task is None and ids is None else names:
        for sample, files in read_shard(folder / name):
            kept = by_task.setdefault(sample.task, [])
            if sample.id in ids if ids else task in (None, sample.task) and len(kept) < number:
                sample.pixels = [decode_pixels(data, folder / name) for data in files]
                kept.append(sample)
        if task is not None and len(by_task.get(task, ())) >= number:
            break
    if ids:
        chosen = {sample.id: sample for kept in by_task.values() for sample in kept}
        if missing := [name for name in ids if name not in chosen]:
            raise ValueError(f"--ids: expected samples of {folder}, got {missing[0]!r}, which is not in it")
        return [chosen[name] for name in ids]
    turns = [kept[i] for i in range(number) for kept in by_task.values() if i < len(kept)]
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
    parser.add_argument(
        "--answers", metavar="RUN", help="run folder whose model answers in place of the samples (.png)"
    )
    parser.add_argument("--ids", nargs="+", help="these samples, in this order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .html or .png file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.task is not None:
            find_task(arguments.task)
        if arguments.out.suffix not in (".png", ".html"):
            raise ValueError(f"--out: expected a .html or .png file, got {arguments.out}")
        if arguments.answers and arguments.out.suffix != ".png":
            raise ValueError(f"--answers: expected --out with a .png file, got {arguments.out}")
        samples = choose(arguments.folder, arguments.split, arguments.task, arguments.n, arguments.seed, arguments.ids)
        if not samples:
            raise ValueError(f"{arguments.folder}: no sample of split {arguments.split} and task {arguments.task}")
        if arguments.out.suffix == ".png":
            samples = answered(samples, arguments.answers) if arguments.answers else samples
            sheet = Image.fromarray(png_sheet(samples, arguments.template))
            if arguments.answers:  # a picture for a page: 256 colours are a third of the bytes
                sheet = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
            sheet.save(arguments.out, optimize=True)
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
