"""A configuration -> what a run costs: parameters, arithmetic and memory by part, without weights and without a GPU.

The three parts are built as shapes alone (PyTorch's fake tensors) and run forward and backward: operations are those
that Lightning's measure_flops counts (matrix products, convolutions, attention; a product of m x k by k x n is 2mkn),
activations are the tensors that autograd saves. So frozen parts, LoRA and checkpointing cost what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vistallm.config import Config
from vistallm.data.vocabulary import IMAGE_TOKENS
from vistallm.links import LINKS, link_tokens
from vistallm.links.targets import links_to_find
from vistallm.model.build import build_links
from vistallm.model.encoder import ImageEncoder
from vistallm.model.language_model import add_lora, llama_config
from vistallm.model.qformer import Tokenizer, build_tokenizer
from vistallm.model.vistallm import VistaLLM
from vistallm.regions.codec import RegionCodec
from vistallm.schema import IGNORE_INDEX, Batch

GIB = 2**30
VICUNA_ROWS, BERT_ROWS = 32000, 30523  # of the pretrained vocabularies (InstructBLIP's BERT has one token more)
EFFICIENCY = 0.4  # share of the peak that training reaches: a guess until `tools/bench.py train` has measured it
RUNTIME = 1.5 * GIB  # CUDA context, kernels and the allocator's gaps: a usual figure, not computed


class Gpu(NamedTuple):
    """One accelerator by its maker's data sheet."""

    memory: float  # GiB
    peak: float  # dense bf16 operations per second


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
    """One micro-batch of one GPU."""

    samples: int
    images: int  # of all samples
    tokens: int  # of one sample's sequence, image slots and answer included
    supervised: int  # answer tokens of one sample: the LM head runs on them alone
    instruction: int  # tokens that the QFormer reads per image


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
    """One of encoder, tokenizer, decoder and links."""

    name: str
    state: str  # trained, lora or frozen
    parameters: int
    trainable: int
    unit: int  # parameters of its largest layer, which FSDP gathers at once
    outside: int  # parameters of no layer, gathered for the whole step
    layers: int
    forward: float  # operations of one micro-batch
    backward: float
    saved: float  # bytes of activations that autograd keeps
    saved_outside: float  # those of them that are outside of layers
    kept: float  # bytes of the layers' inputs, all that checkpointing keeps of layers

    def activations(self, checkpointing: bool) -> float:
        """Peak bytes: all that is saved, or the layers' inputs and what one layer saves while it is recomputed."""
        if not checkpointing or not self.backward or self.name == "encoder":  # its layers are not checkpointed
            return self.saved
        return self.kept + self.saved_outside + (self.saved - self.saved_outside) / self.layers


@dataclass
class Plan:
    """Cost of one micro-batch on each device."""

    parts: list[Part]
    checkpointing: bool
    host: float = 0.0  # bytes per device that train.cpu_offload keeps in host memory
    memory: dict[str, float] = field(default_factory=dict)  # bytes per device by what they hold

    @property
    def model_operations(self) -> float:
        """Forward and backward operations: what MFU counts."""
        return sum(part.forward + part.backward for part in self.parts)

    @property
    def operations(self) -> float:
        """All operations: checkpointing repeats the forward pass of the parts that gradients pass through."""
        repeated = (part.forward for part in self.parts if part.backward and part.name != "encoder")
        return self.model_operations + (sum(repeated) if self.checkpointing else 0.0)


def make_plan(config: Config, work: Workload, gpus: int = 1) -> Plan:
    """Return the cost of a configuration; `strategy=fsdp` shards weights, gradients and optimizer over `gpus`.

    The vocabularies are Vicuna's and BERT's with the region tokens, also for mini (whose own are far smaller).
    """
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            modules = build_parts(config)
        with FakeTensorMode():
            for module in modules:
                _make_fake(module)
            parts = _measure_parts(config, work, *modules)
    finally:
        torch.set_default_dtype(default)
    if config.model.links != "none":
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(_measure_links(config, work, modules[0]))
    plan = Plan(parts, config.train.activation_checkpointing)
    plan.memory = _memory(config, plan, gpus)
    return plan


def build_parts(config: Config) -> tuple[ImageEncoder, Tokenizer, Any]:
    """Build encoder, tokenizer and decoder with random weights and their trainable sets, on the current device."""
    model, train = config.model, config.train
    linked = model.links != "none"
    read = config.links.blocks if linked else ()
    encoder = ImageEncoder(replace(model.encoder, weights=None), model.tokenizer.class_token, read)
    words, width = len(RegionCodec(coords=config.coords, num_bins=config.num_bins).tokens), model.decoder.hidden_size
    rows = BERT_ROWS + words
    tokenizer = build_tokenizer(model.tokenizer, rows, encoder.tokens, encoder.width, width, model.video)
    rows = VICUNA_ROWS + len(IMAGE_TOKENS) + words + (len(link_tokens(config.links)) if linked else 0)
    decoder: Any = AutoModelForCausalLM.from_config(llama_config(model.decoder, rows), attn_implementation="sdpa")
    if train.decoder == "lora":
        decoder = add_lora(decoder, model.decoder, list(range(VICUNA_ROWS, rows)))
    else:
        decoder.requires_grad_(train.decoder == "full")
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


