"""Answer prompts on images.

    python tools/predict.py --ckpt RUN --image a.jpg [b.jpg] --prompt "..." [--out overlay.png] [--masks DIR]
    python tools/predict.py --ckpt RUN --image a.jpg [b.jpg]              asks for prompts until an empty line
    python tools/predict.py --ckpt RUN --batch FILE.jsonl --out answers.jsonl

Regions in the prompt are written in pixels of the stored image: `{box:x0,y0,x1,y1}`, `{point:x,y}` or
`{mask:x0,y0,x1,y1,x2,y2,...}`, with `@k` for image k (`{point:40,60@2}`). The answer is printed as text, with its
regions by number, and as JSON. The overlay shows them; `--masks` writes each as a PNG of its image's size, 0 or 255.
A line of FILE.jsonl is {"images": [..], "prompt": "..", "task": ".."}; paths are relative to it, the task is optional.
`--task` expects the form of that task's answers; with `--link TASK` a model with links answers by them, and the
prompt's regions are region prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from vistallm.evaluate.prompt import make_sample, read_image
from vistallm.regions.overlay import draw_strip

if TYPE_CHECKING:
    from vistallm.api import Answer, VistaLLM

WINDOW = 32  # lines of a batch file whose answers are written together


def load_model(path: str) -> VistaLLM:
    """Load a model; torch is imported here, so that a wrong word or image is refused at once."""
    if not Path(path).exists():
        raise ValueError(f"--ckpt {path}: expected a run folder, a checkpoint or an export, found nothing there")
    from vistallm import VistaLLM

    return VistaLLM.from_pretrained(path)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 RGB pixels; ValueError where that fails."""
    if not cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels):
        raise ValueError(f"{path}: could not be written")


def show(answer: Answer, images: list[np.ndarray], words: argparse.Namespace) -> None:
    """Print an answer; write the overlay and the masks that `words` ask for. ValueError where it can't be read."""
    print(answer.text)
    if answer.failure:
        raise ValueError(f"the answer can't be read: {answer.failure}")
    print(json.dumps(answer.to_json()))
    if words.out:
        write_image(words.out, draw_strip(images, answer.regions, least=240))
        print(f"overlay: {words.out}")
    for region in answer.regions if words.masks else ():
        if region.kind in ("mask", "box"):
            path = words.masks / f"{words.image[region.image].stem}-{region.object}.png"
            write_image(path, region.mask() * np.uint8(255))
            print(f"mask: {path}")


def ask(model: VistaLLM, images: list[np.ndarray], words: argparse.Namespace) -> None:
    """Answer prompts from the terminal, each printed as it grows, until an empty line or the end of the input."""
    while prompt := input("> " if sys.stdin.isatty() else "").strip():
        try:
            for part in model.stream(images, prompt, **words.options):
                if sys.stdout.isatty():
                    print(f"\r\x1b[K{part.text}", end="", flush=True)
            print("\r\x1b[K" if sys.stdout.isatty() else "", end="")
            show(part, images, words)
        except ValueError as error:
            print(f"predict.py: {error}")


def answer_lines(model: VistaLLM, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of each line of a batch file with its answer, or with what is wrong with it as "error"."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for first in range(0, len(lines), WINDOW):
        records = [_read_line(line, path.parent) for line in lines[first : first + WINDOW]]
        for task, rows in groupby(sorted(records, key=_task_of), key=_task_of):
            good = [row for row in rows if "error" not in row]
            asked = [row.pop("pixels") for row in good], [row["prompt"] for row in good]
            for row, answer in zip(good, model.predict(*asked, task=task or None) if good else (), strict=True):
                row["answer"] = answer.to_json()
        yield from records


def _task_of(record: dict[str, Any]) -> str:
    return str(record.get("task") or "")


def _read_line(line: str, folder: Path) -> dict[str, Any]:
    """Read and check one line; its images are under "pixels"."""
    record: dict[str, Any] = {"line": line}
    try:
        record = json.loads(line)
        pixels = [read_image(folder / name) for name in record["images"]]
        make_sample(pixels, record["prompt"], record.get("task"))
        return record | {"pixels": pixels}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        record = record if isinstance(record, dict) else {"line": line}
        return record | {"error": f'expected {{"images": [..], "prompt": ".."}}; {type(error).__name__}: {error}'}


def answer_batch(words: argparse.Namespace) -> None:
    """Answer a batch file into `--out`; ValueError with the number of lines that had no answer."""
    if words.prompt or words.masks or words.task or words.link:
        raise ValueError("--batch: expected --out alone beside it; prompts and tasks stand in the file")
    if not words.batch.is_file() or words.out is None or words.out.suffix != ".jsonl":
        raise ValueError(f"--batch {words.batch}: expected a JSONL file, and --out with the name of another")
    words.out.parent.mkdir(parents=True, exist_ok=True)
    model, count, wrong = load_model(words.ckpt), 0, 0
    with words.out.open("w", encoding="utf-8") as file:
        for record in answer_lines(model, words.batch):
            file.write(json.dumps(record) + "\n")
            count, wrong = count + 1, wrong + ("error" in record)
    print(f"{count - wrong} answers: {words.out}")
    if wrong:
        raise ValueError(f"--batch {words.batch}: {wrong} of {count} lines have no answer; {words.out} says why")


def main(argv: list[str]) -> None:
    """Check the arguments before anything is loaded, then answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint file, or what tools/export.py writes")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", nargs="+", type=Path, help="one or several images")
    what.add_argument("--batch", type=Path, help="a file with one prompt a line")
    parser.add_argument("--prompt", help="without it, prompts are read from the terminal")
    parser.add_argument("--out", "--save", type=Path, help="write the overlay or the answers here; the folder is made")
    parser.add_argument("--masks", type=Path, help="write a PNG for each mask into this folder, which is made")
    parser.add_argument("--task", help="expect the form of this task's answers")
    parser.add_argument("--link", metavar="TASK", help="answer by links, in the form of this task")
    words = parser.parse_args(argv)
    if words.batch:
        answer_batch(words)
        return
    words.options = {"task": words.link or words.task, "head": "link" if words.link else "text"}
    images = [read_image(path) for path in words.image]
    make_sample(images, "?" if words.prompt is None else words.prompt, **words.options)
    if words.out and (not cv2.haveImageWriter(str(words.out)) or words.out.is_dir()):
        raise ValueError(f"--out {words.out}: expected the name of a .png or .jpg file")
    for folder in (words.out and words.out.parent, words.masks):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    model = load_model(words.ckpt)
    if words.prompt is None:
        ask(model, images, words)
    else:
        show(model.predict(images, words.prompt, **words.options), images, words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"predict.py: {error}")
    except (EOFError, KeyboardInterrupt):
        sys.exit(0)
