"""Where and how a run computes: Lightning strategy and precision from the config.

FSDP is Lightning's ModelParallelStrategy (FSDP2): clipping there is the ordinary global norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vistallm.config import Config
from vistallm.model.vistallm import VistaLLM


class ShardedDataParallel(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with every process of the run in the data dimension of the mesh."""

    def setup_environment(self) -> None:
        """Set the mesh's sizes; "auto" would make the devices of a node tensor-parallel."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def build_strategy(config: Config) -> str | Strategy:
    """Return the Lightning strategy: auto and single let Lightning decide, ddp, or fsdp (FSDP2)."""
    if config.checkpoint.sharded and config.strategy != "fsdp":
        raise ValueError(f"checkpoint.sharded=true: expected strategy=fsdp, got {config.strategy}")
    match config.strategy:
        case "ddp":
            return "ddp"
        case "fsdp":
            return ShardedDataParallel(save_distributed_checkpoint=config.checkpoint.sharded)
        case _:
            return "auto"


def resolve_precision(config: Config) -> str:
    """Return Lightning's precision word: bf16-mixed where the hardware gains from it, or as the config says."""
    wanted = config.precision
    if wanted == "auto":
        wanted = "bf16" if has_fast_bf16() else "fp32"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[wanted]


def has_fast_bf16() -> bool:
    """Whether the accelerator, or else the CPU (AVX512-BF16 or AMX), multiplies bf16 faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    read = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 has it not
    if read is None:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    facts = read()
    return bool(facts.get("avx512_bf16") or facts.get("amx_bf16"))


def shard(model: VistaLLM, mesh: Any, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: one unit per decoder layer, encoder block and QFormer layer, gradients reduced in fp32.

    Every process ends with its part of rank 0's weights and with rank 0's buffers; the models of the others may be
    empty (`build_empty`). Trainable parameters of one unit must have one dtype; frozen ones may have another.
    """
    empty = any(parameter.is_meta for parameter in model.parameters())
    # Detached: fully_shard moves the parameters themselves to the device.
    whole = {name: p.detach() for name, p in model.named_parameters()} if dist.get_rank() == 0 else {}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in repeated_layers(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if empty:
        model.to_empty(device=mesh.device_type)
    with torch.no_grad():
        for name, part in model.named_parameters():
            assert isinstance(part, DTensor)
            full = whole.pop(name) if whole else torch.empty(part.shape, dtype=part.dtype)
            part.copy_(distribute_tensor(full.to(mesh.device_type), mesh, part.placements))  # scatters from rank 0
        for buffer in model.buffers():  # also those that are no part of the state
            dist.broadcast(buffer, 0)


def repeated_layers(model: VistaLLM) -> list[nn.Module]:
    """The repeated blocks of the three parts: units of sharding and of activation checkpointing."""
    parts: Iterable[Any] = (model.encoder.blocks, model.tokenizer.qformer.encoder.layer, model.language_model().layers)
    return [layer for part in parts for layer in part]
