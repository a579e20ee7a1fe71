"""Files that would run code when they are unpickled are refused wherever weights are read."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from vistallm.model.build import build_model
from vistallm.model.checkpoint import load_run
from vistallm.train.run import train

WORDS = ["trainer.max_steps=2", "checkpoint.every_n_steps=1", "checkpoint.keep=5", "trainer.accelerator=cpu"]
FSDP = ["strategy=fsdp", "checkpoint.sharded=true", "trainer.devices=1"]


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trace(tmp_path):
    """Must not be there in the end."""
    yield tmp_path / "code-has-run"
    assert not (tmp_path / "code-has-run").exists()


def test_the_crafted_object_runs_code_where_nothing_stops_it(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "code-has-run")))
    assert (tmp_path / "code-has-run").exists()


def craft(path, trace):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"loops": Code(trace)}, path)


def test_a_checkpoint_file(stage_one, tiny_config, tmp_path, trace):
    run = shutil.copytree(stage_one.dir, tmp_path / "run")
    craft(run / "checkpoints" / "step-000006.ckpt", trace)
    for words in ([f"ckpt={run}"], [f"resume={run}/checkpoints/step-000006.ckpt"]):
        with pytest.raises(ValueError, match=r"step-000006\.ckpt: not a (readable )?checkpoint") as error:
            train(tiny_config(f"run_dir={tmp_path / 'new'}", *WORDS, *words))
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def sharded(tiny_config, tmp_path_factory):
    """A run whose process leaves a folder of parts; torch.distributed is set up in this process only while it runs."""
    folder = tmp_path_factory.mktemp("sharded")
    train(tiny_config(f"run_dir={folder}", *WORDS, *FSDP))
    return folder


def craft_sharded(folder, trace, where):
    if where == "meta.pt":
        return craft(folder / where, trace)
    metadata = FileSystemReader(folder).read_metadata()
    name = "optimizer_0.param_groups.0.lr"
    if where == ".metadata":
        metadata.planner_data = Code(trace)
        return (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    if where == "dotted":  # a name that the module of an allowed class has imported
        allowed = b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n"
        return (folder / ".metadata").write_bytes(b"\x80\x04" + allowed + pickle.dumps((str(trace),))[2:-1] + b"R.")
    stored = metadata.storage_data[MetadataIndex(name)]
    assert isinstance(metadata.state_dict_metadata[name], BytesStorageMetadata)
    path = folder / stored.relative_path
    stored.offset = path.stat().st_size
    with path.open("ab") as file:
        torch.save(Code(trace), file)
    stored.length = path.stat().st_size - stored.offset
    return (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("where", [".metadata", "dotted", "bytes", "meta.pt"])
def test_a_sharded_checkpoint(where, sharded, tiny_config, tmp_path, trace):
    run = shutil.copytree(sharded, tmp_path / "run")
    craft_sharded(run / "checkpoints" / "step-000002.ckpt", trace, where)
    if where != "meta.pt":  # which holds no weights and is not read for them
        with pytest.raises(ValueError, match=r"step-000002\.ckpt: not a readable checkpoint"):
            load_run(run)
    with pytest.raises(ValueError, match=r"step-000002\.ckpt: not a checkpoint of this program") as error:
        train(tiny_config(f"run_dir={run}", *WORDS, *FSDP, "trainer.max_steps=3"))
    assert "\n" not in str(error.value)


def test_a_sharded_checkpoint_as_it_is_goes_on(sharded, tiny_config, tmp_path):
    run = shutil.copytree(sharded, tmp_path / "run")
    train(tiny_config(f"run_dir={run}", *WORDS, *FSDP, "trainer.max_steps=3"))
    assert load_run(run)[2].name == "step-000003.ckpt"


@pytest.mark.parametrize("part", ["encoder", "tokenizer", "decoder"])
def test_pretrained_weights(part, tiny_config, vocabulary, tmp_path, trace):
    files = {"encoder": "encoder.pt", "tokenizer": "pytorch_model.bin", "decoder": "pytorch_model.bin"}
    path = tmp_path / files[part]
    torch.save({"qformer.embeddings.layernorm.weight": Code(trace)}, path)
    if part == "decoder":
        build_model(tiny_config(), vocabulary).decoder_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"can't be loaded|not readable"):
        build_model(tiny_config(f"model.{part}.weights={path if part == 'encoder' else tmp_path}"), vocabulary)
