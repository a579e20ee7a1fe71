"""Answer with the exported language model alone: images and prompt become embeddings, as serving engines take them.

    python tools/export.py --ckpt assets/mini --out my-model --dtype float32 --language-model
    python examples/prompt_embeds.py my-model a.jpg "Segment the red star." [prompt_embeds.pt]

The encoder and the image tokenizer run here; what they give is a tensor (T, C) of input embeddings. Any program that
takes embeddings as a prompt then runs the language model: transformers below, or a serving engine, which loads
my-model/language_model and gets the file prompt_embeds.pt.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vistallm import VistaLLM


def main(folder: str, image: str, prompt: str, out: str | None = None) -> None:
    """Print the answer of the language model alone, and whether it equals VistaLLM's own without grammar."""
    model = VistaLLM.from_pretrained(folder, device="cpu", dtype=torch.float32)
    embeddings = model.prompt_embeddings(image, prompt)
    if out:
        torch.save(embeddings, out)
    text = AutoTokenizer.from_pretrained(f"{folder}/language_model")
    decoder = AutoModelForCausalLM.from_pretrained(f"{folder}/language_model", dtype=torch.float32)
    ids = decoder.generate(
        inputs_embeds=embeddings[None],
        attention_mask=torch.ones(1, len(embeddings), dtype=torch.long),
        max_new_tokens=128,
        do_sample=False,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )[0]
    answer = text.decode(ids, skip_special_tokens=False).removesuffix(str(text.eos_token)).strip()
    print(answer)
    same = answer == model.predict(image, prompt).raw
    print("the same as VistaLLM's" if same else "not VistaLLM's: there a grammar holds, and bins count together")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what tools/export.py --language-model wrote")
    parser.add_argument("image")
    parser.add_argument("prompt")
    parser.add_argument("out", nargs="?", help="write the embeddings here")
    main(**vars(parser.parse_args()))
