"""The order of samples as a function: no file is read here."""

from __future__ import annotations

from collections import Counter

import pytest

from vistallm.data.order import Epoch, Mixture, Shard, check_layout, lane_groups

# 46 shards of three sources; in the first, two tasks lie side by side.
SHARDS = [
    *(Shard(f"a-{i}", "a", {"rec": 5 + i % 3, "res": 4}) for i in range(20)),
    *(Shard(f"b-{i}", "b", {"vqa": 11}) for i in range(24)),
    *(Shard(f"c-{i}", "c", {"caption": 3}) for i in range(2)),
]
ONCE = {("a", "rec"): 1.0, ("a", "res"): 1.0, ("b", "vqa"): 1.0, ("c", "caption"): 1.0}


def of_visit(visit):
    """The samples of a visit by name, in the order of the plan: task by task."""
    names = [(visit.shard, t.task, n, t.copy) for t in visit.takes for n in range(t.low, t.high)]
    return names[visit.start : visit.stop]


def of_lane(epoch, lane, lanes, skip=0, mix=4):
    """The samples of a lane in order."""
    found = []
    for visits, turns in lane_groups(epoch, lane, lanes, skip, mix):
        waiting = [iter(of_visit(visit)) for visit in visits]
        found += [next(waiting[turn]) for turn in turns]
        assert all(next(rest, None) is None for rest in waiting)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_each_sample_once_in_lanes_of_equal_length(ranks, workers):
    lanes = ranks * max(workers, 1)
    mixture = Mixture(SHARDS, ONCE)
    check_layout(mixture, lanes)
    for number in range(2):
        epoch = Epoch(mixture, seed=3, epoch=number)
        parts = [of_lane(epoch, lane, lanes) for lane in range(lanes)]
        assert len({*map(len, parts)}) <= 2
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        met = [sample for part in parts for sample in part]
        assert len(met) == len(set(met)) == mixture.total(number) == sum(sum(s.tasks.values()) for s in SHARDS)


@pytest.mark.parametrize("weight", [0.05, 0.3, 1.0, 1.6, 2.0])
def test_weights_are_exact_over_every_epoch_and_turn_through_all_samples(weight):
    mixture = Mixture(SHARDS, ONCE | {("b", "vqa"): weight})
    size, met = 24 * 11, Counter()
    for number in range(20):
        epoch = Epoch(mixture, 0, number)
        samples = [s for lane in range(3) for s in of_lane(epoch, lane, 3)]
        mine = [s for s in samples if s[1] == "vqa"]
        assert abs(len(mine) - weight * size) < 1
        assert len(mine) == mixture.samples(number)["b", "vqa"]
        assert len(set(mine)) == len(mine)
        met.update(sample[:3] for sample in mine)
        if weight < 1:  # what is read is what is used
            assert len({s[0] for s in mine}) <= weight * 24 + 2
    assert len(met) == size
    assert max(met.values()) - min(met.values()) <= 1, "each as often as any other"
    assert met.total() == round(20 * weight * size)


def test_the_order_is_a_function_of_seed_epoch_lane_and_nothing_else():
    mixture = Mixture(SHARDS, ONCE)
    lane = of_lane(Epoch(mixture, 1, 0), 1, 3)
    assert lane == of_lane(Epoch(Mixture(SHARDS, ONCE), 1, 0), 1, 3)
    for other in (Epoch(mixture, 2, 0), Epoch(mixture, 1, 1)):
        assert set(of_lane(other, 1, 3)) != set(lane), "other shards in the lane: permuted before they are split"
    assert len({sample[0] for sample in lane[:12]}) >= 3, "several shards side by side"


def test_skipping_is_leaving_out():
    epoch = Epoch(Mixture(SHARDS, ONCE | {("a", "res"): 1.7}), 0, 2)
    whole = of_lane(epoch, 2, 5)
    for skip in (0, 1, 17, len(whole) - 1, len(whole)):
        assert of_lane(epoch, 2, 5, skip) == whole[skip:]


def test_impossible_layouts_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"46 training shards for 64 lanes.*lower data.workers.*more, smaller shards"):
        check_layout(Mixture(SHARDS, ONCE), 64)
    with pytest.raises(ValueError, match=r"no training sample of the tasks pope; the shards hold a:rec"):
        Mixture(SHARDS, {("a", "pope"): 1.0})


def test_a_million_lanes_of_samples_are_planned_by_arithmetic():
    """512 ranks x 8 workers over 20,000 shards: balanced to one sample; nothing is enumerated."""
    shards = [Shard(f"s{i % 19}/train-{i:06d}.tar", f"s{i % 19}", {"rec": 300 + i % 83}) for i in range(20_000)]
    mixture = Mixture(shards, {(f"s{i}", "rec"): 1 / (1 + i % 3) for i in range(19)})
    check_layout(mixture, 4096)
    epoch, sizes, seen = Epoch(mixture, 0, 1), [], 0
    for lane in range(4096):
        visits = epoch.visits(lane, 4096)
        sizes.append(sum(visit.stop - visit.start for visit in visits))
        seen += len(visits)
    assert sum(sizes) == mixture.total(1)
    assert max(sizes) - min(sizes) <= 1
    assert len(epoch) <= seen <= len(epoch) + 4096


def test_the_fingerprint_follows_shards_and_weights():
    one = Mixture(SHARDS, ONCE).fingerprint()
    assert one == Mixture(SHARDS, ONCE | {("b", "rec"): 1.0}).fingerprint(), "a column without samples"
    assert one != Mixture(SHARDS[1:], ONCE).fingerprint()
    assert one != Mixture(SHARDS, ONCE | {("b", "vqa"): 2.0}).fingerprint()


def test_a_fraction_keeps_the_first_samples_of_every_column():
    mixture = Mixture(SHARDS, ONCE, 0.25)
    counts = {column: -(-n // 4) for column, n in Mixture(SHARDS, ONCE).samples(0).items()}
    assert mixture.samples(0) == mixture.samples(3) == counts
    met = [set(of_lane(Epoch(mixture, 0, epoch), 0, 1)) for epoch in (0, 3)]
    kept = [{(shard, task, n) for shard, task, n, _ in names} for names in met]
    assert kept[0] == kept[1], "the same samples in every epoch"
    assert {shard for shard, task, _ in kept[0] if task == "vqa"} == set(range(20, 26))
    assert mixture.fingerprint() != Mixture(SHARDS, ONCE).fingerprint()
    with pytest.raises(ValueError, match=r"data\.fraction=0: expected a share above 0"):
        Mixture(SHARDS, ONCE, 0)
