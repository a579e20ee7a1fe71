"""How sure an answer is: token log-probabilities -> a confidence per region, and what such confidences are worth.

The confidence of a region is the geometric mean of the model's probabilities of its tokens: coordinates, `<m_part>`,
and the separator or closing marker that ends it, each a softmax over the whole vocabulary, before the grammar.
`presence` is one minus the probability of an empty pair just after the first opening marker: below 0.5 the answer says
"no target". Both rank answers; neither is a probability of being right, which is what `calibration` shows. The
confidence of a region that a link found is its score, and COCO AP ranks by either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit
from torch import Tensor
from transformers import LogitsProcessor

from vistallm.evaluate.grammar import RegionGrammar, Role
from vistallm.model.checkpoint import MANIFEST
from vistallm.schema import Parsed, Prediction

RIGHT_FROM = dict.fromkeys(("mask", "masks", "prompted", "context", "semseg", "coseg", "box"), 0.5)
RIGHT_FROM |= dict.fromkeys(("boxes", "detection", "pose", "candidates"), 1.0)
"""Score from which a sample of a metric counts as right: IoU at least 0.5, every object, the right candidate."""


class TokenLog(LogitsProcessor):
    """Runs the grammar, if there is one, and notes how probable each token is that the answer takes."""

    def __init__(self, roles: np.ndarray, grammar: RegionGrammar | None = None) -> None:
        self.roles, self.grammar = roles, grammar
        self.stops = torch.from_numpy(np.flatnonzero(roles == Role.STOP))
        self.scores: Tensor | None = None  # (B, V) of the last step, whose token is not known yet
        self.taken: list[Tensor] = []
        self.ended: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the masked scores (B, V)."""
        if self.scores is not None:
            self.taken.append(self._logarithm(input_ids[:, -1]))
        self.scores = scores
        self.ended.append(scores[:, self.stops.to(scores.device)].logsumexp(1) - scores.logsumexp(1))
        return scores if self.grammar is None else self.grammar(input_ids, scores)

    def _logarithm(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of these (B,) tokens of the last step, (B,)."""
        assert self.scores is not None, "called before the first step"
        return self.scores.gather(1, tokens[:, None])[:, 0] - self.scores.logsumexp(1)

    def read(self, rows: Sequence[Sequence[int]]) -> list[tuple[list[float], float | None]]:
        """Return, for each answer (token ids without the end token), its regions' confidences and its presence.

        The answers may be of the whole generation, or of what is generated so far.
        """
        steps = len(self.taken)
        last = torch.tensor([row[steps] if len(row) > steps else 0 for row in rows], device=self.ended[0].device)
        both = [*self.taken, self._logarithm(last)], self.ended
        taken, ended = (torch.stack(steps, 1).double().cpu().numpy() for steps in both)
        return [read_confidence(self.roles[list(row)], taken[number], ended[number]) for number, row in enumerate(rows)]


def read_confidence(roles: np.ndarray, taken: np.ndarray, ended: np.ndarray) -> tuple[list[float], float | None]:
    """Split an answer into its regions: one confidence in [0, 1] for each, and the presence, None without any group.

    Args:
        roles: (T,) `Role` of each token.
        taken: (>= T,) log-probability of each.
        ended: (>= T,) log-probability of any closing marker in its place.
    """
    confidences, presence, start = [], None, 0
    for index, token in enumerate(roles.tolist()):
        if token == Role.START:
            start = index + 1
            if presence is None and start < len(roles):
                presence = float(1 - np.exp(min(0.0, ended[start])))
        elif token in (Role.SEPARATOR, Role.STOP):
            if (roles[start:index] == Role.BIN).any():
                confidences.append(float(np.exp(taken[start : index + 1].mean())))
            start = index + 1
    return confidences, presence


def set_confidence(parsed: Parsed, confidences: Sequence[float], presence: float | None) -> None:
    """Write confidences beside the regions they belong to, in place; nothing where free decoding left them uneven."""
    parsed.presence = presence
    if len(confidences) == len(parsed.regions):
        for region, confidence in zip(parsed.regions, confidences, strict=True):
            region.confidence = confidence


def answer_confidence(prediction: Prediction) -> float | None:
    """Return the mean confidence of an answer's regions, 1 - presence for "no target", None where none is known."""
    parsed = prediction.parsed
    if parsed is None or parsed.kind == "text":
        return None
    if not parsed.regions:
        return None if parsed.presence is None else 1 - parsed.presence
    regions = prediction.sure_regions or parsed.regions
    known = [region.confidence for region in regions if region.confidence is not None]
    return sum(known) / len(known) if len(known) == len(regions) else None


def calibration(
    confidence: Sequence[float], right: Sequence[bool], bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Compare one or more confidences in [0, 1] with whether the answers were right.

    Returns:
        Of the k bins of equal width that hold an answer: (k,) mean confidence, share right and number of answers; and
        the expected calibration error (Guo et al. 2017), the mean of |confidence - share right| weighted by answers.

    >>> round(calibration([0.95, 0.85, 0.25], [True, False, False])[-1], 4)
    0.3833
    """
    sure, hit = np.asarray(confidence, float), np.asarray(right, float)
    number = np.minimum((sure * bins).astype(int), bins - 1)
    answers = np.bincount(number, minlength=bins)
    used = answers > 0
    mean, share = (np.bincount(number, values, bins)[used] / answers[used] for values in (sure, hit))
    return mean, share, answers[used], float((np.abs(mean - share) * answers[used]).sum() / len(sure))


def fit_calibration(confidence: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """Slope and offset for `calibrate`, the most likely ones (Platt 1999, with his targets against overfitting).

    Raises:
        ValueError: answers of one outcome alone, or confidences that do not rise with being right.
    """
    odds, hit = _log_odds(np.asarray(confidence, float)), np.asarray(right, bool)
    if len({*hit.tolist()}) < 2:
        raise ValueError(f"calibration: expected right and wrong answers, got {hit.sum()} right of {len(hit)}")
    target = np.where(hit, (hit.sum() + 1) / (hit.sum() + 2), 1 / ((~hit).sum() + 2))
    slope, offset = minimize(
        lambda w: (np.logaddexp(0, w[0] * odds + w[1]) - target * (w[0] * odds + w[1])).sum(), (1, 0)
    ).x
    if slope <= 0:
        raise ValueError(f"calibration: expected confidences that rise with being right, got a slope of {slope:.3g}")
    return float(slope), float(offset)


def calibrate(confidence: float, slope: float, offset: float) -> float:
    """Turn a confidence into the chance of being right, in [0, 1]; the order of confidences stays."""
    return float(expit(slope * _log_odds(np.asarray(confidence)) + offset))


def write_calibration(checkpoint: Path, curves: Mapping[str, Mapping[str, float]]) -> Path:
    """Write {mask, box, presence: {slope, offset, ...}} beside the weights that they are of; return the file."""
    path, weights = _calibration_of(checkpoint)
    path.write_text(json.dumps({"weights": weights, **curves}, indent=1) + "\n")
    return path


def read_calibration(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """Slope and offset by name, as `write_calibration` left them; none without a file of just these weights."""
    path, weights = _calibration_of(checkpoint)
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.pop("weights", None) != weights:
        return {}
    return {name: (curve["slope"], curve["offset"]) for name, curve in record.items()}


def _calibration_of(checkpoint: Path) -> tuple[Path, str]:
    """Place of the calibration, and what tells weights from others: a manifest holds hashes, a run counts steps."""
    if checkpoint.name == MANIFEST:
        return checkpoint.with_name("calibration.json"), hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    return checkpoint.parent.parent / "calibration.json", checkpoint.name


def _log_odds(confidence: np.ndarray) -> np.ndarray:
    return logit(np.clip(confidence, 1e-6, 1 - 1e-6))


def rejection_curve(predictions: Sequence[Prediction]) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Scores of a benchmark with no-target samples when its least present answers count as "no target" too.

    Returns:
        "N-acc", "T-acc" and "score" (mean of the samples' scores: gIoU for masks) against the share of the answers with
        regions that is rejected, lowest presence first (then confidence), each (101,) float64; at 0 they are the scores
        as answered. None without presences or without both sorts of samples.
    """
    answers = [p.parsed for p in predictions]
    empty = np.array([bool(p.target.get("empty")) for p in predictions])
    if all(one is None or one.presence is None for one in answers) or empty.all() or not empty.any():
        return None
    none = np.array([one is not None and not one.regions for one in answers])
    given = np.array([one is not None and bool(one.regions) for one in answers])
    score = np.array([p.score or 0.0 for p in predictions])

    def key(index: int) -> tuple[float, float]:
        one = answers[index]
        presence = 1.0 if one is None or one.presence is None else one.presence
        return presence, answer_confidence(predictions[index]) or 0.0

    order = sorted(np.flatnonzero(given).tolist(), key=key)
    rank = np.full(len(predictions), len(predictions))
    rank[order] = np.arange(len(order))
    shares = np.linspace(0, 1, 101)
    rejected = none | (rank < np.rint(shares * len(order))[:, None])
    lines = {
        "N-acc": rejected[:, empty].mean(1),
        "T-acc": (given & ~rejected)[:, ~empty].mean(1),
        "score": np.where(rejected & ~none, empty, score).mean(1),
    }
    return {name: (shares, line) for name, line in lines.items()}
