"""Where and how a run computes: Lightning strategy and precision from the config.

FSDP is Lightning's ModelParallelStrategy (FSDP2): clipping there is the ordinary global norm.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from vistallm.config import Config
from vistallm.model.vistallm import VistaLLM

COMPILERS = ("inductor", "aot_eager", "eager")  # backends of torch.compile; the others are to find its faults


class ShardedDataParallel(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with every process of the run in the data dimension of the mesh.

    cpu_offload: parameters, gradients and optimizer state stay in host memory (`shard` puts them there).
    """

    def __init__(self, sharded_checkpoints: bool, cpu_offload: bool) -> None:
        # The gradient norm is then reduced over tensors of the CPU, which NCCL does not take.
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, process_group_backend=backend)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Set the mesh's sizes; "auto" would make the devices of a node tensor-parallel."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def model_to_device(self) -> None:
        """Leave the model where `shard` has put it: Lightning would move offloaded weights to the accelerator."""
        if not self.cpu_offload:
            super().model_to_device()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint under another name and rename it when it is whole: one that is cut short has no name."""
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f"{path.name}.partial")
        if self.is_global_zero and partial.is_dir():  # of a run that was killed
            shutil.rmtree(partial)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            if path.is_dir():
                shutil.rmtree(path)
            partial.replace(path)
        self.barrier()


def check_layout(config: Config) -> None:
    """Raise ValueError, before anything is built, for settings that this strategy or this machine does not have."""
    for key in ("checkpoint.sharded", "train.cpu_offload"):
        if attrgetter(key)(config) and config.strategy != "fsdp":
            raise ValueError(f"{key}=true: expected strategy=fsdp, got {config.strategy}")
    if config.train.compile not in (None, *COMPILERS):
        raise ValueError(f"train.compile={config.train.compile}: expected one of {', '.join(COMPILERS)}, or null")
    if config.precision == "bf16" and not has_fast_bf16():
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            raise ValueError(f"precision=bf16: {name} does not compute in bf16; use precision=fp32 or precision=auto")
        print("precision=bf16: this CPU has no instructions for it: right, but slower than precision=fp32", flush=True)


def build_strategy(config: Config) -> str | Strategy:
    """Return the Lightning strategy: auto and single let Lightning decide, ddp, or fsdp (FSDP2)."""
    if config.strategy == "fsdp":
        return ShardedDataParallel(config.checkpoint.sharded, config.train.cpu_offload)
    return "ddp" if config.strategy == "ddp" else "auto"


def resolve_precision(config: Config) -> str:
    """Return Lightning's precision word: bf16-mixed where the hardware gains from it, or as the config says."""
    half = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16())
    return "bf16-mixed" if half else "32-true"


def has_fast_bf16() -> bool:
    """Whether the accelerator, or else the CPU (AVX512-BF16 or AMX), multiplies bf16 faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def shard(model: VistaLLM, mesh: Any, config: Config) -> None:
    """Apply FSDP2 in place: one unit per decoder layer, encoder block and QFormer layer, gradients reduced in fp32.

    Every process ends with its slice of rank 0's weights and with rank 0's buffers; the models of the others may be
    empty (`build_empty`). Trainable parameters of one unit must have one dtype; frozen ones may have another. In bf16
    the layers pass bf16 on to each other, as torchtitan's do, where ddp's autocast passes fp32: half the activations.
    """
    dtype = torch.bfloat16 if resolve_precision(config) == "bf16-mixed" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(torch.cuda.is_available()) if config.train.cpu_offload else OffloadPolicy()
    for unit in [*repeated_layers(model), model]:
        # Unit by unit: a host never holds more than one copy and a unit, also where the slices stay in its memory. With
        # set_model_state_dict(broadcast_from_rank0) rank 0 keeps the whole copy beside its slice: two gloo processes
        # needed 620 MiB above a copy of 1 GiB where this needs 122. Detached: fully_shard moves parameters themselves.
        whole = {name: p.detach() for name, p in unit.named_parameters() if not isinstance(p, DTensor)}
        for name, weight in whole.items():  # FSDP2 takes no channels-last weights
            unit.get_parameter(name).data = weight.contiguous()
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
        for module in unit.modules():
            if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device="cpu" if config.train.cpu_offload else mesh.device_type, recurse=False)
        for name, full in whole.items():
            target: Any = unit.get_parameter(name)
            # Of the other ranks' tensors only shape and dtype are read.
            sent = torch.empty(full.shape, dtype=full.dtype) if full.is_meta else full
            with torch.no_grad():
                received = distribute_tensor(sent.to(mesh.device_type), mesh, target.placements)
                target.to_local().copy_(received.to_local())
    for method in ("generate", "read_prompts", "draw", "answer_logits"):
        register_fsdp_forward_method(model, method)
    for buffer in model.buffers():  # also those that are no part of the state
        buffer.data = buffer.data.to(mesh.device_type)
        dist.broadcast(buffer, 0)


def compile_layers(model: VistaLLM, backend: str | None) -> None:
    """Compile each repeated layer in place, so that no key of the state changes; None = leave them as they are.

    After LoRA and activation checkpointing and before `shard`, whose hooks then stay outside of the compiled graphs.
    Layers of one kind share their graphs.
    """
    for layer in repeated_layers(model) if backend else []:
        layer.compile(backend=backend, dynamic=None)


def repeated_layers(model: VistaLLM) -> list[nn.Module]:
    """The repeated blocks of the three parts: units of sharding and of activation checkpointing."""
    parts: Iterable[Any] = (model.encoder.blocks, model.tokenizer.layers, model.language_model().layers)
    return [layer for part in parts for layer in part]
