"""Try a model in a browser: mark images, ask, and see the regions of the answer drawn as they are completed.

    python tools/demo.py [--ckpt RUN] [--port 7860] [--host 127.0.0.1]

Without `--ckpt` the shipped mini model answers, best about the made scenes that the page offers as examples. The page
is served to this machine only; `--host 0.0.0.0` opens it to the network. Needs `pip install -e .[demo]`.
"""

import argparse
import base64
import hashlib
import io
import math
import os
import secrets
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vistallm.coinit.frames import frame_numbers
from vistallm.coinit.images import decode_pixels
from vistallm.evaluate.gallery import mask_path
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.regions.masks import mask_to_rle
from vistallm.regions.overlay import COLOURS, draw_strip
from vistallm.schema import Region
from vistallm.tasks import TASKS, write_instruction

if TYPE_CHECKING:
    import gradio

    from vistallm.api import VistaLLM

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("demo.html")
MOST = {"images": 8, "bytes": 32 << 20, "characters": 4000}  # in a question, of a file, of a prompt
HELD = 512 << 20  # bytes of all uploads; beyond them the oldest are dropped
DECODED, KEPT = 100_000_000, 12_000_000  # pixels: larger images are refused, or shrunk to so many
PREVIEW = 1280  # pixels of the longer side that the page shows
ORIENTATION = 0x0112  # the EXIF tag
EXAMPLES = (("res", 3), ("attcoseg", 5), ("gres", 2), ("rec", 4), ("nlvr2", 2), ("caption", 6))  # task, serial number


def read_picture(data: bytes) -> np.ndarray:
    """Decode an upload: (H, W, 3) uint8 RGB, upright by its EXIF orientation as browsers show it, at most KEPT pixels.

    Raises:
        ValueError: not an image, cut off, or above DECODED pixels, which its header says before it is decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as header:
            (width, height), orientation = header.size, header.getexif().get(ORIENTATION, 1)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise ValueError("expected a JPEG, PNG or WebP image, got a file that is none, or is cut off") from error
    if width * height > DECODED:
        raise ValueError(f"expected at most {DECODED // 10**6} megapixels, got {width} x {height} pixels")
    stored = Image.fromarray(shrink(decode_pixels(data, "the file"), math.sqrt(KEPT / (width * height))))
    stored.getexif()[ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(stored))


def shrink(pixels: np.ndarray, scale: float) -> np.ndarray:
    """Resize (H, W, 3) pixels by a scale below 1, each side to one pixel or more; else return them as they are."""
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    """Encode (H, W, 3) uint8 RGB pixels as a file of this suffix."""
    return cv2.imencode(suffix, pixels[:, :, ::-1])[1].tobytes()


def read_clip(data: bytes) -> list[bytes]:
    """Return frames of a clip as image files: as many as a question may have, evenly spread.

    Raises:
        ValueError: OpenCV reads no frame, or not one of those wanted.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        clip, frames = cv2.VideoCapture(file.name), list[bytes]()
        for number in frame_numbers(int(clip.get(cv2.CAP_PROP_FRAME_COUNT)), MOST["images"]):
            clip.set(cv2.CAP_PROP_POS_FRAMES, number)
            if not (read := clip.read())[0]:
                raise ValueError(f"expected a whole clip, got none of its frame {number}; is the file cut off?")
            frames.append(encode(read[1][:, :, ::-1], ".jpg"))
        clip.release()
    if not frames:
        raise ValueError("expected a clip that OpenCV reads, such as MP4, got no frame")
    return frames


