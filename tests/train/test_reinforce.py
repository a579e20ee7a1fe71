"""Losses of reinforcement, against enumeration; runs of stage=rl in one process and in two."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vistallm.config import ReinforceConfig, load_config
from vistallm.train.callbacks import read_metrics
from vistallm.train.reinforce import FACTS, Rollouts, coordinate_loss, group_loss, head_gradient, masked_logprob

ROOT = Path(__file__).parents[2]
LOSSES = ("coordinate", "grpo", "dr_grpo", "gspo")
# A toy answer: token 0 ends the list (at places 0 and 2), 1 to 3 are values, places 0-1 and 2-3 hold an object each.
PLACES, VALUES = 4, (1, 2, 3)


def toy_reward(answer):
    """Values of up to two objects of two numbers; the best answer is one object (2, 3)."""
    table = {(): 0.2, (2, 3): 1.0}
    close = sum((abs(a - b) for a, b in zip(answer, (2, 3), strict=False)), 0)
    return table.get(answer, 0.7 / (1 + close) / (1 + (len(answer) > 2)))


def toy_answers():
    for size in (0, 2, 4):
        yield from itertools.product(VALUES, repeat=size)


def toy_rows(answers):
    """Ids (N, 5) with the end token 0, and the same as an empty-padded row; allowed tokens of each place."""
    ids = torch.tensor([[*answer, *[0] * (PLACES + 1 - len(answer))] for answer in answers])
    allowed = torch.ones(PLACES + 1, 4, dtype=torch.bool)
    allowed[1, 0] = allowed[3, 0] = False
    allowed[4, 1:] = False
    return ids, allowed.expand(len(ids), -1, -1)


def toy_rollouts(answers, logits):
    """What the sampler gives for answers of the toy, its edits by trying every other token."""
    ids, allowed = toy_rows(answers)
    length = torch.tensor([len(answer) + (len(answer) < PLACES) for answer in answers])
    valid = torch.arange(PLACES + 1)[None] < length[:, None]
    reward = torch.tensor([toy_reward(answer) for answer in answers])
    edits, change, ends = [], [], []
    for row, answer in enumerate(answers):
        for place, value in enumerate(answer):
            for other in set(VALUES) - {value}:
                edits.append((row, place, other))
                change.append(toy_reward((*answer[:place], other, *answer[place + 1 :])) - toy_reward(answer))
                ends.append(False)
        for place in range(0, len(answer), 2):
            edits.append((row, place, 0))
            change.append(toy_reward(answer[:place]) - toy_reward(answer))
            ends.append(True)
    logprob = masked_logprob(logits.expand(len(ids), -1, -1), allowed, 1.0)
    taken = logprob.gather(2, ids[..., None])[..., 0].detach()
    drawn = SimpleNamespace(ids=ids, logprob=taken, allowed=allowed)
    places = torch.tensor(edits).view(-1, 3)
    parts = (valid, reward, torch.zeros_like(valid), places, torch.tensor(change), torch.tensor(ends, dtype=torch.bool))
    return Rollouts(None, drawn, *parts, {}), logprob


def expected_reward(logits):
    """By enumeration, float64."""
    answers = list(toy_answers())
    ids, allowed = toy_rows(answers)
    logprob = masked_logprob(logits.expand(len(ids), -1, -1), allowed, 1.0).gather(2, ids[..., None])[..., 0]
    length = torch.tensor([len(answer) + (len(answer) < PLACES) for answer in answers])
    chance = torch.where(torch.arange(PLACES + 1)[None] < length[:, None], logprob, 0.0).sum(1).exp()
    assert chance.sum().item() == pytest.approx(1)
    return chance, (chance * torch.tensor([toy_reward(answer) for answer in answers], dtype=torch.float64)).sum()


def test_the_mean_of_the_coordinate_gradient_is_that_of_the_expected_reward():
    """Over all answers, each weighted by its probability; the true gradient is by finite differences."""
    torch.manual_seed(1)
    logits = torch.randn(PLACES + 1, 4, dtype=torch.float64, requires_grad=True)
    chance, _ = expected_reward(logits.detach())
    mean = torch.zeros_like(logits)
    for weight, answer in zip(chance, toy_answers(), strict=True):
        rollouts, logprob = toy_rollouts([answer], logits)
        rollouts.change = rollouts.change.double()
        if len(rollouts.edits):
            (gradient,) = torch.autograd.grad(coordinate_loss(rollouts, logprob, 1), logits)
            mean -= weight * gradient
    step = 1e-5
    for index in itertools.product(range(PLACES + 1), range(4)):
        values = []
        for sign in (-1, 1):
            moved = logits.detach().clone()
            moved[index] += sign * step
            values.append(expected_reward(moved)[1].item())
        assert mean[index].item() == pytest.approx((values[1] - values[0]) / (2 * step), abs=1e-6), index


@pytest.mark.parametrize("loss", LOSSES)
def test_the_best_answer_is_learned(loss):
    torch.manual_seed(0)
    logits = torch.zeros(PLACES + 1, 4, requires_grad=True)
    optimizer, config = torch.optim.Adam([logits], 0.1), ReinforceConfig(loss=loss, copies=4)
    for _ in range(150):
        _, allowed = toy_rows([()])
        chances = masked_logprob(logits[None], allowed, 1.0)[0].exp().detach()
        drawn = torch.multinomial(chances, 32, replacement=True).T.tolist()
        answers = [() if not row[0] else tuple(row[:2]) if not row[2] else tuple(row[:4]) for row in drawn]
        rollouts, logprob = toy_rollouts(answers, logits)
        if loss == "coordinate":
            value = coordinate_loss(rollouts, logprob, config.copies)
        else:
            value = group_loss(rollouts, logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0], config)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert expected_reward(logits.detach().double())[1] > 0.85  # .31 at the start


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rewards_give_no_gradient(loss):
    logits = torch.randn(PLACES + 1, 4, requires_grad=True)
    rollouts, logprob = toy_rollouts([(1, 2), (2, 3), (1, 1, 2, 2), (3, 3)], logits)
    rollouts.reward, rollouts.change = torch.full((4,), 0.5), torch.zeros(len(rollouts.change))
    rollouts.shared = rollouts.valid
    config = ReinforceConfig(loss=loss, copies=2)
    if loss == "coordinate":
        value = coordinate_loss(rollouts, logprob, 2)
    else:
        value = group_loss(rollouts, logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0], config)
    value.backward()
    assert logits.grad.abs().max() < 1e-7


def test_a_group_gradient_on_policy_is_that_of_the_log_probabilities():
    """grpo: advantage over its standard deviation, mean over tokens; gspo the same, as the ratio is 1."""
    logits = torch.randn(PLACES + 1, 4, requires_grad=True)
    answers = [(1, 2), (2, 3), (1, 1, 2, 2), ()]
    rollouts, logprob = toy_rollouts(answers, logits)
    taken = logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0]
    rewards = rollouts.reward.view(2, 2)
    scaled = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)).flatten()
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    sums = torch.where(rollouts.valid, taken, 0.0).sum(1)
    wanted = {"grpo": -(scaled * sums / rollouts.valid.sum(1)).sum(), "dr_grpo": -(centred * sums).sum()}
    wanted["gspo"] = wanted["grpo"]
    for name, value in wanted.items():
        (expected,) = torch.autograd.grad(value, logits, retain_graph=True)
        loss = group_loss(rollouts, taken, ReinforceConfig(loss=name, copies=2))
        (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_a_ratio_beyond_the_clip_gains_no_more():
    logits = torch.zeros(PLACES + 1, 4, requires_grad=True)
    rollouts, logprob = toy_rollouts([(1, 2), (2, 3)], logits)
    rollouts.drawn.logprob = rollouts.drawn.logprob - torch.tensor([[0.0], [1.0]])  # the better one has risen already
    taken = logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0]
    loss = group_loss(rollouts, taken, ReinforceConfig(loss="dr_grpo", copies=2, clip=0.2))
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    worse = (rollouts.reward[1] - rollouts.reward[0]) / 2 * torch.where(rollouts.valid, taken, 0.0)[0].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(worse, logits)[0])  # only the worse one still pushes


def test_the_gradient_of_the_head_is_that_of_autograd():
    head = torch.nn.Linear(5, 7, bias=False)
    states = torch.randn(3, 4, 5)
    logits = head(states)
    loss = (logits.softmax(-1) * torch.randn(7)).sum()
    made = head_gradient(loss, states.flatten(0, 1), logits)
    torch.testing.assert_close(made, torch.autograd.grad(loss, head.weight)[0])


# -- runs -------------------------------------------------------------------------------------------------------------

RL = ["stage=rl", "trainer.max_steps=4", "checkpoint.every_n_steps=2", "checkpoint.keep=5", "data.pool_batches=1"]
RL += ["data.batch_size=6", "decode.max_new_tokens=null", "train.lr=1e-3"]


@pytest.fixture(scope="module")
def train_rl(stage_one, tiny_config, tmp_path_factory):
    from vistallm.evaluate.rollouts import RolloutSampler
    from vistallm.train.run import train

    folder = tmp_path_factory.mktemp("rl")

    def run(name, *words):
        config = tiny_config(f"run_dir={folder / name}", f"ckpt={stage_one.dir}", *RL, *words)
        train(config, None, RolloutSampler)
        rows = read_metrics(folder / name / "metrics.csv")
        return [{k: float(v) for k, v in row.items() if v} for row in rows], folder / name

    return run


@pytest.fixture(scope="module")
def unbroken(train_rl):
    return train_rl("one")


def test_a_run_reports_what_it_drew(unbroken):
    rows, folder = unbroken
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {f"reinforce/{name}" for name in FACTS[1:]} <= set(row)
        assert 0 <= row["reinforce/reward"] <= 1
        assert row["reinforce/unreadable"] == 0
        assert row["reinforce/mismatch"] < 1e-4
        assert row["reinforce/entropy"] > 0
        assert row["loss"] > 0
    assert (folder / "checkpoints" / "step-000004.ckpt").is_file()


def test_a_resumed_run_goes_on_as_the_unbroken_one(unbroken, train_rl):
    rows, folder = unbroken
    again, _ = train_rl("again", f"resume={folder}/checkpoints/step-000002.ckpt")
    for one, other in zip(rows[2:], again, strict=True):
        for name in ("grad_norm", "reinforce/reward", "reinforce/length", "loss"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.parametrize(
    "words",
    [
        ["reinforce.loss=grpo", "reinforce.kl=0.1"],
        ["reinforce.replay=0", "reinforce.tasks=[res,vqa,pope,nlvr2,caption,v7w]"],
        ["train.decoder=lora", "model.decoder.lora_rank=2", "reinforce.shuffle=true"],
    ],
    ids=["kl", "words", "lora"],
)
def test_other_ways_run(train_rl, words, request):
    rows, _ = train_rl(request.node.callspec.id, "trainer.max_steps=2", *words)
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    if "reinforce.kl=0.1" in words:
        assert rows[0]["reinforce/kl"] == pytest.approx(0, abs=1e-5)
        assert rows[1]["reinforce/kl"] > 1e-7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "ckpt=RUN"),
        (["ckpt=x", "reinforce.tasks=[rez]"], "rez"),
        (["ckpt=x", "reinforce.temperature=0"], "temperature"),
        (["ckpt=x", "reinforce.copies=1", "reinforce.loss=grpo"], "at least 2"),
        (["ckpt=x", "reinforce.boundary=2"], "share from 0 to 1"),
        (["ckpt=x", "train.activation_checkpointing=true"], "activation_checkpointing"),
    ],
)
def test_wrong_settings_are_named(words, message):
    from vistallm.train.run import check_settings

    with pytest.raises(ValueError, match=message):
        check_settings(load_config(["stage=rl", *words]))


@pytest.mark.slow
def test_two_processes_draw_in_step(stage_one, tiny_words, mini_root, tmp_path):
    """ddp and fsdp take the same steps: the same answers, rewards and gradients; rows end at different lengths."""
    launch = runpy.run_path(str(ROOT / "tests/train/ranks.py"))["launch"]
    words = ["model=mini", "data=mini", *tiny_words, f"data.root={mini_root}", "trainer.accelerator=cpu", *RL]
    words += [f"ckpt={stage_one.dir}", "data.batch_size=3", "reinforce.kl=0.01", "trainer.max_steps=3"]
    todo = {name: [*words, f"run_dir={tmp_path / name}", f"strategy={name}"] for name in ("ddp", "fsdp")}
    launch([[*own, "trainer.devices=2"] for own in todo.values()], 2, tmp_path)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in todo]
    one, other = ([{key: float(value) for key, value in row.items() if value} for row in some] for some in rows)
    assert len(one) == len(other) == 3
    for a, b in zip(one, other, strict=True):
        for name in ("grad_norm", "reinforce/reward", "reinforce/length", "reinforce/replay_weight", "loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
