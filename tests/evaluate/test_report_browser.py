"""The report page in a real headless browser: filters by clicking, text beside links, and phone width."""

import copy
import dataclasses

import numpy as np
import pytest

from vistallm.evaluate import benchmarks as B
from vistallm.evaluate.report import write_report
from vistallm.regions.masks import polygons_to_rle

pytestmark = pytest.mark.slow


def linked(one):
    """The same answer by links."""
    other = dataclasses.replace(copy.deepcopy(one), benchmark=f"{one.benchmark}_link", head="link")
    for region in other.parsed.regions:
        region.rle = polygons_to_rle(region.polygons, one.images[0]["height"], one.images[0]["width"])
        region.polygons = None
    return other


@pytest.fixture
def report(predictions, tmp_path):
    """A page of all tasks: half of the REC answers are of no score, one GRES answer can't be read, RES has links."""
    for one in [p for p in predictions if p.task == "rec"][::2]:
        one.parsed.regions[0].box = (0, 0, 1, 1)
    spoilt = next(p for p in predictions if p.task == "gres")
    spoilt.text, spoilt.parsed, spoilt.failure = "<m_st>" + "<bin_1>" * 80, None, "unclosed"
    chosen = predictions + [linked(p) for p in predictions if p.task == "res"]
    images = {p.id: [np.full((i["height"], i["width"], 3), 90, np.uint8) for i in p.images] for p in chosen}
    write_report(tmp_path / "report.html", B.score(chosen, B.load_benchmarks()), chosen, images=images)
    return (tmp_path / "report.html").as_uri()


def shown(page, attribute="task"):
    return page.locator(".card:visible").evaluate_all(f"cards => cards.map(card => card.dataset.{attribute})")


def test_filters_are_clicked(report, open_page):
    page = open_page(1200)
    page.goto(report)
    everything = page.locator(".card").count()
    assert len(shown(page)) == 24
    while page.locator(".more").is_visible():
        page.locator(".more").click()
    assert len(shown(page)) == everything > 100
    assert page.locator(".filters output").inner_text() == f"{everything} of {everything} shown"

    page.locator("[name=task]").select_option("mini_rec")
    assert set(shown(page)) == {"mini_rec"}
    page.locator("[name=low]").fill("50")
    assert min(map(float, shown(page, "score"))) > 0.9
    page.locator("[name=low]").fill("0")
    page.locator("[name=high]").fill("10")
    assert set(shown(page, "score")) == {"0.0000"}
    page.locator("[name=high]").fill("100")
    page.locator("[name=task]").select_option("")
    page.locator("[name=group]").select_option("unreadable")
    assert shown(page) == ["mini_gres"]
    page.locator("[name=group]").select_option("")

    page.locator("[name=task]").select_option("mini_res_link")
    layer = page.locator(".card:visible .answer path").first
    assert layer.is_visible()
    page.locator("[name=answer]").uncheck()
    assert not layer.is_visible()
    assert page.locator(".card:visible .truth path").first.is_visible()
    page.locator("[name=truth]").uncheck()
    assert not page.locator(".card:visible .truth path").first.is_visible()


@pytest.mark.parametrize("width", [1200, 400, 320])
def test_links_stand_beside_text_and_nothing_is_wider_than_the_screen(report, open_page, width):
    page = open_page(width)
    page.goto(report)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("[name=task]").select_option("mini_res_link")
    text, link = (page.locator(".card:visible").first.locator(".picture").nth(i).bounding_box() for i in (0, 1))
    assert text["x"] + text["width"] <= link["x"]
    assert text["y"] == link["y"]
    assert min(text["width"], link["width"]) >= 110
    small = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(node => node.offsetParent && node.innerText?.trim()
            && !node.children.length && parseFloat(getComputedStyle(node).fontSize) < 10).map(node => node.innerText)"""
    )
    assert small == []
