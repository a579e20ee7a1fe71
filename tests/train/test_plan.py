import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vistallm.config import load_config
from vistallm.train.optim import keep_frozen_in_eval
from vistallm.train.plan import GIB, Workload, build_parts, made_batch, make_plan

ROOT = Path(__file__).parents[2]
WORK = Workload(samples=2, images=2, tokens=48, supervised=16, instruction=8)


def mini(*words):
    return load_config(["model=mini", *words])


def by_name(plan):
    return {part.name: part for part in plan.parts}


def test_decoder_operations_match_the_formula():
    config = mini()
    shape = config.model.decoder
    part = by_name(make_plan(config, WORK))["decoder"]
    positions, width = WORK.samples * WORK.tokens, shape.hidden_size
    layer = 4 * width**2 + 3 * width * shape.intermediate_size
    rows = part.parameters - shape.layers * (layer + 2 * width) - width  # tied embedding matrix
    products = 2 * positions * shape.layers * layer + 2 * WORK.samples * WORK.supervised * rows
    attention = 4 * WORK.tokens * positions * width * shape.layers
    assert rows % width == 0
    assert part.forward == products + attention
    assert part.backward >= 2 * part.forward, "gradients of inputs and of weights"


def test_what_is_frozen_costs_no_weight_gradient():
    full, frozen, lora = (
        by_name(make_plan(mini(f"train.decoder={how}", "model.decoder.lora_rank=2"), WORK))["decoder"]
        for how in ("full", "frozen", "lora")
    )
    assert frozen.forward == full.forward
    assert frozen.trainable == 0
    assert frozen.backward < 0.6 * full.backward, "gradients pass through to the tokenizer, but no weight has one"
    assert 0 < lora.trainable < 0.1 * lora.parameters
    assert frozen.backward < lora.backward < full.backward
    encoder = by_name(make_plan(mini(), WORK))["encoder"]
    assert (encoder.state, encoder.backward, encoder.saved) == ("frozen", 0, 0)
    assert by_name(make_plan(mini("train.encoder=true"), WORK))["encoder"].backward > 0


def test_sharding_and_checkpointing_lower_memory():
    plain, sharded = make_plan(mini(), WORK, 4), make_plan(mini("strategy=fsdp"), WORK, 4)
    for key in ("weights", "gradients", "optimizer"):
        assert sharded.memory[key] == pytest.approx(plain.memory[key] / 4)
    few = replace(WORK, supervised=2)  # logits over Vicuna's rows are kept in any case, and outweigh mini's layers
    saving = make_plan(mini("model.links=none", "train.activation_checkpointing=true"), few)
    plain = make_plan(mini("model.links=none"), few)
    assert saving.memory["activations"] < 0.6 * plain.memory["activations"]
    assert saving.operations > saving.model_operations == plain.model_operations == plain.operations


def storages(tensors):
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def saved_bytes(run, module):
    """Bytes of the tensors that autograd keeps for the backward pass of `run`, weights left out."""
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = run()
    weights = storages(module.parameters())
    return sum(size for key, size in storages(kept).items() if key not in weights), output


