"""Fixtures that several test folders share: a tiny mini set on disk and a tiny model's configuration."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch loads; losses that are compared bit for bit depend on it
# The package is imported inside the fixtures: tests of light modules then start without torch and Lightning.

# Everything that a result depends on, written out: the values in configs/ may change without touching a test.
TINY = """
model.name=tiny model.links=none model.encoder.name=vistallm-mini model.encoder.weights= model.encoder.image_size=48
model.encoder.layer=-1 model.tokenizer.weights= model.tokenizer.queries=4 model.tokenizer.hidden_size=32
model.tokenizer.layers=2 model.tokenizer.heads=2 model.tokenizer.intermediate_size=64
model.tokenizer.cross_attention_every=1 model.tokenizer.dropout=0.0 model.decoder.hidden_size=64
model.decoder.layers=2 model.decoder.heads=2 model.decoder.intermediate_size=128 model.decoder.tie_embeddings=true
num_bins=33 points=6 mask_sampler=uniform data.name=mini data.batch_size=4 data.workers=0 data.pool_batches=2
data.shuffle_buffer=20 data.max_length=512 data.templates=mini data.val_batches=1 decode.max_new_tokens=8
decode.batch_size=4 decode.limit=1 log.tensorboard=false precision=fp32 train.lr=1e-3 train.warmup=0.0
train.bin_sigma=0.0
""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def no_process_group():
    """End what a test leaves of torch.distributed: later processes would inherit the port of a store that is in use."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_words():
    """Command-line words that make any run tiny."""
    return list(TINY)


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory):
    """Shards of 306 training samples (18 files of 17), 30 to validate and 30 to test, two of each task."""
    from vistallm.mini.build import build_mini

    root = tmp_path_factory.mktemp("shards") / "mini"
    build_mini(root, workers=1, links=False, train=306, val=30, test=30, samples_per_shard=17)
    return root


@pytest.fixture(scope="session")
def tiny_config(mini_root):
    """Callable: `key=value` words -> Config of a tiny model on the tiny set."""
    from vistallm.config import Config, apply_overrides

    def make(*words):
        return apply_overrides(Config(), [*TINY, f"data.root={mini_root}", *words])

    return make


@pytest.fixture(scope="session")
def vocabulary(tiny_config):
    from vistallm.data.sequence import build_codec
    from vistallm.data.vocabulary import Vocabulary

    config = tiny_config()
    return Vocabulary.build(config.model, build_codec(config))


@pytest.fixture(scope="session")
def builder(tiny_config, vocabulary):
    from vistallm.data.sequence import build_sequencer

    return build_sequencer(tiny_config(), vocabulary)


@pytest.fixture(scope="session")
def samples(mini_root):
    """Decoded test samples by task."""
    from vistallm.coinit.shards import read_raw, split_shards
    from vistallm.data.images import decode_sample

    found: dict[str, list] = {}
    for shard in split_shards(mini_root, "test"):
        for raw in read_raw(shard):
            sample = decode_sample(raw)
            found.setdefault(sample.task, []).append(sample)
    return found


@pytest.fixture
def tiny_model(tiny_config, vocabulary):
    """A seeded tiny model in evaluation mode."""
    import torch

    from vistallm.model.build import build_model

    torch.manual_seed(0)
    return build_model(tiny_config(), vocabulary).eval()


@pytest.fixture
def open_page():
    """Callable: width in pixels -> a page of a real headless browser; an error or a refused script fails the test.

    Skips, with what to install, where there is no browser.
    """
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[browser]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: apt-get install chromium")
    faults = []

    def make(width):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if "policy" in line.text.lower() else None)
        return page

    with sync.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield make
        browser.close()
    assert not faults
