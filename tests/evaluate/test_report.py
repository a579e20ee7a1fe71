"""The report page: complete, self-contained, safe against what a model may write, and the same twice."""

import copy
import dataclasses
import doctest
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from vistallm.evaluate import benchmarks as B
from vistallm.evaluate import gallery, plots
from vistallm.evaluate.confidence import set_confidence
from vistallm.evaluate.report import TITLES, outcome, write_report
from vistallm.regions.codec import RegionCodec
from vistallm.regions.masks import polygons_to_rle
from vistallm.schema import Region
from vistallm.tasks import TASKS

BENCHMARKS = B.load_benchmarks()
VOID = {"meta", "input", "rect", "path", "circle", "image", "polyline", "use", "br", "line"}


class Balance(HTMLParser):
    """Collects cards, attributes that load something, and tags that are left open."""

    def __init__(self):
        super().__init__()
        self.open, self.cards, self.loads = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loads += [
            attrs[name] for name in ("src", "href", "xlink:href", "srcset") if not attrs.get(name, "#").startswith("#")
        ]
        if attrs.get("class") == "card":
            self.cards.append(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag


def parse(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture
def metrics_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = ["step,seconds,loss,lr,samples,val_loss,loss/res,val/res_ciou"]
    rows += [f"{i},0.5,{3 / i},0.001,8,,{2 / i}," for i in range(1, 30)] + ["30,,,,,0.5,,0.61"]
    path.write_text("\n".join(rows) + "\n")
    return path


def write(path, predictions, **options):
    scores = B.score(predictions, BENCHMARKS, RegionCodec(num_bins=101, points=12))
    write_report(path, scores, predictions, **options)
    return path.read_text(encoding="utf-8"), scores


def test_page_shows_every_task_and_loads_nothing(predictions, tmp_path, metrics_csv):
    spoilt = next(p for p in predictions if p.task == "res")
    spoilt.parsed, spoilt.failure, spoilt.text = None, "odd-count", "The mask is <m_st><bin_1><bin_2><bin_3>"
    images = {p.id: [np.full((i["height"], i["width"], 3), 90, np.uint8) for i in p.images] for p in predictions}
    page, scores = write(
        tmp_path / "report.html",
        predictions,
        images=images,
        history={"Stage 1": metrics_csv, "Stage 2": tmp_path / "absent.csv"},
        run={"answers per second": 12.5},
        config="seed: 7",
    )
    parser = parse(page)
    assert all(load.startswith("data:image/webp;base64,") for load in parser.loads)
    assert len(parser.loads) == sum(len(p.images) for p in predictions if p.id in page)
    assert not re.search(r"@import|url\((?!#)|<link|\$[a-z_]+\b", page)
    for name, one in scores.items():
        assert TITLES[one.task] in page
        assert {card["data-group"] for card in parser.cards if card["data-task"] == name} >= {"worst", "median", "best"}
        assert f"<strong>{100 * one.scores[one.headline]:.1f}</strong>" in page
        if one.ceiling:
            assert f'<td data-label="Ceiling">{100 * one.ceiling[one.headline]:.1f}</td>' in page
    assert [card["data-task"] for card in parser.cards if card["data-group"] == "unreadable"] == ["mini_res"]
    for text in (
        "odd-count",
        "Stage 1",
        "Validation scores",
        "30 steps",
        "12.5",
        "seed: 7",
        "10.0%",
        "res</span>",
    ):
        assert text in page, text
    assert "Stage 2" not in page


def test_without_images_masks_are_drawn_on_a_canvas(predictions, tmp_path):
    page, _ = write(tmp_path / "report.html", [p for p in predictions if p.task in ("res", "attcoseg")])
    parser = parse(page)
    assert parser.loads == []
    assert page.count('class="canvas"') >= len(parser.cards)
    assert 'class="answer"><path d="M' in page
    assert "id=training" not in page


def test_text_of_a_model_cannot_break_the_page(predictions, tmp_path):
    nasty = '</dd><script>alert("x")</script>&amp; $css <m_st'
    for prediction in predictions:
        prediction.text = prediction.prompt = prediction.target["answer"] = nasty
        prediction.id += '"><b>'
    chosen = [p for p in predictions if TASKS[p.task].kind == "mask"]
    page, _ = write(tmp_path / "report.html", chosen, run={"<i>run": "<s>"}, config="<u>")
    parse(page)
    assert page.count("<script>") == 1
    assert "<i>run" not in page
    assert "<s>" not in page
    assert "<u>" not in page


def linked(one):
    """The same answer by links."""
    other = dataclasses.replace(copy.deepcopy(one), benchmark=f"{one.benchmark}_link", head="link")
    other.text = "The mask is [GRD][GRD_1][GRD_2] ."
    for region in other.parsed.regions:
        if region.kind == "mask":
            region.rle = polygons_to_rle(region.polygons, one.images[0]["height"], one.images[0]["width"])
            region.polygons = None
    return other


def test_text_and_links_stand_side_by_side_on_the_same_samples(predictions, tmp_path):
    chosen = [p for p in predictions if p.task in ("res", "rec", "vqa")]
    chosen += [linked(p) for p in chosen if p.task == "res"]
    images = {p.id: [np.full((i["height"], i["width"], 3), 90, np.uint8) for i in p.images] for p in chosen}
    forced = [dataclasses.replace(copy.deepcopy(p), forced=True) for p in chosen if p.head == "link"]
    scores = B.score(chosen + forced, BENCHMARKS)
    earlier = {"before": {"mini_res": {"miou": 0.123}, "mini_res_link": {"miou": None}}, "empty": {}}
    write_report(tmp_path / "report.html", scores, chosen, images=images, beside=earlier)
    page = (tmp_path / "report.html").read_text()
    parser = parse(page)
    pairs = [card for card in parser.cards if card["data-task"] == "mini_res_link"]
    assert len(pairs) == 9
    assert {card["data-task"] for card in parser.cards} == {"mini_res_link", "mini_rec", "mini_vqa"}
    assert page.count('data-number="text"') == page.count('data-number="links"') == 9
    assert page.count('<use href="#') == 2 * 9, "image and truth of a pair are in the page once"
    assert len(parser.loads) == len(parser.cards), "a picture is in the page once"
    assert page.count("<b>[GRD]</b>") == 9
    assert "<th>Head</th>" in page
    assert '<td data-label="before">12.3</td>' in page
    assert 'data-label="empty"' not in page
    assert re.search(r'<td data-label="Teacher-forced">\d+\.\d<small>\+0\.0</small></td>', page)


def test_labels_and_keypoints_are_drawn(predictions):
    one = linked(next(p for p in predictions if p.task == "rec"))
    points = ((5.0, 6.0, 2), (7.0, 8.0, 1), (0.0, 0.0, 0))
    found = Region(0, "keypoints", label="red <star>", box=(1, 2, 30, 40), keypoints=points, confidence=0.9)
    doubtful = dataclasses.replace(found, label="moon", confidence=0.1)
    one.parsed = dataclasses.replace(one.parsed, regions=[found, doubtful])
    one.text = "red star [POSE][POSE_1], top [POSE][POSE_1], left [POSE][POSE_1], right [POSE][POSE_1]."
    answer = gallery.draw_pictures(one, None)[0]["answer"]
    assert "moon" not in answer
    assert "<title>red &lt;star&gt; 90%</title>" in answer
    assert ">red &lt;star&gt;</text>" in answer
    dots = re.findall(r'<circle class="(\w+)" cx="(\d+)".*?<title>(.*?)</title>', answer)
    assert dots == [("seen", "5", "top"), ("hidden", "7", "left")]
    corners = np.array([(1, 2), (9, 2), (5, 12)], np.float32)
    one.parsed.regions = [Region(0, "mask", label="bar", polygons=[corners])]
    assert re.search(r'<path d="M1 2L9 2L5 12Z"/></g><text x="1" y="[\d.]+" [^>]*>bar</text>', str(draw(one)))


def draw(one):
    return gallery.draw_pictures(one, None)[0]["answer"]


def test_same_input_same_page(predictions, tmp_path, metrics_csv):
    pages = [
        write(tmp_path / f"{name}.html", predictions, history={"Stage 1": metrics_csv})[0]
        for name in ("first", "second")
    ]
    assert pages[0] == pages[1]


def test_published_row_stands_beside_a_real_benchmark_only(predictions, tmp_path):
    chosen = [p for p in predictions if p.task == "res"]
    assert "VistaLLM-13B" not in write(tmp_path / "a.html", chosen)[0]
    row = {"model": "VistaLLM-13B", "source": "project page", "scores": {"miou": 77.2}}
    real = B.Benchmark("refcoco_val_res", "res", "coinit", "val", "refcoco", "mask", "miou", paper=(row,))
    for prediction in chosen:
        prediction.benchmark = real.name
    write_report(tmp_path / "b.html", B.score(chosen, {real.name: real}), chosen)
    page = (tmp_path / "b.html").read_text()
    assert "<td>VistaLLM-13B<small>project page</small></td>\n<td>77.2</td>" in page
    assert "refcoco_val_res" in page


def test_published_rows_of_all_systems_stand_in_a_table_of_their_own(predictions, tmp_path):
    chosen = [p for p in predictions if p.task == "res"]
    rows = [("VistaLLM-7B", {"miou": 74.5}), ("LISA", {"ciou": 74.1}), ("<b>odd", {"ciou": 1.0, "unknown": 2.0})]
    mine = BENCHMARKS["mini_res"]
    paper = tuple({"model": model, "source": "a source", "scores": scores} for model, scores in rows)
    real = dataclasses.replace(mine, name="refcoco_val_res", paper=paper)
    for prediction in chosen:
        prediction.benchmark = real.name
    scores = B.score(chosen, {real.name: real}, RegionCodec(num_bins=101, points=12))
    write_report(tmp_path / "report.html", scores, chosen)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parse(page)
    table = page[page.index('<table class="published">') : page.index("</table>", page.index('class="published"'))]
    texts = [re.sub(r"<[^>]+>", " ", row).split() for row in table.split("<tr")[2:]]
    ceiling = scores[real.name].ceiling
    assert texts[0][-2:] == ["100.0", "100.0"]
    assert texts[1][-2:] == [f"{100 * ceiling[name]:.1f}" for name in ("miou", "ciou")]
    assert [row[-1] for row in texts[2:]] == ["74.5", "74.1", "1.0"]
    assert "unknown" not in table
    assert "not comparable" not in table
    scores[real.name].size = 10834
    scores[real.name].paper[1]["note"] = "SEG token given"
    write_report(tmp_path / "report.html", scores, chosen)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{len(chosen)} samples: not comparable with rows of 10,834" in page
    assert "a source, SEG token given" in page


def test_speed_confidence_and_outcomes(predictions, tmp_path):
    chosen = [p for p in predictions if p.task in ("gres", "rec", "vqa")]
    for number, prediction in enumerate(chosen):
        regions = prediction.parsed.regions
        set_confidence(prediction.parsed, [0.2 + number / 50] * len(regions), 0.9 if regions else 0.2)
    rec = [0.2 + number / 50 for number, p in enumerate(chosen) if p.task == "rec"]  # confidences of right answers
    missed = next(p for p in chosen if p.task == "gres" and p.parsed.regions)
    missed.parsed.regions = []
    run = {"samples per second": 12.34, "seconds per image": 0.0512, "device": "CPU, 2 threads"}
    page, _ = write(tmp_path / "report.html", chosen, run=run)
    parse(page)
    for text in (
        "<dd>12.3</dd>",
        "<dd>0.0512</dd>",
        "Rejection, GRES",
        f"REC, ECE {100 * (1 - np.mean(rec)):.0f}%",
        "target missed 10%",
        ">Confidence<",
    ):
        assert text in page, text
    plain, _ = write(tmp_path / "plain.html", [p for p in predictions if p.task == "vqa"])
    assert "id=confidence" not in plain
    assert "tiles" not in plain.split("</style>")[1]


@pytest.mark.parametrize(
    ("metric", "empty", "regions", "score", "expected"),
    [
        ("masks", True, 0, 1.0, "right"),
        ("masks", True, 1, 0.0, "imagined"),
        ("masks", False, 0, 0.0, "missed"),
        ("masks", False, 1, 0.0, "elsewhere"),
        ("masks", False, 1, 0.3, "inexact"),
        ("boxes", False, 1, 0.8, "inexact"),
        ("box", False, 1, 0.6, "right"),
        ("vqa", False, 0, 0.3, "wrong"),
        ("vqa", False, None, 0.0, "unreadable"),
    ],
)
def test_outcome(predictions, metric, empty, regions, score, expected):
    one = next(p for p in predictions if p.task == "rec")
    one.target["empty"], one.score = empty, score
    one.parsed = None if regions is None else dataclasses.replace(one.parsed, regions=one.parsed.regions[:regions])
    assert outcome(one, metric) == expected


def test_gallery_picks_worst_median_and_best(predictions):
    for score, prediction in enumerate(predictions[:30]):
        prediction.score = score / 30
    predictions[5].parsed = None
    picked = gallery.pick(predictions[:30], per_group=2)
    assert [group for group, _ in picked] == ["unreadable"] + ["worst"] * 2 + ["median"] * 2 + ["best"] * 2
    assert [round(30 * p.score) for _, p in picked] == [5, 0, 1, 14, 15, 29, 28]
    few = gallery.pick(predictions[:3], per_group=2)
    assert len({id(p) for _, p in few}) == len(few) == 3


def test_every_task_has_a_title():
    assert set(TITLES) >= set(TASKS)


def test_short_text():
    assert doctest.testmod(gallery).failed == 0
    assert gallery.short_text("<m_st><bin_1><bin_2><bin_3><bin_4><bin_5><bin_6><m_ed>") == "<b>[mask, 3 points]</b>"
    assert gallery.short_text("<m_st><m_ed>") == "<b>[mask, none]</b>"
    assert gallery.short_text("a star [DET] [DET_1][DET_2], bar[DET]") == "a star <b>[DET]</b>, bar<b>[DET]</b>"


def test_precision_curve_equals_counting():
    x, y = plots.precision_curve([0.0, 0.255, 1.0])
    assert (y[0], y[25], y[26], y[100]) == (1, pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert len(x) == 101


def test_curve_averages_runs_of_rows_and_skips_blanks(metrics_csv):
    columns = plots.read_columns(metrics_csv)
    steps, loss = plots.curve(columns, "loss", points=10)
    assert len(steps) == 10
    assert loss[0] == pytest.approx(np.mean([3, 1.5, 1]))
    assert plots.curve(columns, "val_loss")[1].tolist() == [0.5]
    assert plots.curve(columns, "nothing") is None


def test_page_with_a_photograph_for_every_answer_is_below_a_megabyte(predictions, tmp_path):
    rng = np.random.default_rng(0)

    def photograph(size):
        coarse = rng.integers(0, 255, (48, 64, 3), np.uint8)  # 240 pixels of it are a JPEG of 15 kB
        return cv2.resize(coarse, (size["width"] * 3, size["height"] * 3), interpolation=cv2.INTER_CUBIC)

    images = {p.id: [photograph(size) for size in p.images] for p in predictions}
    scores = B.score(predictions, BENCHMARKS)
    write_report(tmp_path / "report.html", scores, predictions, images=images)
    page = (tmp_path / "report.html").read_bytes()
    assert page.count(b"data:image/webp") > 150
    assert len(page) < 1_000_000


def test_images_of_a_page_have_a_budget():
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    few, many = (gallery.embed_images({str(i): [noise] for i in range(count)}) for count in (2, 32))
    assert sum(len(uri) for group in many.values() for uri in group) <= gallery.IMAGE_BYTES
    assert len(few["0"][0]) > 4 * len(many["0"][0])
    assert gallery.embed_images({}) == {}
