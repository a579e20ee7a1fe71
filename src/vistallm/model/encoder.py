"""The image encoder: square uint8 images -> patch tokens of one block of an open_clip vision tower (EVA-CLIP ViT-g)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from vistallm.config import CLIP_MEAN, CLIP_STD, EncoderConfig
from vistallm.data.vocabulary import loading
from vistallm.model.weights import check_keys, read_safetensors

AFTER_BLOCKS = ("ln_post", "proj", "attn_pool", "norm", "fc_norm", "head")  # names in open_clip's and timm's towers

open_clip.add_model_config(Path(__file__).parent / "open_clip_configs")


class ImageEncoder(nn.Module):
    """Tokens of block `layer` of the vision tower `name`: patches, with `class_token` the class token before them."""

    mean: Tensor  # (3, 1, 1) float32, of pixels in 0..255
    std: Tensor

    def __init__(self, config: EncoderConfig, class_token: bool = False, read: Sequence[int] = ()) -> None:
        super().__init__()
        if config.name not in open_clip.list_models():
            raise ValueError(
                f"model.encoder.name={config.name}: open_clip has no such model; see open_clip.list_models()"
            )
        size = config.image_size
        is_file = config.weights is not None and Path(config.weights).suffix == ".safetensors"
        pretrained = None if is_file else config.weights
        logging.getLogger().addFilter(_is_not_about_random_weights)
        # No device: open_clip would move the model to the CPU, also one whose weights take no memory yet.
        with loading("model.encoder.weights", str(pretrained)):
            model = open_clip.create_model(config.name, pretrained=pretrained, force_image_size=size, device=None)
        self.visual = model.visual
        logging.getLogger().removeFilter(_is_not_about_random_weights)
        if is_file:
            self._load(str(config.weights))
        self.image_size, self.class_token = size, class_token
        self.block, *self.read = self._numbers([config.layer, *read])
        self.register_buffer("mean", 255 * torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)
        trunk = getattr(self.visual, "trunk", None)
        stem = self.visual.conv1 if trunk is None else trunk.patch_embed.proj  # open_clip's own, or timm's
        self.patches, self.width = (size // stem.kernel_size[0]) ** 2, stem.out_channels
        self.tokens = self.patches + class_token

    def forward(self, images: Tensor) -> Tensor:
        """Encode (N, 3, S, S) uint8 RGB images to tokens (N, P, D): patches row by row from the top left."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode as `forward` does; also return the patch tokens (N, P, D) of each block that links read."""
        weight, blocks = next(self.visual.parameters()), sorted({self.block, *self.read})
        result = self.visual.forward_intermediates(
            self.normalise(images).to(weight.dtype),
            indices=blocks,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=self.class_token,
        )
        patches, own = result["image_intermediates"], blocks.index(self.block)
        tokens = patches[own]
        if self.class_token:
            tokens = torch.cat([result["image_intermediates_prefix"][own], tokens], 1)
        return tokens, [patches[blocks.index(block)] for block in self.read]

    def normalise(self, images: Tensor) -> Tensor:
        """Turn (N, 3, H, W) uint8 RGB images into the float32 pixels that the tower reads."""
        return (images.to(self.mean) - self.mean) / self.std

    @property
    def blocks(self) -> nn.ModuleList:
        """The tower's transformer blocks."""
        trunk = getattr(self.visual, "trunk", None)
        return trunk.blocks if trunk is not None else self.visual.transformer.resblocks

    def unread_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights that `forward` never reads: later blocks, and the tower's final norm and head."""
        for block in self.blocks[max([self.block, *self.read]) + 1 :]:
            yield from block.parameters()
        for name, parameter in self.visual.named_parameters():
            if name.removeprefix("trunk.").partition(".")[0] in AFTER_BLOCKS:
                yield parameter

    def _numbers(self, layers: Sequence[int]) -> list[int]:
        """Numbers of blocks from 0, from numbers of which negative ones count from the end."""
        count = len(self.blocks)
        if wrong := [layer for layer in layers if not -count <= layer < count]:
            raise ValueError(f"model.encoder.layer, links.blocks: expected blocks of {count}, got {wrong}")
        return [layer % count for layer in layers]

    def _load(self, path: str) -> None:
        """Load a safetensors file; ValueError unless names and shapes match exactly."""
        own, (state, _) = self.visual.state_dict(), read_safetensors(Path(path), "model.encoder.weights")
        check_keys(own, state, f"model.encoder.weights={path}", "model.encoder.name must be the tower that wrote it")
        self.visual.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})


def _is_not_about_random_weights(record: logging.LogRecord) -> bool:
    """open_clip warns of random weights, but ours come from a file or a checkpoint a moment later."""
    return "No pretrained weights loaded" not in record.getMessage()
