"""Every source together: their made datasets are built by the command, streamed and trained on for two steps."""

import random
import runpy
from pathlib import Path

import pytest

HERE = Path(__file__)
MADE = [
    row
    for path in sorted(HERE.parent.glob("test_*.py"))
    if path != HERE
    for row in runpy.run_path(str(path)).get("MADE", ())
]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, picture, command, builder):
    """The sequences of every row of MADE, with drawn templates."""
    from vistallm.coinit.frames import choose_frames
    from vistallm.coinit.shards import read_raw
    from vistallm.data.images import decode_sample

    found = []
    for number, (source, split, write, *words) in enumerate(MADE):
        root, out = (tmp_path_factory.mktemp(f"{name}{number}") for name in ("root", "shards"))
        write(root, picture)
        words = [word.format(root=root) for word in words]
        assert (
            command(source, "--root", root, "--split", split, "--out", out, "--workers", 1, "--max-rejects", 1, *words)
            == 0
        ), source
        raws = [raw for shard in sorted(out.glob("*.tar")) for raw in read_raw(shard)]
        found.append(
            [builder.build(decode_sample(choose_frames(raw, builder.frames)), random.Random(0)) for raw in raws]
        )
    return found


def test_every_source_has_a_made_dataset():
    from vistallm.coinit.sources import SOURCES

    assert {source for source, *_ in MADE} >= set(SOURCES) - {"jsonl"}


@pytest.mark.parametrize("number", range(len(MADE)), ids=["-".join(row[:2]) for row in MADE])
def test_samples_become_sequences(sequences, number):
    assert sequences[number]
    for sequence in sequences[number]:
        assert sequence.sample.source == MADE[number][0]
        assert (sequence.labels >= 0).sum() >= 2
        assert "{regions" not in sequence.prompt + sequence.answer


def test_two_steps_on_all_sources(sequences, tiny_model, vocabulary):
    import torch

    from vistallm.data.sequence import collate

    optimizer = torch.optim.SGD([p for p in tiny_model.parameters() if p.requires_grad], lr=1e-2)
    chosen = [sequence for group in sequences for sequence in group[:2]]
    batches = [collate(chosen[i::2], vocabulary) for i in (0, 1)]
    tiny_model.train()
    for batch in batches:
        loss = tiny_model(batch).loss
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
