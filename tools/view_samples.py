"""Show samples of a shard folder as they are trained: images with their regions, texts, and on a page the tokens.

python tools/view_samples.py DIR [key=value ...] [--split test] [--task res] [--n 24] [--run RUN] --out page.html|a.png

Regions are drawn as stored, and over them in white what the tokens say and what region prompts show. Tokens are those
of --run (its vocabulary and settings), else of the mini model; `points=16`, `coords=text` or `model.links=all` changes
a setting. With --answers RUN a .png holds the answers of that model instead:

    python tools/view_samples.py data/mini --answers assets/mini --ids mini-test-res-000096 --out a.png
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import itertools
import random
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont

from vistallm.coinit.images import decode_pixels
from vistallm.coinit.shards import read_index, read_shard
from vistallm.regions.overlay import COLOURS, draw_regions
from vistallm.schema import IGNORE_INDEX, Region, Sample, SampleReject
from vistallm.tasks import find_task, render

if TYPE_CHECKING:  # torch is imported once the words on the command line are right
    from vistallm.data.sequence import Sequence, SequenceBuilder

TILE, PAGE_TILE = 340, 520  # width of a sample's images side by side on a sheet and on a page, in pixels
GAP, LINE = 8, 17  # of the sheet: space around a tile, height of a text line, in pixels


def describe(sample: Sample, builder: SequenceBuilder | None, tile: int) -> dict[str, Any]:
    """What is shown of a sample: `heading`, `rounds` of texts, `panels` (h, w, 3) uint8 RGB with the regions drawn.

    With a builder also its tokens and, in white, the regions they say; `fault` when training leaves the sample out.
    """
    rounds = [*sample.fields.get("rounds", ()), render(sample, 0)]
    rounds = [[re.sub(r"\{regions:([\d,]*)(:\w+)?\}", r"[\1]", text) for text in pair] for pair in rounds]
    rounds = [[re.sub(r"\{region:(\d+):?(\w*)\}", r"[\1] (\2)", text) for text in pair] for pair in rounds]
    rounds = [[re.sub(r"\{point:(\d+)\}", r"(\1)", text) for text in pair] for pair in rounds]
    heading = f"{sample.task}  {sample.id}" + ("  held out" if sample.meta.get("held_out") else "")
    view, written = {"heading": heading, "rounds": rounds}, list[Region]()
    shown: list[list[np.ndarray]] = [[] for _ in sample.images]
    try:
        if builder:
            sequence = builder.build(sample)
            written = builder.codec.decode(sequence.answer, sequence.letterboxes).regions
            for image, square in sequence.prompts:
                box = sequence.letterboxes[image]
                whole, (left, top) = (
                    cv2.resize(square, (box.side, box.side), interpolation=cv2.INTER_NEAREST),
                    box.padding,
                )
                shown[image].append(whole[top : top + box.height, left : left + box.width])
            supervised = int((sequence.labels != IGNORE_INDEX).sum())
            view |= {"tokens": tokens(sequence, builder), "length": len(sequence.labels), "supervised": supervised}
    except SampleReject as reject:
        view["fault"] = f"No tokens, training would leave it out: {reject.reason}: {reject}"
    width = (tile - GAP * (len(sample.images) - 1)) / sum(info.width for info in sample.images)
    scales = [min(width, tile / 1.6 / info.height) for info in sample.images]
    here = [[[r for r in regions if r.image == i] for regions in (sample.regions, written)] for i in range(len(scales))]
    drawn = zip(sample.pixels or (), here, scales, shown, strict=True)
    panels = [draw_regions(pixels, own, scale, over=over, prompts=masks) for pixels, (own, over), scale, masks in drawn]
    return view | {"panels": panels}


def tokens(sequence: Sequence, builder: SequenceBuilder) -> list[dict[str, Any]]:
    """Name, id and kind (s = supervised, r = of regions) of every token in order; a row of image slots is one."""
    vocabulary, rows = builder.vocabulary, list[dict[str, Any]]()
    known, ids = set(vocabulary.region_tokens), sequence.input_ids.tolist()
    named = zip(ids, sequence.labels.tolist(), vocabulary.lm.convert_ids_to_tokens(ids), strict=True)
    for is_image, group in itertools.groupby(named, lambda token: token[0] == vocabulary.image_id):
        row = list(group)
        if is_image:
            row = [(vocabulary.image_id, IGNORE_INDEX, f"<im_patch> × {len(row)}")]
        for token_id, label, name in row:
            kind = ["s"] * (label != IGNORE_INDEX) + ["r"] * (name in known)
            rows.append({"name": name, "id": token_id, "kind": " ".join(kind)})
    return rows


def png_sheet(views: list[dict[str, Any]], columns: int = 4) -> Image.Image:
    """Lay views out in rows, their texts below the images."""
    font, tiles = ImageFont.load_default(13), []
    for view in views:
        texts = [(view["heading"], (150, 150, 150))]
        texts += [pair for texts in view["rounds"] for pair in zip(texts, ((0, 0, 0), (0, 90, 200)), strict=True)]
        texts += [(view["fault"], (164, 0, 0))] if "fault" in view else []
        lines = [(line, colour) for text, colour in texts for line in textwrap.wrap(text, 47)]
        below, left = max(panel.shape[0] for panel in view["panels"]) + GAP + 3, GAP
        tiles.append(Image.new("RGB", (TILE + 2 * GAP, below + LINE * len(lines) + GAP), "white"))
        for panel in view["panels"]:
            tiles[-1].paste(Image.fromarray(panel), (left, GAP))
            left += panel.shape[1] + GAP
        for row, (line, colour) in enumerate(lines):
            ImageDraw.Draw(tiles[-1]).text((GAP, below + row * LINE), line, fill=colour, font=font)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (columns * (TILE + 2 * GAP), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (j * (TILE + 2 * GAP), sum(heights[:i])))
    return sheet


def html_page(views: list[dict[str, Any]], title: str) -> str:
    """One self-contained page."""

    def paragraph(text: str) -> Markup:  # the numbers of its placeholders [0,2] in the colours of their objects
        def mark(number: re.Match[str]) -> str:
            return f'<i style="border-color:rgb{COLOURS[int(number[0]) % len(COLOURS)]}">{number[0]}</i>'

        return Markup(re.sub(r"\[\d+(?:,\d+)*\]", lambda slot: re.sub(r"\d+", mark, slot[0]), str(escape(text))))

    def jpeg(panel: np.ndarray) -> str:
        return base64.b64encode(cv2.imencode(".jpg", panel[:, :, ::-1])[1].tobytes()).decode()

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"paragraph": paragraph, "jpeg": jpeg}
    return environment.get_template("view_samples.jinja").render(views=views, title=title)


def load_builder(run: str | None, overrides: list[str]) -> SequenceBuilder:
    """The sequence builder of a run or of the mini model."""
    from vistallm.config import apply_overrides, config_from_file, load_config
    from vistallm.data.sequence import build_codec, build_sequencer
    from vistallm.data.vocabulary import Vocabulary

    if run is None:
        config = load_config(overrides)
        vocabulary = Vocabulary.build(config.model, build_codec(config), config.links)
    else:
        config = apply_overrides(config_from_file(Path(run) / "config.yaml"), overrides)
        vocabulary = Vocabulary.load(Path(run) / "vocabulary")
    return build_sequencer(config, vocabulary)


def answered(samples: list[Sample], run: str) -> list[Sample]:
    """The samples with a model's answers in place of their own; regions that the prompt gives stay."""
    from vistallm.data.sequence import build_sequencer
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
    turns = [sample for turn in itertools.zip_longest(*by_task.values()) for sample in turn if sample][:number]
    if not turns:
        raise ValueError(f"{folder}: no sample of split {split} and task {task}")
    return sorted(turns, key=lambda sample: list(by_task).index(sample.task))


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the user's is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the tokens, as for train.py")
    parser.add_argument("--split", help="train, val, test, ... (default: any)")
    parser.add_argument("--task", help="one task (default: all)")
    parser.add_argument("--n", type=int, default=30, help="number of samples")
    parser.add_argument("--run", help="run folder whose vocabulary and settings make the tokens (default: mini)")
    parser.add_argument("--answers", metavar="RUN", help="run folder whose model answers (.png)")
    parser.add_argument("--ids", nargs="+", help="these samples, in this order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .html or .png file")
    words = parser.parse_intermixed_args(argv)
    try:
        if words.task is not None:
            find_task(words.task)
        if words.out.suffix not in ((".png",) if words.answers else (".png", ".html")):
            raise ValueError(f"--out: expected a .html or .png file (with --answers a .png), got {words.out}")
        samples = choose(words.folder, words.split, words.task, words.n, words.seed, words.ids)
        samples = answered(samples, words.answers) if words.answers else samples
        builder = None if words.answers else load_builder(words.run, words.overrides)
        is_page = words.out.suffix == ".html"
        views = [describe(sample, builder, PAGE_TILE if is_page else TILE) for sample in samples]
        if is_page:
            words.out.write_text(html_page(views, str(words.folder)), encoding="utf-8")
        else:
            sheet = png_sheet(views)
            if words.answers:  # a picture for a page: 256 colours are a third of the bytes
                sheet = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
            sheet.save(words.out, optimize=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(samples)} samples -> {words.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
