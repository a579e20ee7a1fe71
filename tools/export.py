"""Write a run as a folder that describes itself: what `ckpt=`, eval.py and predict.py load.

    python tools/export.py RUN OUT [--dtype bfloat16|float32] [--keep-lora] [--language-model]

OUT holds manifest.json (versions, hashes, largest logit differences), config.yaml, vocabulary/, decoder/ and the
weights in safetensors. LoRA is merged in float32 before the cast; OUT/adapter is the adapter as plain peft loads it.
--keep-lora does not merge; --language-model adds the language model alone as a plain transformers folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from vistallm.model.checkpoint import load_run, save_exported
from vistallm.model.vistallm import VistaLLM
from vistallm.train.plan import Workload, made_batch


@torch.inference_mode()
def probe_logits(model: VistaLLM) -> Tensor:
    """Logits (1, T, V) float32 of a fixed prompt over a fixed noise image."""
    batch = made_batch(model, Workload(1, 1, model.tokenizer.tokens + 24, 0, 8))
    return model.decoder(inputs_embeds=model.input_embeddings(batch)).logits.float()


def export(
    run: str, out: Path, dtype: torch.dtype, merge: bool = True, language_model: bool = False
) -> dict[str, float]:
    """Write the newest checkpoint of `run` to the new folder `out`; the largest logit difference by cause.

    Raises:
        ValueError: `out` exists already, or the run can't be loaded.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; expected the name of a new folder")
    model, config, checkpoint = load_run(run, dtype=torch.float32)
    before, differences = probe_logits(model), dict[str, float]()
    out.mkdir(parents=True)
    lora = config.train.decoder == "lora"
    if lora:
        model.decoder.save_pretrained(out / "adapter")
    if lora and merge:
        model.decoder = model.decoder.merge_and_unload()
        config.train.decoder = "full"
    merged = probe_logits(model)
    differences["merge"] = (merged - before).abs().max().item()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    differences["dtype"] = (probe_logits(model) - merged).abs().max().item()
    if language_model:
        plain = model.base_decoder().to(dtype)
        plain.save_pretrained(out / "language_model")
        model.vocabulary.lm.save_pretrained(out / "language_model")
        plain.float()
    step = re.search(r"step-(\d+)", checkpoint.name)
    facts = {"step": int(step[1]) if step else None, "merged": lora and merge}
    save_exported(model, config, out, dtype, **facts, largest_logit_difference=differences)
    return differences


def main(argv: list[str]) -> None:
    """Export, load the result again, and say how far its logits are from the run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep-lora", action="store_true", help="do not merge LoRA into the weights")
    parser.add_argument("--language-model", action="store_true", help="also write OUT/language_model for transformers")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    differences = export(arguments.run, arguments.out, dtype, not arguments.keep_lora, arguments.language_model)
    load_run(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB; largest logit difference: {differences}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"export.py: {error}")
