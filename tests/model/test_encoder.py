from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistallm.config import CLIP_MEAN, CLIP_STD, PAD_COLOUR, EncoderConfig
from vistallm.model.encoder import ImageEncoder

CONFIG = EncoderConfig(name="vistallm-mini", weights=None, layer=-1, image_size=48)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ImageEncoder(CONFIG).eval()


def images():
    return torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_patch_tokens_are_those_of_the_named_block(encoder):
    """Against a plain walk through open_clip's own modules."""
    visual = encoder.visual
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    grid = visual.conv1((images() / 255 - mean) / std)
    tokens = grid.flatten(2).transpose(1, 2)
    first = visual.class_embedding.view(1, 1, -1).expand(2, -1, -1)
    hidden = visual.ln_pre(torch.cat([first, tokens], 1) + visual.positional_embedding)
    blocks = []
    for block in visual.transformer.resblocks:
        hidden = block(hidden)
        blocks.append(hidden[:, 1:])
    assert (encoder.patches, encoder.width) == (16, 192)
    torch.testing.assert_close(encoder(images()), blocks[-1], rtol=1e-4, atol=1e-4)
    encoder.block = 1
    torch.testing.assert_close(encoder(images()), blocks[1], rtol=1e-4, atol=1e-4)
    encoder.block = len(encoder.blocks) - 2
    torch.testing.assert_close(encoder(images()), blocks[-2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_patches_come_row_by_row(encoder):
    encoder.block = 0
    plain = torch.full((1, 3, 48, 48), 128, dtype=torch.uint8)
    dotted = plain.clone()
    dotted[:, :, 12:24, 36:48] = 255  # second row, fourth column of 4 x 4 patches
    moved = (encoder(dotted) - encoder(plain)).norm(dim=-1)[0]
    assert moved.argmax() == 7


def test_padding_is_zero_after_normalisation(encoder):
    pad = torch.tensor(PAD_COLOUR).view(3, 1, 1)
    assert (((pad - encoder.mean) / encoder.std).abs() < 0.01).all()


def test_weights_file_is_loaded_strictly(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in encoder.visual.state_dict().items()}, path)
    loaded = ImageEncoder(dataclasses.replace(CONFIG, weights=str(path)))
    for key, value in encoder.visual.state_dict().items():
        assert torch.equal(loaded.visual.state_dict()[key], value.to(torch.bfloat16).float())
    with pytest.raises(ValueError, match=r"of another shape: positional_embedding \(17, 192\)"):
        ImageEncoder(dataclasses.replace(CONFIG, weights=str(path), image_size=60))
    state = load_file(path)
    state.pop("class_embedding")
    save_file(state, path)
    with pytest.raises(ValueError, match="missing: class_embedding"):
        ImageEncoder(dataclasses.replace(CONFIG, weights=str(path)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"encoder\.safetensors: not readable \(half-downloaded"):
        ImageEncoder(dataclasses.replace(CONFIG, weights=str(path)))


def test_unknown_names_and_missing_files():
    with pytest.raises(ValueError, match=r"model\.encoder\.name=eva"):
        ImageEncoder(dataclasses.replace(CONFIG, name="eva"))
    with pytest.raises(ValueError, match="no such file"):
        ImageEncoder(dataclasses.replace(CONFIG, weights="gone.safetensors"))
    with pytest.raises(ValueError, match=r"model\.encoder\.weights=gone: can't be loaded; give a whole local"):
        ImageEncoder(dataclasses.replace(CONFIG, weights="gone"))
