"""Several processes on the CPU (gloo) take the steps of one: ddp, fsdp, LoRA, sharded checkpoints, bf16."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vistallm.config import load_config
from vistallm.data.stream import RejectLog
from vistallm.model.checkpoint import is_whole, load_run, newest_checkpoint, read_state
from vistallm.model.encoder import ImageEncoder
from vistallm.train.callbacks import read_metrics
from vistallm.train.optim import build_optimizer
from vistallm.train.run import build, prepare_model, resume_path, train
from vistallm.train.strategy import check_layout, resolve_precision

ROOT = Path(__file__).parents[2]
launch = runpy.run_path(str(ROOT / "tests/train/ranks.py"))["launch"]
STEPS = 8
LINKED = ["model.links=all", "links.width=32", "links.layers=2", "links.heads=2"]
# Where gradients cancel, the sign of their sum is rounding, and Adam makes a whole step of it. At this rate such a step
# stays below the tolerance; a wrong gradient does not.
LINKED += ["links.blocks=[0,2]", "train.gradient_clip=0.5", "train.lr=5e-5"]
LORA = ["train.decoder=lora", "model.decoder.lora_rank=2", "model.decoder.lora_dropout=0.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def words(tiny_words, mini_root, folder):
    """Encoder weights are a file that rank 0 has and the others have not."""
    words = ["model=mini", "data=mini", *tiny_words, f"data.root={mini_root}", "trainer.accelerator=cpu"]
    words += [f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=4", "checkpoint.keep=5", "data.batch_size=2"]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = ImageEncoder(load_config(words).model.encoder)
    save_file(encoder.visual.state_dict(), folder / "encoder-0.safetensors")
    return [*words, f"model.encoder.weights={folder}/encoder-{{rank}}.safetensors"]


def reference(words, root, steps):
    """Steps in one process, the loss a mean over the supervised tokens of both ranks' batches: a plain loop."""
    config = load_config([word.replace("{rank}", "0") for word in words])
    L.seed_everything(config.seed, verbose=False)
    module, data = build(config, root)
    model, optimizer, scheduler = module.model, *build_optimizer(module.model, config.train, STEPS)
    streams = [data.stream(rank, world_size=2, workers=0, rejects=RejectLog(None, 1.0)) for rank in range(2)]
    rows = []
    for batches in islice(zip(*streams, strict=True), steps):
        outputs = [model(batch) for batch in batches]
        loss = torch.cat([output.token_loss for output in outputs]).sum()
        loss = loss + config.links.weight * sum(output.link_loss or 0.0 for output in outputs)
        loss = loss / sum(len(output.token_loss) for output in outputs)
        optimizer.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clip)
        optimizer.step()
        scheduler.step()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
        if outputs[0].link_parts:
            objects, masks = (sum(output.link_parts[name].item() for output in outputs) for name in ("objects", "mask"))
            rows[-1] |= {"links/mask": masks / objects, "links/objects": objects, "links/unmatched": 0.0}
    assert rows[0]["grad_norm"] > 1.2 * config.train.gradient_clip, "clipping must have something to do"
    return SimpleNamespace(rows=rows, weights={n: p.detach() for n, p in model.named_parameters()})


@pytest.fixture(scope="module")
def runs(words, folder):
    """All runs of two processes, in one start of them: name -> run folder."""
    shared = [word.replace("{rank}", "0") for word in words]
    short, pieces = ["trainer.max_steps=2"], ["strategy=fsdp", "checkpoint.sharded=true"]
    half, saving = ["precision=bf16", "train.frozen_bf16=true"], "train.activation_checkpointing=true"
    frozen = ["train.encoder=true", "model.encoder.layer=-2", "model.tokenizer.sees_instruction=false"]
    todo = {
        "ddp": [*shared, "strategy=ddp"],
        "unread": [*shared, "strategy=ddp", *frozen, *short],
        "sharded": [*words, *pieces],
        "again": [*words, *pieces, f"resume={folder}/sharded/checkpoints/step-000004.ckpt"],
        "lora": [*words, *pieces, *LORA, *short, "train.lr=1e-2"],
        "offload": [*words, *pieces, "train.cpu_offload=true"],
        "resumed": [*words, *pieces, "train.cpu_offload=true", f"resume={folder}/sharded/checkpoints/step-000004.ckpt"],
        "compiled": [*words, *pieces, *LORA, *short, "train.lr=1e-2", "train.compile=aot_eager", saving],
        "linked": [*words, *pieces, *LINKED, *short],
        "linked_ddp": [*shared, "strategy=ddp", *LINKED, *short],
        "half": [*words, "strategy=fsdp", *LORA, *half, *short],
    }
    said = launch([[*run, "trainer.devices=2", f"run_dir={folder / name}"] for name, run in todo.items()], 2, folder)
    return SimpleNamespace(said=said, **{name: folder / name for name in todo})