@pytest.mark.parametrize("words", [("train.decoder=frozen",), (), ("train.decoder=lora", "model.decoder.lora_rank=2")])
def test_activations_are_those_of_a_real_decoder(words):
    """As training runs it: frozen parts in evaluation mode, layers checkpointed; layer inputs and one layer's worth."""
    config = mini(*words, "train.activation_checkpointing=true")
    work = replace(WORK, samples=8, tokens=96)
    part = by_name(make_plan(config, work))["decoder"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoder, tokenizer, decoder = build_parts(config)
    finally:
        torch.set_default_dtype(default)
    llama = decoder.get_base_model() if config.train.decoder == "lora" else decoder
    parts = SimpleNamespace(encoder=encoder, tokenizer=tokenizer, decoder=decoder, links=None, region_encoder=None)
    inputs = torch.zeros(work.samples, work.tokens, config.model.decoder.hidden_size, dtype=torch.bfloat16)
    inputs.requires_grad_()

    def run():
        hidden = llama.model(inputs_embeds=inputs).last_hidden_state[:, : work.supervised].flatten(0, 1)
        logits = decoder.get_output_embeddings()(hidden).float()
        return torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    whole, _ = saved_bytes(run, decoder)
    assert part.activations(False) == pytest.approx(whole, rel=0.15)

    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decoder.train()
    keep_frozen_in_eval(parts)
    calls = []

    def before(norm, args):
        calls.append(args[0].untyped_storage().nbytes())

    for layer in llama.model.layers:
        layer.input_layernorm.register_forward_pre_hook(before)  # hooks of the layer itself are not called again
    outside, output = saved_bytes(run, decoder)
    assert len(calls) == len(llama.model.layers)
    inputs_of_layers = sum(calls)  # bytes
    output.backward()
    assert len(calls) == 2 * len(llama.model.layers), "each layer is computed once more"
    measured = outside + inputs_of_layers + (whole - outside) / len(llama.model.layers)
    assert part.activations(True) == pytest.approx(measured, rel=0.15)
    assert outside < 0.6 * whole, "nothing inside of a layer is kept"


def test_vicuna_7b_has_its_published_size():
    plan = make_plan(load_config(["model=vicuna-7b", "strategy=fsdp"]), WORK, 8)
    parts = by_name(plan)
    assert parts["encoder"].parameters == pytest.approx(1.01e9, rel=0.01), "EVA ViT-g"
    assert parts["decoder"].parameters == pytest.approx(6.74e9, rel=0.01), "Llama 7B"
    assert plan.memory["optimizer"] == pytest.approx(
        8 * (parts["decoder"].trainable + parts["tokenizer"].trainable) / 8
    )
    assert sum(plan.memory.values()) < 40 * GIB


def test_a_video_costs_its_frames_and_what_tells_them_apart():
    work, eight = replace(WORK, tokens=400), replace(WORK, images=16, tokens=400)
    kinds = ("index", "embedding", "attention")
    plain, embedded, mixed = (by_name(make_plan(mini(f"model.video={kind}"), eight)) for kind in kinds)
    width = mini().model.tokenizer.hidden_size
    assert embedded["tokenizer"].parameters - plain["tokenizer"].parameters == 64 * width
    assert mixed["tokenizer"].parameters - embedded["tokenizer"].parameters == 4 * width**2 + 6 * width
    assert plain["encoder"].forward == 8 * by_name(make_plan(mini(), work))["encoder"].forward


def test_offloaded_state_waits_in_host_memory():
    words = ("strategy=fsdp", "train.cpu_offload=true")
    plain, offloaded = make_plan(mini(words[0]), WORK, 2), make_plan(mini(*words), WORK, 2)
    held = {"weights", "gradients", "optimizer"}
    assert offloaded.host == pytest.approx(sum(plain.memory[key] for key in held))
    assert plain.host == 0
    assert plain.memory.keys() - offloaded.memory.keys() == held


def test_a_made_batch_fills_the_workload(tiny_model):
    work = Workload(samples=2, images=4, tokens=20, supervised=5, instruction=8)
    output = tiny_model(made_batch(tiny_model, work))
    assert output.row.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match="tokens=12: expected room for 8 image slots and 5 words"):
        made_batch(tiny_model, replace(work, tokens=12))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["model=vicuna-7b", "gpus=8", "strategy=fsdp"], 0, "GiB of 80: fits"),
        (["model=vicuna-7b", "gpus=1", "gpu=rtx4090-24g"], 1, "does not fit: data.batch_size=4"),
        (["model=mini", "gpu=h100", "gpus=1"], 0, "1 x h100-80g"),
        (["gpu=a100"], None, "gpu=a100: expected one of a100-40g, a100-80g"),
        (["gpu=tpu"], None, "gpu=tpu: expected one of a100-40g"),
        (["gpus=many"], None, "gpus=many: expected gpus=<int>"),
    ],
)
def test_command(words, code, said, capsys):
    plan = runpy.run_path(str(ROOT / "tools/plan.py"))
    if code is None:
        with pytest.raises(ValueError, match=said):
            plan["main"](words)
    else:
        assert plan["main"](words) == code
        assert said in capsys.readouterr().out
