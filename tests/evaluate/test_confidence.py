"""Confidences: the probabilities that they are made of, and what the curves count."""

import doctest

import numpy as np
import pytest
import torch

from vistallm.coinit.shards import read_raw, split_shards
from vistallm.data.images import decode_sample
from vistallm.data.sequence import collate
from vistallm.evaluate import confidence as C
from vistallm.evaluate.benchmarks import load_benchmarks, score
from vistallm.evaluate.generate import Answerer, make_prediction
from vistallm.evaluate.grammar import Role
from vistallm.schema import Prediction


def roles(*names):
    return np.array([Role[name] for name in names])


def test_a_region_is_the_geometric_mean_of_its_tokens():
    row = roles("WORD", "START", "BIN", "BIN", "SEPARATOR", "BIN", "STOP", "WORD")
    probability = np.array([0.9, 0.8, 0.5, 0.4, 0.25, 0.6, 0.3, 1.0])
    ended = np.log([0.9, 0.9, 0.125, 0.9, 0.9, 0.9, 0.9, 0.9])
    found, presence = C.read_confidence(row, np.log(probability), ended)
    assert found == [pytest.approx((0.5 * 0.4 * 0.25) ** (1 / 3)), pytest.approx((0.6 * 0.3) ** 0.5)]
    assert presence == pytest.approx(0.875)


def test_an_empty_pair_has_a_presence_and_no_region():
    found, presence = C.read_confidence(roles("START", "STOP"), np.log([0.9, 0.7]), np.log([0.1, 0.7]))
    assert found == []
    assert presence == pytest.approx(0.3)
    assert C.read_confidence(roles("WORD"), np.zeros(1), np.zeros(1)) == ([], None)


@pytest.fixture(scope="module")
def world_samples(mini_root):
    """Decoded test samples by task."""
    raws = [raw for shard in split_shards(mini_root, "test") for raw in read_raw(shard)]
    found: dict[str, list] = {}
    for sample in map(decode_sample, raws):
        found.setdefault(sample.task, []).append(sample)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@torch.no_grad()
def test_confidences_equal_those_of_one_pass_over_the_answer(
    tiny_model, tiny_config, builder, world_samples, monkeypatch, temperature
):
    """A generated answer, read anew by the model in one uncached pass: the same probabilities."""
    sequences = [builder.build(world_samples[task][0]) for task in ("rec", "attcoseg", "gres", "res")]
    answerer = Answerer(tiny_model, tiny_config("decode.max_new_tokens=40"))
    written, generate = [], tiny_model.generate
    monkeypatch.setattr(tiny_model, "generate", lambda *a, **k: written.append(generate(*a, **k)) or written[0])
    torch.manual_seed(0)
    answers = answerer.answer(sequences, temperature=temperature)
    for sequence, answer, row in zip(sequences, answers, written[0].ids.tolist(), strict=True):
        ids = row[: answer.tokens - 1]
        batch = collate([sequence], tiny_model.vocabulary, generation=True)
        words = tiny_model.decoder.get_input_embeddings()(torch.tensor([ids]))
        embeddings = torch.cat([tiny_model.input_embeddings(batch), words], 1)
        logits = tiny_model.decoder(inputs_embeds=embeddings).logits[0, -len(ids) - 1 : -1].double()
        taken = logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
        found, _ = C.read_confidence(answerer.grammars.roles[ids], taken, np.zeros(len(ids)))
        assert answer.regions == pytest.approx(found, rel=1e-3)
    assert sum(len(answer.regions) for answer in answers) >= 3
    prediction = make_prediction(sequences[0], answers[0], builder, "mini_rec")
    again = Prediction.from_json(prediction.to_json())
    assert again.parsed.regions[0].confidence == pytest.approx(answers[0].regions[0], abs=1e-6)
    assert again.parsed.presence == pytest.approx(answers[0].presence, abs=1e-6)


def brute_ece(sure, right, bins):
    total = 0.0
    for low in range(bins):
        inside = [i for i, s in enumerate(sure) if low <= s * bins < low + 1 or (s == 1 and low == bins - 1)]
        if inside:
            gap = np.mean([sure[i] for i in inside]) - np.mean([right[i] for i in inside])
            total += abs(gap) * len(inside)
    return total / len(sure)