@pytest.fixture(scope="module")
def one_process(words, mini_root):
    return reference(words, mini_root, STEPS)


def compare(run_dir, expected, steps, weights=True):
    rows = [row for row in read_metrics(run_dir / "metrics.csv") if row["loss"]]
    assert [row["step"] for row in rows] == [str(step) for step in steps]
    for row in rows:
        wanted = expected.rows[int(row["step"]) - 1]
        for key in wanted:
            assert float(row[key]) == pytest.approx(wanted[key], rel=1e-5), (row["step"], key)
    if weights:
        state = read_state(newest_checkpoint(run_dir))
        for name, weight in expected.weights.items():
            torch.testing.assert_close(state[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "sharded", "offload"])
def test_two_processes_take_the_steps_of_one(name, runs, one_process):
    """Loss and norm of the gradient at each step, and the weights at the end."""
    compare(getattr(runs, name), one_process, range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_with_links_take_the_steps_of_one(runs, words, mini_root):
    """Sums over links and objects are shared by the weight of all tokens, so no count of objects has to be."""
    expected = reference([*words, *LINKED], mini_root, 2)
    compare(runs.linked, expected, [1, 2])
    compare(runs.linked_ddp, expected, [1, 2])


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_and_loads(runs, one_process):
    path = newest_checkpoint(runs.sharded)
    assert path.is_dir()
    assert len(list(path.glob("*.distcp"))) == 2
    compare(runs.again, one_process, range(5, STEPS + 1))
    rows = [read_metrics(run / "metrics.csv")[-4:] for run in (runs.sharded, runs.again)]
    assert [r["grad_norm"] for r in rows[0]] == [r["grad_norm"] for r in rows[1]], "bit for bit"
    model, _, found = load_run(str(runs.sharded))
    assert found == path
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, read_state(path)[name]), name


@pytest.mark.slow
def test_it_resumes_on_one_process(runs, words, one_process, folder):
    """The lanes of two ranks are read by one, which adds up two micro-batches per step."""
    resume = f"resume={runs.sharded}/checkpoints/step-000004.ckpt"
    more = ["strategy=fsdp", "checkpoint.sharded=true", "trainer.devices=1", "trainer.accumulate_grad_batches=2"]
    launch([[*words, *more, resume, f"run_dir={folder / 'one'}"]], 1, folder)
    compare(folder / "one", one_process, range(5, STEPS + 1))


