"""Write a run as a folder that describes itself: what `ckpt=`, eval.py and predict.py load.

    python tools/export.py --ckpt RUN --out DIR [--dtype bfloat16|float32] [--keep-lora] [--language-model]

DIR holds manifest.json (versions, hashes, largest logit differences), config.yaml, vocabulary/, decoder/ and the
weights in safetensors. LoRA is merged in float32 before the cast; DIR/adapter is the adapter as plain peft loads it.
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


def export(ckpt: str, out: Path, dtype: torch.dtype, merge: bool = True, language_model: bool = False) -> dict:
    """Write the newest checkpoint of a run to the new folder `out`; return the largest logit difference by cause."""
    if out.exists():
        raise ValueError(f"--out {out}: exists already; expected the name of a new folder")
    model, config, checkpoint = load_run(ckpt, dtype=torch.float32)
    original, lora = probe_logits(model), config.train.decoder == "lora"
    out.mkdir(parents=True)
    if lora:
        model.decoder.save_pretrained(out / "adapter")
    if lora and merge:
        model.decoder = model.decoder.merge_and_unload()
        config.train.decoder = "full"
    merged = probe_logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    rounded = (probe_logits(model) - merged).abs().max().item()
    differences = {"merge": (merged - original).abs().max().item(), "dtype": rounded}
    if language_model:
        plain = model.base_decoder().to(dtype)
        if links := sorted({number for link in model.vocabulary.link_ids for number in link}):
            plain.generation_config.suppress_tokens = links  # alone it can't read what links find
        plain.save_pretrained(out / "language_model")
        model.vocabulary.lm.save_pretrained(out / "language_model")
        plain.float()
    step = re.search(r"step-(\d+)", checkpoint.name)
    facts = {"step": int(step[1]) if step else None, "merged": lora and merge}
    save_exported(model, config, out, dtype, **facts, largest_logit_difference=differences)
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint file")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep-lora", action="store_true", help="do not merge LoRA into the weights")
    parser.add_argument("--language-model", action="store_true", help="also write DIR/language_model for transformers")
    words = parser.parse_args()
    try:
        differences = export(
            words.ckpt, words.out, getattr(torch, words.dtype), not words.keep_lora, words.language_model
        )
        load_run(words.out)
    except ValueError as error:
        sys.exit(f"export.py: {error}")
    print(f"{words.out}: largest logit difference: {differences}")
