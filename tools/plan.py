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
OWN: dict[str, Any] = {"gpus": 8, "gpu": "a100-80g", "samples": 6_800_000, "epochs": 1, "batch": 0, "tokens": 0}
OWN |= {"supervised": 64, "images": 0.0, "instruction": 32, "efficiency": EFFICIENCY}
FIXED_TOKENS = 136


def read_words(words: list[str]) -> tuple[dict[str, Any], Config]:
    """Split the words into the planner's own settings and a run's configuration; raises ValueError."""
    own, rest = dict(OWN), []
    for word in words:
        key, _, value = word.partition("=")
        if key not in OWN:
            rest.append(word)
            continue
        try:
            own[key] = type(OWN[key])(value)
        except ValueError as error:
            raise ValueError(f"{word}: expected {key}=<{type(OWN[key]).__name__}>") from error
    fitting = [name for name in GPUS if own["gpu"] in (name, name.partition("-")[0])]
    if len(fitting) != 1:
        raise ValueError(f"gpu={own['gpu']}: expected one of {', '.join(fitting or GPUS)}")
    if own["gpus"] < 1 or not 0 < own["efficiency"] <= 1:
        raise ValueError("expected gpus >= 1 and efficiency in (0, 1]")
    return own | {"gpu": fitting[0]}, load_config(rest)


def advice(config: Config, gpus: int) -> str:
    """What to change, the cheapest first."""
    size, sharded = config.data.batch_size, config.strategy == "fsdp"
    steps = {
        "train.activation_checkpointing=true": not config.train.activation_checkpointing,
        f"data.batch_size={size // 2} with twice trainer.accumulate_grad_batches": size > 1,
        "strategy=fsdp": not sharded and gpus > 1,
        "train.decoder=lora": config.train.decoder == "full",
        "train.cpu_offload=true (slower: the optimizer runs on the CPU)": sharded and not config.train.cpu_offload,
        "more GPUs (fsdp shards over all of them) or larger ones": True,
    }
    return "; ".join(step for step, possible in steps.items() if possible)


def print_memory(plan: Plan, limit: float) -> bool:
    """Print cost by part and GiB per GPU by what holds them; whether they fit."""
    print(
        f"\n{'part':<10}{'state':<9}{'parameters':>15}{'train':>15}{'forward':>10}{'backward':>10}{'activations':>13}"
    )
    for part in plan.parts:
        operations = f"{part.forward / 1e12:>8.2f} T{part.backward / 1e12:>8.2f} T"
        kept = part.activations(plan.checkpointing) / GIB
        print(f"{part.name:<10}{part.state:<9}{part.parameters:>15,}{part.trainable:>15,}{operations}{kept:>9.2f} GiB")
    print()
    for name, used in plan.memory.items():
        print(f"{name:<16}{used / GIB:>8.2f} GiB")
    total = sum(plan.memory.values()) / GIB
    print(f"{'total':<16}{total:>8.2f} GiB of {limit:.0f}: {'fits' if total <= limit else 'does NOT fit'}")
    if plan.host:
        print(f"{'host, per GPU':<16}{plan.host / GIB:>8.2f} GiB of weights, gradients and optimizer state")
    return total <= limit


def print_time(plan: Plan, own: dict[str, Any], batch: int) -> None:
    """Print step time and days under the stated efficiency; `batch` is one micro-batch of all GPUs."""
    peak, done = GPUS[own["gpu"]].peak, own["batch"] or batch
    step = plan.operations / (peak * own["efficiency"]) * done / batch
    steps, mfu = own["samples"] * own["epochs"] / done, own["efficiency"] * plan.model_operations / plan.operations
    counted = f"{plan.operations / 1e12:.1f} T operations a micro-batch, {plan.model_operations / 1e12:.1f} T"
    print(f"\ncost model: {counted}\ncounted by MFU, at {own['efficiency']:.0%} of {peak / 1e12:.0f} T/s ", end="")
    print(f"(MFU {mfu:.0%}); communication hidden\n{done} samples a step in {step:.2f} s; ", end="")
    print(f"{own['epochs']} epoch(s) in {steps:,.0f} steps: {step * steps / 86400:.2f} days")


def main(words: list[str]) -> int:
    """Print the plan; 1 when it does not fit."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own, config = read_words(words)
    images, size = own["images"] or (2.5 if config.stage == 2 else 1.0), config.data.batch_size
    tokens = own["tokens"] or round(FIXED_TOKENS + (config.model.tokenizer.queries + 4) * images)
    plan = make_plan(
        config, Workload(size, round(size * images), tokens, own["supervised"], own["instruction"]), own["gpus"]
    )
    print(f"stage {config.stage}, {config.model.name}, strategy={config.strategy}, {own['gpus']} x {own['gpu']}")
    counts = f"{size} samples of {tokens} tokens, {own['supervised']} supervised, {images} images"
    print(f"one GPU, one micro-batch: {counts}")
    fits = print_memory(plan, GPUS[own["gpu"]].memory)
    if not fits:
        print(f"does not fit: {advice(config, own['gpus'])}")
    print_time(plan, own, size * own["gpus"])
    return 0 if fits else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"plan.py: {error}")
