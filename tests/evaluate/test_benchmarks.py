"""Scores from predictions alone: perfect, unreadable and hand-worked answers, the ceiling, the file's round trip."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from vistallm.config import Config
from vistallm.evaluate import benchmarks as B
from vistallm.evaluate import predictions as P
from vistallm.metrics import SCORE_NAMES
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.mini.link_tasks import LINK_MAKERS
from vistallm.mini.tasks import MAKERS
from vistallm.mini.videos import VIDEO_MAKERS
from vistallm.regions.masks import mask_to_rle, polygons_to_rle
from vistallm.schema import Parsed, Prediction, Region
from vistallm.tasks import TASKS

BENCHMARKS = B.load_benchmarks()


def square(x, y, side=4):
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], np.float32)


def mask_prediction(name, predicted, target, failure=None, size=(10, 20), benchmark="mini_gres"):
    """Squares given as (x, y); `predicted` None = unreadable."""
    height, width = size
    regions = (
        None if predicted is None else [Region(0, "mask", i, polygons=[square(*p)]) for i, p in enumerate(predicted)]
    )
    return Prediction(
        id=name,
        benchmark=benchmark,
        task=BENCHMARKS[benchmark].task,
        prompt="",
        text="",
        parsed=None if regions is None else Parsed("mask", regions, ""),
        failure=failure,
        images=[{"width": width, "height": height}],
        target={
            "regions": [
                Region(0, "mask", i, rle=polygons_to_rle([square(*t)], height, width)).to_json()
                for i, t in enumerate(target)
            ],
            "answer": "",
            "empty": not target,
        },
    )


def test_every_mini_task_has_a_benchmark(predictions):
    mini = [b for b in BENCHMARKS.values() if b.data == "mini" and not b.needs_video]
    assert {b.task for b in BENCHMARKS.values() if b.data == "mini" and b.needs_video} == set(VIDEO_MAKERS)
    assert {b.task for b in mini if not b.needs_links} == {p.task for p in predictions} == set(MAKERS)
    linked = {task for task in TASKS if task in MAKERS | LINK_MAKERS and TASKS[task].link}
    assert {b.task for b in mini if b.head == "link"} == linked
    assert {b.task for b in mini if b.needs_links and b.head == "text"} == set(LINK_MAKERS) - {"pose"}


@pytest.mark.parametrize("task", [task for task in LINK_MAKERS if task != "pose"])
def test_perfect_texts_of_link_tasks_reach_the_polygons_ceiling(task, codec, perfect):
    name = f"mini_{task}_text"
    rows = [perfect(make_sample(MiniRecipe(), "test", task, serial)[0], codec) for serial in range(10)]
    one = B.score([dataclasses.replace(row, benchmark=name) for row in rows], BENCHMARKS)[name]
    assert one.unreadable == 0
    assert one.scores[one.headline] > 0.9
    if task == "det":
        assert one.scores["f1_precision"] == 1


def test_perfect_answers_reach_the_ceiling(predictions, codec):
    scores = B.score(predictions, BENCHMARKS, codec)
    assert list(scores) == [n for n, b in BENCHMARKS.items() if b.data == "mini" and not b.needs_links | b.needs_video]
    for name, one in scores.items():
        assert one.unreadable == 0
        if one.ceiling is not None:
            assert one.scores == one.ceiling
            assert 0.9 < one.scores[one.headline] <= 1
        elif one.metric == "caption":
            assert one.scores["exact"] == 1
        else:
            assert one.scores[one.headline] == pytest.approx(1), name
    assert scores["mini_gres"].scores["n_acc"] == 1
    assert scores["mini_nlvr2"].scores["consistency"] == 1
    assert scores["mini_vcr"].scores["q_ar"] == 1
    assert all(p.score > 0.8 for p in predictions if p.task not in ("caption", "reg"))


def test_unreadable_answers_are_wrong_by_every_score(unreadable):
    for one in B.score(unreadable, BENCHMARKS).values():
        assert one.unreadable == 1
        assert one.failures == {"unclosed": one.n}
        assert set(one.scores.values()) <= {0, None}, one.name
    assert {p.score for p in unreadable} == {0.0}


def test_gres_by_hand():
    scores = B.score(
        [
            mask_prediction("half", [(0, 0)], [(0, 0), (6, 0)]),  # I 16, U 32
            mask_prediction("none", [], []),  # right
            mask_prediction("false-mask", [(0, 0)], []),  # U 16
            mask_prediction("missed", [], [(0, 0)]),  # U 16
            mask_prediction("unreadable", None, [(0, 0)], "odd-count"),  # U 16
            mask_prediction("unreadable-none", None, [], "unclosed"),
        ],
        BENCHMARKS,
    )["mini_gres"]
    assert scores.scores["giou"] == pytest.approx((0.5 + 1) / 6)
    assert scores.scores["ciou"] == pytest.approx(16 / (32 + 16 + 16 + 16))
    assert scores.scores["n_acc"] == pytest.approx(1 / 3)
    assert scores.scores["t_acc"] == pytest.approx(1 / 3)
    assert scores.scores["pr50"] == pytest.approx(1 / 3)
    assert scores.unreadable == pytest.approx(2 / 6)
    assert scores.failures == {"odd-count": 1, "unclosed": 1}


def test_overlapping_objects_count_their_pixels_once():
    one = B.score([mask_prediction("a", [(0, 0), (0, 0)], [(0, 0)], benchmark="mini_res")], BENCHMARKS)["mini_res"]
    assert one.scores["miou"] == one.scores["ciou"] == 1


def test_the_drawn_prediction_meets_the_full_mask_not_its_polygon():
    predicted = mask_prediction("a", [(0, 0)], [(0, 0)], benchmark="mini_res")
    truth = np.zeros((10, 20), bool)
    truth[0:4, 0:4] = True
    truth[9, 19] = True  # a pixel that no polygon of the answer has
    predicted.target["regions"][0]["rle"] = mask_to_rle(truth)
    assert B.score([predicted], BENCHMARKS)["mini_res"].scores["miou"] == pytest.approx(16 / 17)


def test_coseg_by_hand():
    pair = [mask_prediction("a", [(0, 0)], [(0, 0)], benchmark="mini_attcoseg") for _ in range(1)]
    pair[0].images = [{"width": 20, "height": 10}] * 3
    scores = B.score(pair, BENCHMARKS)["mini_attcoseg"].scores
    assert scores["av_j"] == 1  # the two images without target or mask earn nothing
    assert scores["images_right"] == 1
    pair[0].parsed.regions[0].image = 1
    scores = B.score(pair, BENCHMARKS)["mini_attcoseg"].scores
    assert scores["av_j"] == 0
    assert scores["av_p"] == pytest.approx(1 - 2 * (16 / 200) / 3)
    assert scores["images_right"] == 0


def test_held_out_split(predictions):
    chosen = [p for p in predictions if p.task == "pope"]
    for number, prediction in enumerate(chosen):
        prediction.target["meta"]["held_out"] = number < 3
        if number < 3:
            prediction.parsed.answer = {"yes": "no", "no": "yes"}[prediction.parsed.answer]
    splits = B.score(chosen, BENCHMARKS)["mini_pope"].splits
    assert splits["held_out"]["n"] == 3
    assert splits["held_out"]["scores"]["accuracy"] == 0
    assert splits["seen"]["scores"]["accuracy"] == 1


def test_v7w_takes_the_candidate_the_answer_means(predictions):
    chosen = [p for p in predictions if p.task == "v7w"]
    for prediction in chosen:
        x0, y0, x1, y1 = prediction.parsed.regions[0].box
        prediction.parsed.regions[0].box = (x0 + 2, y0 - 2, x1 + 2, y1 - 2)
    assert B.score(chosen, BENCHMARKS)["mini_v7w"].scores["accuracy"] == 1
    for prediction in chosen:
        wrong = next(c for c in prediction.target["candidates"] if c != prediction.target["regions"][0]["box"])
        prediction.parsed.regions[0].box = tuple(wrong)
    assert B.score(chosen, BENCHMARKS)["mini_v7w"].scores["accuracy"] == 0


def by_links(rows):
    return [dataclasses.replace(one, benchmark=f"{one.benchmark}_link", head="link") for one in rows]


def test_links_answer_benchmarks_of_their_own(predictions, codec, tmp_path):
    chosen = [p for p in predictions if p.task in ("res", "rec")]
    linked = by_links(chosen)
    for one in linked:
        for region in one.parsed.regions:
            if region.kind == "mask":
                region.rle = polygons_to_rle(region.polygons, one.images[0]["height"], one.images[0]["width"])
                region.polygons = None
    P.write_predictions(chosen + linked, tmp_path / "p.jsonl")
    text = (tmp_path / "p.jsonl").read_text()
    assert text.count('"head": "link"') == text.count('"head"') == len(linked)
    scores = B.score(P.read_predictions(tmp_path / "p.jsonl", P.Faults()), BENCHMARKS, codec)
    for task in ("res", "rec"):
        assert scores[f"mini_{task}_link"].scores == scores[f"mini_{task}"].scores
    assert (scores["mini_res_link"].head, scores["mini_res_link"].ceiling) == ("link", None)
    assert scores["mini_res"].ceiling is not None
    B.write_scores(scores, tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())["benchmarks"]
    assert record["mini_res_link"]["head"] == "link"
    assert "head" not in record["mini_res"]
    assert B.read_scores(tmp_path / "scores.json") == {name: one.scores for name, one in scores.items()}
    with pytest.raises(ValueError, match="expected the scores.json"):
        B.read_scores(tmp_path / "p.jsonl")


def test_teacher_forced_answers_are_scored_beside_free_running_ones(predictions, tmp_path):
    free = by_links([p for p in predictions if p.task == "rec"])
    forced = [dataclasses.replace(one, forced=True) for one in copy.deepcopy(free)]
    for one in free[:5]:
        one.parsed = None
    P.write_predictions([*free, *forced], tmp_path / "p.jsonl")
    faults = P.Faults()
    scores = B.score(P.read_predictions(tmp_path / "p.jsonl", faults), BENCHMARKS, faults=faults)["mini_rec_link"]
    assert (scores.n, scores.scores["p_at_50"], scores.teacher_forced["p_at_50"]) == (10, 0.5, 1)
    assert not faults.found
    forced[0].target = {"regions": []}
    with pytest.raises(ValueError, match=forced[0].id):
        B.score([*free, *forced], BENCHMARKS)


def test_what_is_answered_follows_from_links_and_answer():
    def chosen(links, answer="both", names=None, video="embedding"):
        config = Config(answer=answer)
        config.model.links, config.model.video = links, video
        return list(B.select_benchmarks(BENCHMARKS, names, "mini", config))

    both = chosen("all")
    assert both == [name for name, one in BENCHMARKS.items() if one.data == "mini"]
    assert chosen("all", "link") == [name for name in both if BENCHMARKS[name].head == "link"]
    assert chosen("all", "text") == [name for name in both if BENCHMARKS[name].head == "text"]
    assert chosen("none") == chosen("none", "text") == [name for name in both if not BENCHMARKS[name].needs_links]
    assert chosen("none", "link") == []
    assert chosen("all", video="none") == [name for name in both if not BENCHMARKS[name].needs_video]
    assert chosen("all", names=["mini_video_qa"], video="none") == ["mini_video_qa"]
    with pytest.raises(ValueError, match=r"mini_res_link: expected a model with links, got model\.links=none"):
        chosen("none", names=["mini_res", "mini_res_link"])
    with pytest.raises(ValueError, match="head: expected one of text, got 'link'"):
        B.Benchmark("x", "vqa", "mini", "test", head="link")


def test_errors_name_what_is_wrong(predictions, tmp_path):
    one = predictions[0]
    with pytest.raises(ValueError, match="more than once"):
        B.score([one, one], BENCHMARKS)
    with pytest.raises(ValueError, match="nearest: mini_res"):
        B.select_benchmarks(BENCHMARKS, ["mini_re"], "mini")
    one.benchmark = "refcoco_vla_res"
    with pytest.raises(ValueError, match="nearest: refcoco_val_res"):
        B.score([one], BENCHMARKS)
    for text in ("not json", '{"id": "a"}'):
        (tmp_path / "bad.jsonl").write_text(text + "\n")
        with pytest.raises(ValueError, match="line 1"):
            P.read_predictions(tmp_path / "bad.jsonl", P.Faults())
    (tmp_path / "bad.yaml").write_text("x: {task: nope, data: mini, split: test}\ny: {task: res, colour: red}\n")
    with pytest.raises(ValueError, match=r"nope[\s\S]*y: [\s\S]*unexpected[\s\S]*colour"):
        B.load_benchmarks(tmp_path / "bad.yaml")


def test_a_target_with_polygons_too_is_still_its_full_mask():
    predicted = mask_prediction("a", [(0, 0)], [(0, 0)], benchmark="mini_res")
    predicted.target["regions"][0]["polygons"] = [square(6, 6).tolist()]
    assert B.score([predicted], BENCHMARKS)["mini_res"].scores["miou"] == 1


def test_the_order_of_the_predictions_changes_no_score(predictions, codec):
    scores = B.score(predictions, BENCHMARKS, codec)
    assert B.score(predictions[::-1], BENCHMARKS, codec) == scores


@pytest.mark.parametrize("task", ["vqa", "caption", "rec", "grec", "v7w", "pope", "coseg"])
def test_a_missing_target_is_no_score_of_zero(task, predictions):
    chosen = [p for p in predictions if p.task == task][:2]
    chosen[1].target = {"regions": [], "answer": "", "meta": {}}
    with pytest.raises(ValueError, match=chosen[1].id):
        B.score(chosen, BENCHMARKS)


def test_an_answer_that_names_a_region_without_pixels_is_no_no_target():
    speck = mask_prediction("a", [], [])
    speck.parsed.regions = [Region(0, "mask", 0, polygons=[square(3, 3, 0.01)])]
    scores = B.score([speck, mask_prediction("b", [], [])], BENCHMARKS)["mini_gres"].scores
    assert scores["giou"] == scores["n_acc"] == 0.5


def test_instance_scores_weigh_every_object_alike():
    rows = [
        mask_prediction(name, [(0, 0)], [(x, 0)], benchmark="refcoco_val_res")
        for name, x in (("a", 0), ("b", 0), ("c", 8))
    ]
    for row, ref_id in zip(rows, (1, 1, 2), strict=True):
        row.target["meta"] = {"ref_id": ref_id}
    scores = B.score(rows, BENCHMARKS)["refcoco_val_res"].scores
    assert scores["miou"] == pytest.approx(2 / 3)
    assert scores["miou_instance"] == scores["pr50_instance"] == 0.5
    rows[0].target["meta"] = {}
    assert B.score(rows, BENCHMARKS)["refcoco_val_res"].scores["miou_instance"] is None


def test_coseg_is_averaged_per_image_then_per_class():
    rows = [
        mask_prediction(name, [(0, 0)], [(x, 0)], benchmark="coseg-icoseg_test")
        for name, x in (("a", 0), ("b", 0), ("c", 8))
    ]
    for row, name in zip(rows, ("bear", "bear", "kite"), strict=True):
        row.target["meta"] = {"class": name}
    one = B.score(rows, BENCHMARKS)["coseg-icoseg_test"]
    assert one.scores["av_j"] == pytest.approx(2 / 3)
    assert one.scores[one.headline] == 0.5
    assert one.headline == "av_j_class"


def words_prediction(name, said, benchmark, target="", **meta):
    return Prediction(
        id=name,
        benchmark=benchmark,
        task=BENCHMARKS[benchmark].task,
        prompt="",
        text="",
        parsed=Parsed("text", [], said),
        failure=None,
        images=[{"width": 9, "height": 9}],
        target={"regions": [], "answer": target, "empty": False, "meta": meta},
    )


def test_looktwice_is_scored_by_what_is_asked():
    asked = [("2", "object"), ("2", "object"), ("3", "object"), ("2", "super")]
    rows = [
        words_prediction(str(i), said, "looktwice_test_box", "2", asks=asks) for i, (said, asks) in enumerate(asked)
    ]
    scores = B.score(rows, BENCHMARKS)["looktwice_test_box"].scores
    assert scores["accuracy"] == 0.75
    assert scores["accuracy_object"] == pytest.approx(2 / 3)
    assert (scores["accuracy_super"], scores["accuracy_general"]) == (1, None)


def test_answers_that_the_dataset_keeps_are_counted_and_not_scored():
    rows = [words_prediction(str(i), "2", "vqav2_test-dev", "unknown", unlabelled=True) for i in range(3)]
    one = B.score(rows, BENCHMARKS)["vqav2_test-dev"]
    assert (one.n, one.unlabelled, one.scores["accuracy"]) == (3, 3, None)


def test_phrases_take_the_first_box_and_any_of_theirs():
    row = words_prediction("a", "", "flickr30k_test_grounding")
    row.parsed = Parsed("box", [Region(0, "box", 0, box=(0, 0, 4, 4)), Region(0, "box", 1, box=(0, 0, 8, 8))], "")
    row.target["regions"] = [
        Region(0, "box", i, box=box).to_json() for i, box in enumerate([(0, 0, 4, 4), (4, 4, 8, 8)])
    ]
    assert B.score([row], BENCHMARKS)["flickr30k_test_grounding"].scores == {"recall_any": 1, "recall_merged": 0}


def test_real_benchmarks_name_scores_that_exist():
    for name, one in BENCHMARKS.items():
        names = set(one.new_metric().compute())
        assert one.headline in names, name
        assert names <= set(SCORE_NAMES), name
        for row in one.paper:
            assert set(row["scores"]) <= names, (name, row)
            assert all(0 < value < 130 for value in row["scores"].values())
