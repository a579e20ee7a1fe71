"""Which of PyTorch's attention kernels training uses: a context manager around a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def training_attention() -> Iterator[None]:
    """Without an accelerator and with gradients, leave the flash path out: its bf16 backward is slow at small heads.

    Measured on two CPU cores, batch 64, 101 tokens, heads of 64: forward and backward .242 s against .287 s. Passes
    without gradients keep flash, which is faster there; the backward pass uses what the forward pass recorded.
    """
    if torch.cuda.is_available() or not torch.is_grad_enabled():
        yield
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of a checkpointed forward pass and of its recomputation: `context_fn` of torch.utils.checkpoint.

    The recomputation runs inside the backward pass, where the kernels must be those of the forward pass.
    """
    return contextlib.nullcontext(), training_attention()
