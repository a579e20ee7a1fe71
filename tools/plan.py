"""Plan a run: memory per GPU by part, whether it fits and what to change, step time and days; nothing is loaded.

    python tools/plan.py model=vicuna-7b gpus=8 gpu=a100-80g strategy=fsdp [stage=2] [any.key=value ...]

Its own keys: gpus, gpu, samples (per epoch), epochs, batch (samples of all GPUs per step; default: what the config
gives), tokens, supervised, images, instruction (means of one sample; `train.py ... dry_run=true` measures them on your
shards), efficiency (share of the GPU's peak that training reaches; a guess until `bench.py train` measures yours).
"""

from __future__ import annotations

import sys
from typing import Any

from vistallm.config import Config, load_config
from vistallm.train.plan import EFFICIENCY, GIB, GPUS, Plan, Workload, make_plan

# samples: CoinIt (paper). tokens: 32 slots and 4 marks per image; system prompt, instruction and answer are a guess.
OWN: dict[str, Any] = {
    "gpus": 8,
    "gpu": "a100-80g",
    "samples": 6_800_000,
    "epochs": 1,
    "batch": 0,
    "tokens": 0,
    "supervised": 64,
    "images": 0.0,
    "instruction": 32,
    "efficiency": EFFICIENCY,
}
FIXED_TOKENS = 136


def read_words(argv: list[str]) -> tuple[dict[str, Any], Config]:
    """Split the words into the planner's own settings and a run's configuration; raises ValueError."""
    own, rest = dict(OWN), []
    for word in argv:
        key, _, value = word.partition("=")
        if key not in OWN:
            rest.append(word)
            continue
        try:
            own[key] = type(OWN[key])(value)
        except ValueError as error:
            raise ValueError(f"{word}: expected {key}=<{type(OWN[key]).__name__}>") from error
    if own["gpu"] not in GPUS:
        raise ValueError(f"gpu={own['gpu']}: expected one of {', '.join(GPUS)}")
    if own["gpus"] < 1 or not 0 < own["efficiency"] <= 1:
        raise ValueError("expected gpus >= 1 and efficiency in (0, 1]")
    return own, load_config(rest)


def main(argv: list[str]) -> int:
    """Print the plan; 1 when it does not fit."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    own, config = read_words(argv)
    images = own["images"] or (2.5 if config.stage == 2 else 1.0)
    size = config.data.batch_size
    tokens = own["tokens"] or round(FIXED_TOKENS + (config.model.tokenizer.queries + 4) * images)
    work = Workload(size, round(size * images), tokens, own["supervised"], own["instruction"])
    plan = make_plan(config, work, own["gpus"])
    print(f"stage {config.stage}, {config.model.name}, strategy={config.strategy}, {own['gpus']} x {own['gpu']}")
    print(
        f"one GPU, one micro-batch: {size} samples of {tokens} tokens, {own['supervised']} supervised, {images} images"
    )
    print_parts(plan)
    fits = print_memory(plan, GPUS[own["gpu"]].memory)
    if not fits:
        print("does not fit: " + "; ".join(advice(config, own["gpus"])))
    print_time(plan, own, size)
    return 0 if fits else 1


def print_parts(plan: Plan) -> None:
    """Print parameters, operations and activations of each part."""
    print(
        f"\n{'part':<10}{'state':<9}{'parameters':>15}{'train':>15}{'forward':>10}{'backward':>10}{'activations':>13}"
    )
    for part in plan.parts:
        kept = part.activations(plan.checkpointing) / GIB
        operations = f"{part.forward / 1e12:>8.2f} T{part.backward / 1e12:>8.2f} T"
        print(f"{part.name:<10}{part.state:<9}{part.parameters:>15,}{part.trainable:>15,}{operations}{kept:>9.2f} GiB")


def print_memory(plan: Plan, limit: float) -> bool:
    """Print GiB per GPU by what holds them; whether they fit."""
    print()
    for name, used in plan.memory.items():
        print(f"{name:<16}{used / GIB:>8.2f} GiB")
    total = sum(plan.memory.values()) / GIB
    print(f"{'total':<16}{total:>8.2f} GiB of {limit:.0f}: {'fits' if total <= limit else 'does NOT fit'}")
    if plan.host:
        print(f"{'host, per GPU':<16}{plan.host / GIB:>8.2f} GiB of weights, gradients and optimizer state")
    return total <= limit


def advice(config: Config, gpus: int) -> list[str]:
    """What to change, the cheapest first."""
    steps = []
    if not config.train.activation_checkpointing:
        steps.append("train.activation_checkpointing=true")
    if config.data.batch_size > 1:
        steps.append(f"data.batch_size={config.data.batch_size // 2} with twice trainer.accumulate_grad_batches")
    if config.strategy != "fsdp" and gpus > 1:
        steps.append("strategy=fsdp")
    if config.train.decoder == "full":
        steps.append("train.decoder=lora")
    if config.strategy == "fsdp" and not config.train.cpu_offload:
        steps.append("train.cpu_offload=true (slower: the optimizer runs on the CPU)")
    return [*steps, "more GPUs (fsdp shards over all of them) or larger ones"]


def print_time(plan: Plan, own: dict[str, Any], size: int) -> None:
    """Print step time and days under the stated efficiency."""
    peak, gpus = GPUS[own["gpu"]].peak, own["gpus"]
    seconds = plan.operations / (peak * own["efficiency"])
    batch = own["batch"] or size * gpus
    step, steps = seconds * batch / (size * gpus), own["samples"] * own["epochs"] / batch
    mfu = own["efficiency"] * plan.model_operations / plan.operations
    days = step * steps / 86400
    print(
        f"\ncost model: {plan.operations / 1e12:.1f} T operations a micro-batch, {plan.model_operations / 1e12:.1f} T"
    )
    print(f"counted by MFU, at {own['efficiency']:.0%} of {peak / 1e12:.0f} T/s (MFU {mfu:.0%}); communication hidden")
    print(f"{batch} samples a step in {step:.2f} s; {own['epochs']} epoch(s) in {steps:,.0f} steps: {days:.2f} days")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"plan.py: {error}")
