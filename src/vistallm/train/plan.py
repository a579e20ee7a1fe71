"""A configuration -> what a run costs: parameters, arithmetic and memory by part, without weights and without a GPU.

The three parts are built as shapes alone (PyTorch's fake tensors) and run forward and backward once: operations are
those that PyTorch's FlopCounterMode counts (matrix products, convolutions, attention; a product of m x k by k x n is
2mkn), activations are the tensors that autograd saves. So frozen parts, LoRA and checkpointing cost what they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from vistallm.config import Config
from vistallm.data.vocabulary import IMAGE_TOKENS
from vistallm.model.encoder import ImageEncoder
from vistallm.model.language_model import add_lora
from vistallm.model.qformer import Tokenizer, build_tokenizer
from vistallm.model.vistallm import VistaLLM
from vistallm.regions.codec import RegionCodec
from vistallm.schema import IGNORE_INDEX, Batch

GIB = 2**30
VICUNA_ROWS, BERT_ROWS = 32000, 30523  # of the pretrained vocabularies (InstructBLIP's BERT has one token more)
EFFICIENCY = 0.4  # share of the peak that training reaches: a guess until `tools/bench.py train` has measured it
RUNTIME = 1.5 * GIB  # CUDA context, kernels and the allocator's gaps: a usual figure, not computed


@dataclass(frozen=True)
class Gpu:
    """One accelerator by its maker's data sheet: memory in GiB, dense bf16 operations per second."""

    memory: float
    peak: float