def test_calibration_error_equals_counting():
    generator = np.random.default_rng(0)
    sure = [0.0, 1.0, 0.5, *generator.random(200).tolist()]
    right = (generator.random(203) < 0.4).tolist()
    *_, answers, ece = C.calibration(sure, right)
    assert ece == pytest.approx(brute_ece(sure, right, 10))
    assert answers.sum() == 203
    assert C.calibration([0.5] * 4, [True, False, True, False])[-1] == 0
    assert doctest.testmod(C).failed == 0


def test_rejection_takes_back_the_least_present_first(predictions):
    chosen = [p for p in predictions if p.task == "gres"]
    generator = np.random.default_rng(1)
    wrong = next(p for p in chosen if p.target["empty"])
    wrong.parsed = next(p for p in chosen if not p.target["empty"] and len(p.images) == 1).parsed
    for prediction in chosen:
        prediction.parsed.presence = float(generator.uniform(0.6, 1)) if prediction.parsed.regions else 0.1
    wrong.parsed.presence = 0.5
    scores = score(chosen, load_benchmarks())["mini_gres"].scores
    curve = {name: line for name, (_, line) in C.rejection_curve(chosen).items()}
    assert curve["N-acc"][0] == scores["n_acc"] < 1
    assert curve["T-acc"][0] == scores["t_acc"] == 1
    assert curve["score"][0] == pytest.approx(scores["giou"], abs=1e-6)
    assert curve["N-acc"].max() == curve["N-acc"][-1] == 1
    assert curve["T-acc"][-1] == 0
    best = curve["score"].argmax()
    assert curve["N-acc"][best] == 1
    assert curve["score"][best] > curve["score"][0]
    assert C.rejection_curve([p for p in chosen if p.target["empty"]]) is None


def test_an_answers_confidence(predictions):
    chosen = [p for p in predictions if p.task == "gres"]
    assert {C.answer_confidence(p) for p in chosen} == {None}
    for prediction in chosen:
        prediction.score = 1.0
        C.set_confidence(prediction.parsed, [0.5] * len(prediction.parsed.regions), 0.25)
    assert {C.answer_confidence(p) for p in chosen} == {0.5, 0.75}
    C.set_confidence(chosen[0].parsed, [0.1] * 9, None)
    assert chosen[0].parsed.presence is None
    chosen[1].parsed = None
    assert C.answer_confidence(chosen[1]) is None


def test_a_fitted_calibration_solves_the_equations_of_maximum_likelihood():
    """Where the likelihood of a logistic line is largest, residuals are orthogonal to 1 and to the log odds."""
    generator = np.random.default_rng(1)
    sure = generator.beta(2, 5, 4000)
    odds = np.log(sure / (1 - sure))
    right = generator.random(4000) < 1 / (1 + np.exp(-(1.7 * odds + 2.5)))
    slope, offset = C.fit_calibration(sure.tolist(), right.tolist())
    assert (slope, offset) == (pytest.approx(1.7, abs=0.15), pytest.approx(2.5, abs=0.2))
    chance = np.array([C.calibrate(value, slope, offset) for value in sure])
    assert (chance - right).mean() == pytest.approx(0, abs=1e-3)
    assert ((chance - right) * odds).mean() == pytest.approx(0, abs=2e-3)
    assert (np.argsort(chance) == np.argsort(sure)).all()
    assert C.calibration(chance, right)[-1] < 0.03 < 0.3 < C.calibration(sure, right)[-1]
    for values, outcomes in (([0.2, 0.4], [True, True]), ([0.1, 0.2, 0.8, 0.9], [True, True, False, False])):
        with pytest.raises(ValueError, match="calibration: expected"):
            C.fit_calibration(values, outcomes)


def test_a_calibration_is_read_for_its_own_weights_alone(tmp_path):
    curves = {"mask": {"slope": 2.0, "offset": 1.0, "answers": 9}}
    (tmp_path / "manifest.json").write_text("one")
    assert C.read_calibration(tmp_path / "manifest.json") == {}
    assert C.write_calibration(tmp_path / "manifest.json", curves) == tmp_path / "calibration.json"
    assert C.read_calibration(tmp_path / "manifest.json") == {"mask": (2.0, 1.0)}
    (tmp_path / "manifest.json").write_text("other")
    assert C.read_calibration(tmp_path / "manifest.json") == {}
    C.write_calibration(tmp_path / "checkpoints/step-000003.ckpt", curves)
    assert C.read_calibration(tmp_path / "checkpoints/step-000003.ckpt") == {"mask": (2.0, 1.0)}
    assert C.read_calibration(tmp_path / "checkpoints/step-000004.ckpt") == {}
