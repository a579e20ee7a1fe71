"""One gradient, however the samples of an optimizer step are dealt to micro-batches and processes.

As a script: one process of several, which takes one step for each of the word lists of a JSON file.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

CLIP = 1e-3  # below every norm here, so that clipping changes each gradient
SCRIPT = Path(__file__)
launch = runpy.run_path(str(SCRIPT.with_name("ranks.py")))["launch"]
OBJECTIVES = {
    "token": [],
    "sample": ["train.loss_weight=sample"],
    "sqrt": ["train.loss_weight=sqrt"],
    "sigma": ["train.bin_sigma=1.5"],
    "sigma sqrt": ["train.bin_sigma=1.5", "train.loss_weight=sqrt"],
}
LAYOUTS = {  # processes, words, sizes of the micro-batches of one process
    "1 x 8": (1, [], [8]),
    "2 x 4": (1, ["trainer.accumulate_grad_batches=2"], [4, 4]),
    "8 x 1": (1, ["trainer.accumulate_grad_batches=8"], [1] * 8),
    "ddp": (2, ["strategy=ddp", "trainer.devices=2"], [4]),
    "fsdp": (2, ["strategy=fsdp", "trainer.devices=2"], [4]),
    "ddp 2 x 2": (2, ["strategy=ddp", "trainer.devices=2", "trainer.accumulate_grad_batches=2"], [2, 2]),
    "fsdp 2 x 2": (2, ["strategy=fsdp", "trainer.devices=2", "trainer.accumulate_grad_batches=2"], [2, 2]),
}


def unequal_sequences(config):
    """Four of the shortest answers (3 tokens), then four of the longest masks (of 40 points), of the test split."""
    from vistallm.coinit.shards import split_shards
    from vistallm.data.sequence import build_codec, build_sequencer
    from vistallm.data.stream import RejectLog, evaluation_sequences
    from vistallm.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.build(config.model, build_codec(config))
    sequencer, root = build_sequencer(config, vocabulary), Path(config.data.root)
    rows = []
    for task in ("pope", "vqa", "gres", "res", "attcoseg"):
        shards = split_shards(root, "test", task)
        rows += evaluation_sequences(shards, sequencer, task, RejectLog(None, 0.0), 4)
    rows.sort(key=lambda row: (int((row.labels >= 0).sum()), row.sample.id))
    return [*rows[:4], *rows[-4:]], vocabulary


def take_step(words, sizes, out):
    """Take one step as `train` does and save {name: gradient that the optimizer gets}, and the reported facts."""
    import lightning as L
    from torch.utils.data import DataLoader

    from vistallm.config import load_config
    from vistallm.data.sequence import collate
    from vistallm.train.module import VistaModule
    from vistallm.train.run import build_trainer, prepare_model, quiet

    quiet()
    config = load_config([*words, "trainer.max_steps=1", "trainer.enable_progress_bar=false"])
    sequences, vocabulary = unequal_sequences(config)
    mine = sequences[int(os.environ.get("RANK", 0)) * sum(sizes) :]
    batches = []
    for size in sizes:
        batches.append(collate(mine[:size], vocabulary))
        mine = mine[size:]
    L.seed_everything(0, verbose=False)
    module = VistaModule(prepare_model(config, vocabulary, None)[0], config, steps=1)
    kept = {}

    class Keep(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(self.keep)

        def keep(self, optimizer, args, kwargs):
            for name, parameter in module.model.named_parameters():
                if parameter.grad is not None:
                    grad = parameter.grad
                    kept[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    trainer = build_trainer(config, out.parent / f"{out.stem}-run")
    trainer.callbacks = [Keep()]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    if trainer.is_global_zero:
        torch.save({"gradient": kept, "report": module.read_report()}, out)


def reference(config):
    """Plain torch in float64, sample by sample without padding: the clipped gradient of the weighted mean of losses."""
    import lightning as L

    from vistallm.data.sequence import collate
    from vistallm.train.run import prepare_model

    sequences, vocabulary = unequal_sequences(config)
    sizes = [int((row.labels >= 0).sum()) for row in sequences]
    assert max(sizes) > 10 * min(sizes), "lengths as unequal as they come"
    L.seed_everything(0, verbose=False)
    model = prepare_model(config, vocabulary, None)[0].double()
    bins, sigma = vocabulary.bin_ids, config.train.bin_sigma
    total = weight = 0.0
    for row, size in zip(sequences, sizes, strict=True):
        embeddings = model.input_embeddings(collate([row], vocabulary))
        logits = model.decoder(inputs_embeds=embeddings).logits[0]
        for position in range(1, len(row.labels)):
            label = int(row.labels[position])
            if label < 0:
                continue
            log_p = logits[position - 1] - logits[position - 1].logsumexp(0)
            loss = -log_p[label]
            if sigma and label in bins:
                near = torch.tensor(
                    [math.exp(-((k - bins.index(label)) ** 2) / (2 * sigma**2)) for k in range(len(bins))]
                )
                loss = -(near / near.sum() * log_p[bins]).sum()
            own = {"token": 1.0, "sample": 1 / size, "sqrt": size**-0.5}[config.train.loss_weight]
            total, weight = total + own * loss, weight + own
    (total / weight).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
    assert norm > 2 * CLIP
    gradient = {name: g * (CLIP / norm) for name, g in gradient.items()}
    return {"gradient": gradient, "loss": (total / weight).item(), "norm": norm.item()}


@pytest.fixture(scope="module")
def words(tiny_words, mini_root):
    words = ["model=mini", "data=mini", *tiny_words, f"data.root={mini_root}", "trainer.accelerator=cpu"]
    return [
        *words,
        "trainer.use_distributed_sampler=false",
        "points=40",
        f"train.gradient_clip={CLIP}",
        "checkpoint.every_n_steps=100",
    ]


@pytest.fixture(scope="module")
def steps(words, tmp_path_factory):
    """All steps, those of two processes in one start of them: (objective, layout) -> what was saved."""
    folder, runs = tmp_path_factory.mktemp("gradients"), {1: [], 2: []}
    for objective, more in OBJECTIVES.items():
        for layout, (world, where, sizes) in LAYOUTS.items():
            out = folder / f"{objective}-{layout}.pt"
            runs[world].append([[*words, *more, *where], sizes, str(out)])
    for world, todo in runs.items():
        launch(todo, world, folder, SCRIPT)
    return lambda objective, layout: torch.load(folder / f"{objective}-{layout}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_dealt(objective, words, steps):
    from vistallm.config import load_config

    expected = reference(load_config([*words, *OBJECTIVES[objective]]))
    for layout in LAYOUTS:
        found = steps(objective, layout)
        assert found["gradient"].keys() == expected["gradient"].keys(), layout
        difference = sum((found["gradient"][k] - g).square().sum() for k, g in expected["gradient"].items()).sqrt()
        assert difference / CLIP < 1e-5, (layout, difference / CLIP)
        assert found["report"]["loss"] == pytest.approx(expected["loss"], rel=1e-5), layout
        assert found["report"]["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5), layout
        assert found["report"]["samples"] == 8, layout


@pytest.mark.slow
def test_the_loss_of_a_task_is_that_of_the_objective(steps):
    """Losses of the tasks, weighted by their share of the step's weight, make up the loss: here of samples."""
    report = steps("sample", "fsdp")["report"]
    tasks = {key: value for key, value in report.items() if key.startswith("loss/")}
    alone = steps("sample", "1 x 8")["report"]
    assert tasks == pytest.approx({key: alone[key] for key in tasks}, rel=1e-5)
    assert len(tasks) > 1
    assert min(tasks.values()) < report["loss"] < max(tasks.values())


def main():
    for words, sizes, out in json.loads(Path(sys.argv[1]).read_text()):
        take_step(words, sizes, Path(out))


if __name__ == "__main__":
    main()