def _measure_parts(
    config: Config, work: Workload, encoder: ImageEncoder, tokenizer: Tokenizer, decoder: Any
) -> list[Part]:
    """Run each part alone, its inputs with a gradient where one has to pass to an earlier part."""
    train = config.train
    images = torch.zeros(work.images, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    patch_tokens = torch.zeros(work.images, encoder.tokens, encoder.width, requires_grad=train.encoder)
    ids = torch.zeros(work.images, work.instruction, dtype=torch.long)
    mask = torch.ones_like(ids)
    earlier = train.encoder or train.tokenizer
    inputs = torch.zeros(work.samples, work.tokens, config.model.decoder.hidden_size, requires_grad=earlier)
    llama = decoder.get_base_model() if train.decoder == "lora" else decoder
    written, read = work.samples * work.tokens, work.images * (config.model.tokenizer.queries + work.instruction)

    def answer() -> Tensor:  # as VistaLLM.forward: the LM head on supervised positions alone
        hidden = llama.model(inputs_embeds=inputs).last_hidden_state[:, : work.supervised].flatten(0, 1)
        logits = decoder.get_output_embeddings()(hidden).float()
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    return [
        measure("encoder", encoder, encoder.blocks, lambda: encoder(images), work.images * encoder.tokens),
        measure("tokenizer", tokenizer, tokenizer.layers, lambda: tokenizer(patch_tokens, ids, mask), read),
        measure("decoder", decoder, llama.model.layers, answer, written),
    ]


def _measure_links(config: Config, work: Workload, encoder: ImageEncoder) -> Part:
    """Run the link decoder, which is small, on one link per sample; its shapes depend on values, so on real tensors."""
    width, side = config.model.decoder.hidden_size, config.links.image_size or encoder.image_size
    decoder, regions = build_links(config, encoder)
    module = nn.ModuleList([decoder, regions]).requires_grad_(config.train.links)
    rows = list(range(work.samples))
    links = links_to_find([LINKS.index("GRD")] * len(rows), rows, rows, side // 2)
    states = torch.zeros(len(rows), config.links.queries, width, requires_grad=config.train.decoder != "frozen")
    features = [torch.zeros(len(rows), encoder.patches, encoder.width) for _ in encoder.read]
    pixels = torch.zeros(len(rows), 3, side, side)

    def find() -> Tensor:
        families = decoder(states, links, features, pixels)
        groups = torch.arange(len(rows))
        query = torch.arange(config.links.queries).expand(config.links.layers, len(rows), -1)
        masks = families[0].masks(groups, query).float().sum()
        return sum((t.float().sum() for one in families for t in (one.scores, one.boxes)), masks)

    return measure("links", module, decoder.layers, find, len(rows) * (config.links.queries + 1))


def measure(
    name: str, module: nn.Module, layers: Iterable[nn.Module], run: Callable[[], Tensor], positions: int
) -> Part:
    """Run a part forward and, where anything needs a gradient, backward; count operations and saved bytes.

    positions: of the input of each layer, whose width is that of its first norm.
    """
    layers = list(layers) or [module]
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved: dict[int, tuple[int, bool]] = {}  # storage -> bytes, whether inside of a layer
    entered: list[nn.Module] = []  # the layer that computes

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, (storage.nbytes(), bool(entered)))
        return tensor

    hooks = [layer.register_forward_pre_hook(lambda module, _: entered.append(module)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: entered.clear()) for layer in layers]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = measure_flops(module, run)
    for hook in hooks:
        hook.remove()
    backward = measure_flops(module, run, torch.sum) - forward if saved else 0
    trainable = [p for p in module.parameters() if p.requires_grad]
    state = "frozen" if not trainable else "trained" if len(trainable) == len(list(module.parameters())) else "lora"
    sizes = [_count(layer.parameters()) for layer in layers]
    width = next(p.shape[0] for p in layers[0].parameters() if p.ndim == 1)
    return Part(
        name=name,
        state=state,
        parameters=_count(module.parameters()),
        trainable=_count(trainable),
        unit=max(sizes),
        outside=_count(module.parameters()) - sum(sizes),
        layers=len(layers),
        forward=forward,
        backward=backward,
        saved=sum(size for size, _ in saved.values()),
        saved_outside=sum(size for size, in_layer in saved.values() if not in_layer),
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
            # Two layers in bf16 (one computes, the next arrives) and one's gradients in fp32; what belongs to no layer
            # (word embeddings, LM head) is one more unit, which stays gathered.
            layer = max(layer, (8 if part.trainable else 4) * part.unit)
            memory["gathered layers"] += (6 if part.trainable else 2) * part.outside
        elif part.trainable:
            memory["gathered layers"] += 2 * part.trainable  # autocast's bf16 copies of fp32 weights
    memory["gathered layers"] += layer
    if config.strategy == "fsdp" and config.train.cpu_offload:
        plan.host = sum(memory.pop(what) for what in ("weights", "gradients", "optimizer"))
    return memory | {"runtime": RUNTIME}
