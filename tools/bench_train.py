"""Time training steps of a configuration on random weights and made batches, and compare with the cost model.

    python tools/bench_train.py                                        the mini model on this machine
    python tools/bench_train.py model=vicuna-7b train.decoder=lora data.batch_size=16 tokens=256 [any.key=value]

Its own keys: steps, warm (steps before), tokens, supervised, images, instruction (of one sample). Prints samples/s,
tokens/s, time by part, memory peak, and MFU = operations of forward and backward passes that the model needs (counted
by vistallm.train.plan: encoder, tokenizer and decoder apart, no weight gradient of what is frozen, repeated passes of
checkpointing left out) / time / the machine's matrix product speed, which is measured in the same run.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from vistallm.config import Config, load_config
from vistallm.data.datamodule import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_model
from vistallm.model.vistallm import VistaLLM
from vistallm.schema import Batch
from vistallm.train.optim import build_optimizer, cast_frozen, keep_frozen_in_eval, set_trainable
from vistallm.train.plan import GIB, GPUS, VICUNA_ROWS, Plan, Workload, made_batch, make_plan
from vistallm.train.strategy import compile_layers, resolve_precision

OWN = {"steps": 10, "warm": 3, "tokens": 192, "supervised": 64, "images": 1, "instruction": 32}


def build(config: Config, device: torch.device) -> VistaLLM:
    """The model with random weights, with as many rows as Vicuna where it stands for it."""
    vicuna = config.model.decoder.weights is not None
    config.model.decoder.weights = config.model.tokenizer.weights = config.model.encoder.weights = None
    config.model.tokenizer.text_tokenizer = None
    vocabulary = Vocabulary.build(config.model, build_codec(config))
    if vicuna:
        vocabulary.lm.add_tokens([f"<filler {i}>" for i in range(VICUNA_ROWS - vocabulary.first_new)])
    with torch.device(device):
        model = build_model(config, vocabulary)
    set_trainable(model, config.train)
    if config.train.frozen_bf16 and resolve_precision(config) == "bf16-mixed":
        cast_frozen(model)
    compile_layers(model, config.train.compile)
    model.train()
    keep_frozen_in_eval(model)
    return model


class Clock:
    """Seconds by part of a step; a part's forward pass is timed by hooks around its module."""

    def __init__(self, model: VistaLLM, device: torch.device) -> None:
        self.device, self.seconds, self._start = device, dict[str, list[float]](), 0.0
        parts: dict[str, nn.Module] = {"encoder": model.encoder, "tokenizer": model.tokenizer}
        for name, part in (parts | {"decoder": model.language_model()}).items():
            part.register_forward_pre_hook(lambda *_: self.start())
            part.register_forward_hook(lambda *_, name=name: self.stop(name))

    def start(self) -> None:
        """Begin timing."""
        self._start = self.now()

    def stop(self, name: str) -> None:
        """Add the time since `start` to a part."""
        self.seconds.setdefault(name, []).append(self.now() - self._start)

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train_steps(model: VistaLLM, batch: Batch, config: Config, own: dict[str, int]) -> dict[str, list[float]]:
    """Run steps as training does (autocast, clipping, AdamW); seconds by part, without the warm-up steps."""
    device = batch.input_ids.device
    optimizer, _ = build_optimizer(model, config.train, 1000)
    clock = Clock(model, device)
    half = resolve_precision(config) == "bf16-mixed"
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(own["warm"] + own["steps"]):
        if step == own["warm"]:
            clock.seconds.clear()
        begin = clock.now()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(batch).loss
        clock.start()
        loss.backward()
        clock.stop("backward")
        clock.start()
        torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.stop("optimizer")
        clock.seconds.setdefault("step", []).append(clock.now() - begin)
    return clock.seconds


def matrix_speed(device: torch.device, half: bool) -> float:
    """Operations per second of a large matrix product: the best of a few, the baseline of MFU."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - begin))
    return best


def report(plan: Plan, seconds: dict[str, list[float]], work: Workload, speed: float, peak: float) -> None:
    """Print the table."""
    step = statistics.median(seconds["step"])
    print(f"{work.samples} samples of {work.tokens} tokens, {work.supervised} supervised, {work.images} images a step")
    print(f"step {step:.3f} s: {work.samples / step:.1f} samples/s, {work.samples * work.tokens / step:,.0f} tokens/s")
    for name, values in seconds.items():
        if name != "step":
            print(f"  {name:<10}{statistics.median(values) / step:>7.1%}")
    for part in plan.parts:
        print(f"  {part.name:<10}{part.forward / 1e9:>12,.1f} G forward {part.backward / 1e9:>12,.1f} G backward")
    print(f"matrix products here: {speed / 1e12:.2f} T/s; MFU {plan.model_operations / step / speed:.1%} of that")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().replace(" ", "")
        for sheet in {gpu.peak for key, gpu in GPUS.items() if key.partition("-")[0] in name}:
            print(f"the data sheet's: {sheet / 1e12:.0f} T/s; MFU {plan.model_operations / step / sheet:.1%} of that")
    predicted = sum(value for name, value in plan.memory.items() if name != "runtime")
    print(f"memory peak {peak / GIB:.2f} GiB; the planner expects {predicted / GIB:.2f} GiB of weights to activations")


def main(argv: list[str]) -> None:
    """Build, run, print."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    own: dict[str, Any] = dict(OWN)
    words = [word.partition("=") for word in argv]
    own |= {key: int(value) for key, _, value in words if key in OWN}
    config = load_config(["stage=1", *(f"{k}={v}" for k, _, v in words if k not in OWN)])
    size = config.data.batch_size
    work = Workload(size, size * own["images"], own["tokens"], own["supervised"], own["instruction"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    plan, on_gpu = make_plan(config, work), device.type == "cuda"
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(config, device)
    speed = matrix_speed(device, resolve_precision(config) == "bf16-mixed")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # random weights were made in float32
    seconds = train_steps(model, made_batch(model, work).to(device), config, own)
    host = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries)
    print(f"{config.model.name}, {torch.cuda.get_device_name() if on_gpu else 'CPU'}, {resolve_precision(config)}")
    report(plan, seconds, work, speed, torch.cuda.max_memory_allocated() if on_gpu else host)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench_train.py: {error}")