@pytest.mark.slow
def test_a_sharded_checkpoint_cut_short_or_with_another_strategy(runs, words, tmp_path):
    shutil.copytree(runs.sharded, tmp_path / "run")
    config = load_config([*words, f"run_dir={tmp_path / 'run'}", "strategy=ddp"])
    with pytest.raises(ValueError, match="resume it with strategy=fsdp on any number"):
        resume_path(config)
    (tmp_path / "run/checkpoints/step-000008.ckpt/meta.pt").unlink()
    assert not is_whole(tmp_path / "run/checkpoints/step-000008.ckpt")
    assert newest_checkpoint(tmp_path / "run").name == "step-000004.ckpt", "as resume=auto goes on after a kill"
    config.resume = str(tmp_path / "run/checkpoints/step-000008.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        resume_path(config)


@pytest.mark.slow
def test_what_was_trained_without_offload_goes_on_with_it(runs, one_process):
    compare(runs.resumed, one_process, range(5, STEPS + 1))


@pytest.mark.slow
def test_lora_sharded_and_compiled(runs, words, mini_root):
    """Adapters and new rows train under fsdp as in one process, also when layers that save memory are compiled."""
    expected = reference([*words, *LORA, "train.lr=1e-2"], mini_root, 2)
    compare(runs.lora, expected, [1, 2])
    compare(runs.compiled, expected, [1, 2])
    assert read_state(newest_checkpoint(runs.compiled)).keys() == read_state(newest_checkpoint(runs.lora)).keys()


@pytest.mark.slow
def test_frozen_weights_in_bf16_under_trained_ones_in_fp32(runs, words, mini_root):
    state = read_state(newest_checkpoint(runs.half))
    for name, weight in state.items():
        trained = name.startswith("tokenizer.") or "lora_" in name or "trainable_tokens_delta" in name
        assert weight.dtype == (torch.float32 if trained else torch.bfloat16), name
    expected = reference([*words, *LORA], mini_root, 2)
    for row, wanted in zip(read_metrics(runs.half / "metrics.csv"), expected.rows, strict=True):
        assert float(row["loss"]) == pytest.approx(wanted["loss"], rel=0.02)
        assert float(row["grad_norm"]) == pytest.approx(wanted["grad_norm"], rel=0.1)


@pytest.mark.slow
def test_weights_that_the_forward_never_reads_do_not_stop_ddp(runs):
    rows = read_metrics(runs.unread / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2"]


@pytest.mark.slow
def test_started_by_lightning_with_one_file_per_checkpoint(words, tmp_path, one_process):
    """As a user starts it: `python train.py trainer.devices=2 strategy=fsdp`, then again after step 8 was lost."""
    command = [sys.executable, "train.py", *(word.replace("{rank}", "0") for word in words), f"run_dir={tmp_path}"]
    command += ["trainer.devices=2", "strategy=fsdp"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        compare(tmp_path, one_process, range(1, STEPS + 1))
        newest = newest_checkpoint(tmp_path)
        assert newest.is_file()
        newest.unlink()
    assert f"resuming from {tmp_path}/checkpoints/step-000004.ckpt" in done.stdout


@pytest.mark.parametrize("words", [["train.decoder=full"], [*LORA, "precision=bf16", "train.frozen_bf16=true"]])
def test_only_the_first_process_holds_weights_before_they_are_shared_out(
    words, tiny_config, vocabulary, monkeypatch, tmp_path
):
    """Names, shapes and dtypes agree, whatever dtype the language model was saved in: parts are sent by them."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes)).half().save_pretrained(tmp_path)
    facts = []
    for rank in range(2):
        monkeypatch.setattr("vistallm.train.run.rank_zero_only.rank", rank)
        config = tiny_config("strategy=fsdp", f"model.decoder.weights={tmp_path}", *words)
        model, _ = prepare_model(config, vocabulary, None)
        assert all(parameter.is_meta == (rank == 1) for parameter in model.parameters())
        facts.append({name: (p.shape, p.dtype) for name, p in model.named_parameters()})
    assert list(facts[0].items()) == list(facts[1].items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.sharded=true", "strategy=ddp"], r"checkpoint\.sharded=true: expected strategy=fsdp, got ddp"),
        (["train.cpu_offload=true"], r"train\.cpu_offload=true: expected strategy=fsdp, got auto"),
        (["train.compile=fast"], r"train\.compile=fast: expected one of inductor, aot_eager, eager, or null"),
    ],
)
def test_settings_of_another_strategy_are_refused_before_anything_is_built(words, said):
    with pytest.raises(ValueError, match=said):
        train(load_config(words))


def test_bf16_needs_hardware_on_a_gpu_and_is_slow_on_a_cpu(monkeypatch, capsys):
    for precision, word in (("auto", "32-true"), ("bf16", "bf16-mixed")):
        monkeypatch.setattr("vistallm.train.strategy.has_fast_bf16", lambda: False)
        assert resolve_precision(load_config([f"precision={precision}"])) == word
    check_layout(load_config(["precision=bf16", "trainer.accelerator=cpu"]))
    assert "right, but slower than precision=fp32" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ValueError, match=r"Tesla V100 does not compute in bf16; use precision=fp32 or precision=auto"):
        check_layout(load_config(["precision=bf16"]))