class Pictures:
    """Uploaded images as their bytes, by keys that can't be guessed; the oldest go at HELD bytes."""

    def __init__(self) -> None:
        self._held, self._fixed = OrderedDict[str, bytes](), dict[str, bytes]()
        self._lock = threading.Lock()  # also keeps large images from being decoded at the same time

    def add(self, data: bytes, fixed: bool = False) -> dict[str, Any]:
        """Hold an image (`fixed`: for good); return its key, size, preview (a data URI) and the size it shrank from."""
        with self._lock:
            pixels = read_picture(data)
            (self._fixed if fixed else self._held)[key := secrets.token_urlsafe(16)] = data
            while sum(map(len, self._held.values())) > HELD:
                self._held.popitem(last=False)
        height, width = pixels.shape[:2]
        small = encode(shrink(pixels, PREVIEW / max(height, width)), ".jpg")
        preview = "data:image/jpeg;base64," + base64.b64encode(small).decode()
        with Image.open(io.BytesIO(data)) as header:
            shrunk = header.size if math.prod(header.size) > KEPT else None  # from which size
        return {"key": key, "width": width, "height": height, "preview": preview, "shrunk": shrunk}

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Return the pixels of images; ValueError for none, too many, or one that is not held any more."""
        if not 1 <= len(keys) <= MOST["images"]:
            raise ValueError(f"expected 1 to {MOST['images']} images, got {len(keys)}")
        with self._lock:
            held = [self._fixed.get(key) or self._held.get(key) for key in keys]
        if None in held:
            raise ValueError("an image is not held any more: add it again")
        return [read_picture(data) for data in held if data]


def made_scenes(pictures: Pictures) -> list[dict[str, Any]]:
    """Draw the examples: scenes of the mini world, each with a question."""
    shown = []
    for task, serial in EXAMPLES:
        sample, files = make_sample(MiniRecipe(), "test", task, serial)
        images = [pictures.add(data, fixed=True) for data, _ in files]
        shown.append({"task": task, "prompt": write_instruction(sample, 0), "pictures": images})
    return shown


def answer_records(model: "VistaLLM", pictures: Pictures, keys: list, *question: str) -> Iterator[dict[str, Any]]:
    """Yield what the page draws of an answer as it grows; `question`: prompt, head, and task or "".

    What is wrong with the question is a record, too: {"error": one line}.
    """
    prompt, head, task = question
    try:
        if len(prompt) > MOST["characters"]:
            raise ValueError(f"expected a question of at most {MOST['characters']} characters, got {len(prompt)}")
        for answer in model.stream(pictures.read(keys), prompt, task or None, head):
            record = answer.to_json()
            for row, region in zip(record["regions"], answer.regions, strict=True):
                if region.kind == "mask":
                    row |= {"outline": mask_path(region), "rle": mask_to_rle(region.mask())}
            yield record
    except ValueError as error:
        yield {"error": str(error)}


def make_server(model: "VistaLLM", name: str) -> "gradio.Server":
    """Return the server: the page, its examples, uploads, questions (queued, one at a time) and overlays."""
    import gradio
    from fastapi import Body, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.concurrency import run_in_threadpool

    pictures, page = Pictures(), PAGE.read_text(encoding="utf-8")
    script = hashlib.sha256(page.split("<script>")[1].split("</script>")[0].encode()).digest()
    policy = (  # nothing but the page's own script runs, whatever a text may hold
        "default-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(script).decode()}'"
    )
    setup = {"model": name, "links": model.model.links is not None, "tasks": list(TASKS), "most": MOST}
    setup |= {"colours": COLOURS, "examples": made_scenes(pictures)}
    server = gradio.Server(docs_url=None, redoc_url=None, openapi_url=None)

    @server.exception_handler(ValueError)
    async def refuse(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @server.get("/")
    def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @server.get("/setup")
    def read_setup() -> JSONResponse:
        return JSONResponse(setup)

    @server.post("/pictures")
    async def upload(request: Request) -> JSONResponse:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST["bytes"]:
                raise ValueError(f"expected a file of at most {MOST['bytes'] >> 20} MB")
        clip = request.headers.get("content-type", "").startswith("video/")
        files = await run_in_threadpool(read_clip, bytes(data)) if clip else [bytes(data)]
        return JSONResponse([await run_in_threadpool(pictures.add, one) for one in files])

    @server.post("/overlay")
    def overlay(keys: Annotated[list[str], Body()], regions: Annotated[list[dict], Body()]) -> Response:
        drawn = draw_strip(pictures.read(keys), [Region.from_json(row) for row in regions])
        return Response(encode(drawn, ".png"), media_type="image/png")

    @server.api(name="ask", concurrency_limit=1)
    def ask(keys: list, prompt: str, head: str, task: str) -> Iterator[dict]:
        yield from answer_records(model, pictures, keys, prompt, head, task)

    return server


def main(argv: list[str]) -> None:
    """Load the model, serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(ROOT / "assets" / "mini"), help="run folder, checkpoint or export")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 = this machine only (default)")
    arguments = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # the page calls nobody
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("expected gradio, which is not installed; run: pip install -e .[demo]") from error
    from vistallm import VistaLLM

    server = make_server(VistaLLM.from_pretrained(arguments.ckpt), Path(arguments.ckpt).resolve().name)
    print(
        f"http://{arguments.host}:{arguments.port}", "(this machine only)" * (arguments.host == "127.0.0.1"), flush=True
    )
    server.launch(server_name=arguments.host, server_port=arguments.port, max_file_size=MOST["bytes"], quiet=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"demo.py: {error}")