GPUS = {
    "a100-40g": Gpu(40, 312e12),
    "a100-80g": Gpu(80, 312e12),
    "h100-80g": Gpu(80, 989e12),
    "h200-141g": Gpu(141, 989e12),
    "l40s-48g": Gpu(48, 362e12),
    "rtx4090-24g": Gpu(24, 165e12),
}


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one GPU.

    samples; images: in all of them; tokens: of one sample's sequence, image slots and answer included; supervised:
    answer tokens of one sample (the LM head runs on them alone); instruction: tokens that the QFormer reads per image.
    """

    samples: int
    images: int
    tokens: int
    supervised: int
    instruction: int


def made_batch(model: VistaLLM, work: Workload) -> Batch:
    """Return a batch of that size for `model`: image slots, then random words, the last of them supervised."""
    slots = model.tokenizer.tokens * (work.images // work.samples)
    if work.tokens < slots + work.supervised + 1:
        raise ValueError(f"tokens={work.tokens}: expected room for {slots} image slots and {work.supervised} words")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.vocabulary.first_new, (work.samples, work.tokens), generator=random)
    ids[:, :slots] = model.vocabulary.image_id
    words = (work.samples, work.instruction)
    instruction = torch.randint(5, model.vocabulary.qformer_first_new, words, generator=random)
    pixels = (work.images, 3, model.encoder.image_size, model.encoder.image_size)
    return Batch(
        input_ids=ids,
        labels=ids.masked_fill(torch.arange(work.tokens) < work.tokens - work.supervised, IGNORE_INDEX),
        attention_mask=torch.ones_like(ids),
        instruction_ids=instruction,
        instruction_mask=torch.ones_like(instruction),
        images=torch.randint(256, pixels, dtype=torch.uint8, generator=random),
        image_owner=torch.arange(work.samples).repeat_interleave(work.images // work.samples),
        ids=[str(number) for number in range(work.samples)],
        tasks=["res"] * work.samples,
    )


@dataclass
class Part:
    """One of encoder, tokenizer and decoder.

    state: "trained", "lora" or "frozen"; parameters, trainable; unit: parameters of its largest layer (what FSDP
    gathers at once); outside: those of no layer (gathered for the whole step); layers; forward, backward: operations
    of one micro-batch; saved: bytes of activations that autograd keeps; kept: bytes that it keeps under activation
    checkpointing (the layers' inputs).
    """

    name: str
    state: str
    parameters: int
    trainable: int
    unit: int
    outside: int
    layers: int
    forward: float
    backward: float
    saved: float
    kept: float

    def activations(self, checkpointing: bool) -> float:
        """Peak bytes: all that is saved, or the layers' inputs and one layer's worth that is being recomputed."""
        return self.kept + self.saved / self.layers if checkpointing and self.backward else self.saved


@dataclass
class Plan:
    """Cost of one micro-batch on each of `gpus` devices.

    memory: bytes per device by what they hold; host: bytes per device that train.cpu_offload keeps in host memory.
    """

    parts: list[Part]
    checkpointing: bool
    host: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def model_operations(self) -> float:
        """Forward and backward operations: what MFU counts."""
        return sum(part.forward + part.backward for part in self.parts)

    @property
    def operations(self) -> float:
        """All operations: checkpointing repeats the forward pass of the parts that gradients pass through."""
        repeated = sum(part.forward for part in self.parts if part.backward) if self.checkpointing else 0.0
        return self.model_operations + repeated


def make_plan(config: Config, work: Workload, gpus: int = 1) -> Plan:
    """Return the cost of a configuration; `strategy=fsdp` shards weights, gradients and optimizer over `gpus`.

    The vocabularies are Vicuna's and BERT's with the region tokens, also for mini (whose own are far smaller).
    """
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            modules = _modules(config)
        with FakeTensorMode():
            for module in modules:
                _make_fake(module)
            parts = _parts(config, work, *modules)
    finally:
        torch.set_default_dtype(default)
    plan = Plan(parts, config.train.activation_checkpointing)
    plan.memory = _memory(config, plan, gpus)
    return plan


def _modules(config: Config) -> tuple[ImageEncoder, Tokenizer, Any]:
    """The three parts with their trainable sets, to be built on the meta device."""
    model, train = copy.deepcopy(config.model), config.train
    model.encoder.weights = None
    encoder = ImageEncoder(model.encoder)
    words = len(RegionCodec(coords=config.coords, num_bins=config.num_bins).tokens)
    instruction_rows, rows = BERT_ROWS + words, VICUNA_ROWS + len(IMAGE_TOKENS) + words
    width = model.decoder.hidden_size
    tokenizer = build_tokenizer(model.tokenizer, instruction_rows, encoder.patches, encoder.width, width)
    decoder = _decoder(config, VICUNA_ROWS, rows)
    return encoder.requires_grad_(train.encoder), tokenizer.requires_grad_(train.tokenizer), decoder


def _make_fake(module: nn.Module) -> None:
    """Replace meta tensors by fake ones of the CPU, where attention runs through the fused kernel as on a GPU."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                part._parameters[name] = made.setdefault(id(weight), fake)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _parts(config: Config, work: Workload, encoder: ImageEncoder, tokenizer: Tokenizer, decoder: Any) -> list[Part]:
    """Run each part alone, its inputs with a gradient where one has to pass to an earlier part."""
    train = config.train
    images = torch.zeros(work.images, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    patch_tokens = torch.zeros(work.images, encoder.patches, encoder.width, requires_grad=train.encoder)
    ids = torch.zeros(work.images, work.instruction, dtype=torch.long)
    mask = torch.ones_like(ids)
    earlier = train.encoder or train.tokenizer
    inputs = torch.zeros(work.samples, work.tokens, config.model.decoder.hidden_size, requires_grad=earlier)
    llama = decoder.get_base_model() if train.decoder == "lora" else decoder
    layers, written = tokenizer.layers, work.samples * work.tokens
    read = work.images * (config.model.tokenizer.queries + work.instruction)
    return [
        _measure("encoder", encoder, encoder.blocks, lambda: encoder(images), work.images * encoder.patches),
        _measure("tokenizer", tokenizer, layers, lambda: tokenizer(patch_tokens, ids, mask), read),
        _measure("decoder", decoder, llama.model.layers, lambda: _answer_loss(decoder, llama, inputs, work), written),
    ]


def _decoder(config: Config, old_rows: int, rows: int) -> Any:
    shape = config.model.decoder
    llama = LlamaConfig(
        vocab_size=rows,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tie_embeddings,
    )
    llama._attn_implementation = "sdpa"
    decoder: Any = LlamaForCausalLM(llama)
    if config.train.decoder == "lora":
        return add_lora(decoder, shape, list(range(old_rows, rows)))
    return decoder.requires_grad_(config.train.decoder == "full")


def _answer_loss(decoder: Any, llama: Any, inputs: Tensor, work: Workload) -> Tensor:
    """The decoder as VistaLLM.forward runs it: the LM head on supervised positions alone."""
    hidden = llama.model(inputs_embeds=inputs).last_hidden_state[:, : work.supervised].flatten(0, 1)
    logits = decoder.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def _measure(
    name: str, module: nn.Module, layers: Iterable[nn.Module], run: Callable[[], Tensor], positions: int
) -> Part:
    """Run a part forward and, where anything needs a gradient, backward; count operations and saved bytes."""
    layers = list(layers) or [module]
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    backward = FlopCounterMode(display=False)
    if output.requires_grad:
        with backward:
            output.sum().backward()
    trainable = [p for p in module.parameters() if p.requires_grad]
    state = "frozen" if not trainable else "trained" if len(trainable) == len(list(module.parameters())) else "lora"
    sizes = [_count(layer.parameters()) for layer in layers]
    width = next(p.shape[0] for p in layers[0].parameters() if p.ndim == 1)  # of its first norm
    return Part(
        name=name,
        state=state,
        parameters=_count(module.parameters()),
        trainable=_count(trainable),
        unit=max(sizes),
        outside=_count(module.parameters()) - sum(sizes),
        layers=len(layers),
        forward=forward.get_total_flops(),
        backward=backward.get_total_flops() if output.requires_grad else 0,
        saved=float(sum(saved.values())),
        kept=2.0 * positions * width * len(layers),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _memory(config: Config, plan: Plan, gpus: int) -> dict[str, float]:
    """Bytes per GPU: fp32 weights, gradients and Adam's moments of what trains, bf16 weights of what is frozen."""
    shards = gpus if config.strategy == "fsdp" else 1
    memory = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "gathered layers": 0.0, "activations": 0.0}
    layer = 0.0
    for part in plan.parts:
        frozen = part.parameters - part.trainable
        memory["weights"] += (4 * part.trainable + 2 * frozen) / shards
        memory["gradients"] += 4 * part.trainable / shards
        memory["optimizer"] += 8 * part.trainable / shards
        memory["activations"] += part.activations(plan.checkpointing)
        if config.strategy == "fsdp":
            # Two layers in bf16 (one computes, the next arrives) and one layer's gradients on their way, in fp32; what
            # belongs to no layer (word embeddings, LM head) is one more unit, which stays gathered.
            layer = max(layer, (8 if part.trainable else 4) * part.unit)
            memory["gathered layers"] += (6 if part.trainable else 2) * part.outside
        elif part.trainable:
            memory["gathered layers"] += 2 * part.trainable  # autocast's bf16 copies of fp32 weights
    memory["gathered layers"] += layer
    if config.strategy == "fsdp" and config.train.cpu_offload:
        plan.host = sum(memory.pop(what) for what in ("weights", "gradients", "optimizer"))
    return memory | {"runtime": RUNTIME}
