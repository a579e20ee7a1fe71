"""Plan a run: memory per GPU by part, whether it fits and what to change, step time and days; nothing is loaded.

    python tools/plan.py model=vicuna-7b gpus=8 gpu=a100-80g strategy=fsdp [stage=2] [any.key=value ...]

Its own keys: gpus, gpu, samples (per epoch), epochs, batch (samples of all GPUs per step; default: what the config
gives), tokens, supervised, images, instruction (means of one sample; `train.py ... dry_run=true` measures them on your
shards; with model.video images is data.frames), efficiency (share of the GPU's peak that training reaches; a guess
until `bench.py train` measures yours).
"""

from __future__ import annotations

import sys
from typing import Any

from vistallm.config import Config, load_config
from vistallm.train.plan import EFFICIENCY, GIB, GPUS, Workload, make_plan

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
    """What to change where a run does not fit, the cheapest first."""
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


def main(words: list[str]) -> int:
    """Print the plan; 1 when it does not fit."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own, config = read_words(words)
    gpus, gpu, size = own["gpus"], GPUS[own["gpu"]], config.data.batch_size
    video = config.model.video != "none"
    images = own["images"] or (config.data.frames if video else 2.5 if config.stage == 2 else 1.0)
    tokens = own["tokens"] or round(FIXED_TOKENS + (config.model.tokenizer.queries + 4) * images)
    plan = make_plan(config, Workload(size, round(size * images), tokens, own["supervised"], own["instruction"]), gpus)
    print(f"stage {config.stage}, {config.model.name}, strategy={config.strategy}, {gpus} x {own['gpu']}")
    print(
        f"one GPU, one micro-batch: {size} samples of {tokens} tokens, {own['supervised']} supervised, {images} images"
    )
    print(
        f"\n{'part':<10}{'state':<9}{'parameters':>15}{'train':>15}{'forward':>10}{'backward':>10}{'activations':>13}"
    )
    for part in plan.parts:
        kept = part.activations(plan.checkpointing) / GIB
        print(f"{part.name:<10}{part.state:<9}{part.parameters:>15,}{part.trainable:>15,}", end="")
        print(f"{part.forward / 1e12:>8.2f} T{part.backward / 1e12:>8.2f} T{kept:>9.2f} GiB")
    used = {name: value / GIB for name, value in plan.memory.items()}
    total = sum(used.values())
    print("", *(f"{name:<16}{value:>8.2f} GiB" for name, value in used.items()), sep="\n")
    print(f"{'total':<16}{total:>8.2f} GiB of {gpu.memory:.0f}: {'fits' if total <= gpu.memory else 'does NOT fit'}")
    if plan.host:
        print(f"{'host, per GPU':<16}{plan.host / GIB:>8.2f} GiB of weights, gradients and optimizer state")
    if total > gpu.memory:
        print(f"does not fit: {advice(config, gpus)}")
    done, share = own["batch"] or size * gpus, own["efficiency"]
    step = plan.operations / (gpu.peak * share) * done / (size * gpus)
    steps, mfu = own["samples"] * own["epochs"] / done, share * plan.model_operations / plan.operations
    print(
        f"\ncost model: {plan.operations / 1e12:.1f} T operations a micro-batch, {plan.model_operations / 1e12:.1f} T"
    )
    print(f"counted by MFU, at {share:.0%} of {gpu.peak / 1e12:.0f} T/s (MFU {mfu:.0%}); communication hidden")
    print(f"{done} samples a step in {step:.2f} s; ", end="")
    print(f"{own['epochs']} epoch(s) in {steps:,.0f} steps: {step * steps / 86400:.2f} days")
    return int(total > gpu.memory)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"plan.py: {error}")
