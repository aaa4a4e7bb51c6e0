"""The report in a real browser: what it shows, what it asks of the network, and how it fits a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from manyviews.data import InMemory
from manyviews.report import write_report
from report_findings import findings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: chromium, chromium-browser or google-chrome")
HOSTILE = "</script><script>console.error('run')</script>"
WORDS = '"><img src=x onerror=console.error(1)>'


class Seen(NamedTuple):
    """A page in the browser, and what it has said and asked for."""

    page: Any
    said: list[str]
    asked: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = findings(tmp_path_factory.mktemp("browser") / "run", (HOSTILE, "coat " * 30, "dress" * 30), curves=True)
    assert isinstance(given.test, InMemory)
    named = InMemory(given.test.pixels, [WORDS] * 60, given.test.labels, given.test.classes, "0" * 64)
    ids = torch.arange(9)
    # A lattice: every point has room of its own, and right of the middle one there is one.
    points = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    return write_report(given._replace(test=named, points={"pca": (ids, points), "tsne": (ids, -points)}))


def opened(browser: Any, file: Path, width: int, height: int, **context: Any) -> Seen:
    page = browser.new_page(viewport={"width": width, "height": height}, **context)
    seen = Seen(page, [], [])
    page.on("console", lambda message: seen.said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.on("request", lambda request: seen.asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelector('canvas.points').width > 0")
    return seen


@pytest.fixture(scope="module")
def desktop(browser: Any, file: Path) -> Seen:
    return opened(browser, file, 1280, 900, color_scheme="light")


@pytest.fixture(scope="module")
def phone(browser: Any, file: Path) -> Seen:
    return opened(browser, file, 360, 740, color_scheme="dark", device_scale_factor=2, has_touch=True)


def coloured(page: Any) -> int:
    """How many pixels of the map are drawn on."""
    return int(
        page.evaluate(
            """() => { const c = document.querySelector('canvas.points');
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""
        )
    )


def middle(page: Any) -> tuple[float, float]:
    """Where the middle point of the lattice is on the screen."""
    canvas = page.locator("canvas.points")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_nothing_goes_wrong_and_nothing_is_asked_of_the_network(desktop: Seen, file: Path) -> None:
    assert desktop.said == []
    assert [url for url in desktop.asked if not url.startswith("data:")] == [file.as_uri()]


def test_every_picture_is_shown(desktop: Seen) -> None:
    states = desktop.page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.src.slice(0, 30)])")
    assert len(states) > 50
    assert [state for state in states if not state[0] or not state[1]] == []


def test_every_plot_is_drawn(desktop: Seen) -> None:
    sizes = desktop.page.evaluate(
        "[...document.querySelectorAll('svg.plot')].filter(s => !s.closest('details'))"
        ".map(s => [s.getBoundingClientRect().width, s.querySelectorAll('path').length])"
    )
    assert len(sizes) == 8
    assert all(width > 200 and paths > 3 for width, paths in sizes)


def test_a_name_cannot_become_markup_or_script(desktop: Seen) -> None:
    assert desktop.page.locator("script").count() == 2
    assert desktop.page.locator("img[onerror]").count() == 0
    assert desktop.page.locator("#map-legend button").first.inner_text().startswith(HOSTILE)


def test_the_policy_runs_no_other_script(desktop: Seen) -> None:
    before = len(desktop.said)
    desktop.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.foreign = 1'}))"
    )
    assert desktop.page.evaluate("window.foreign") is None
    assert "Content Security Policy" in desktop.said[before]
    del desktop.said[before:]


def test_pointing_at_the_map_shows_picture_class_and_name(desktop: Seen) -> None:
    page, tip = desktop.page, desktop.page.locator("#map .tip")
    assert not tip.is_visible()
    x, y = middle(page)
    page.mouse.move(x + 3, y + 3)
    assert tip.is_visible()
    assert tip.locator("span").inner_text() == WORDS
    assert tip.locator("b").inner_text().startswith("coat")
    drawn = page.evaluate(
        """() => { const c = document.querySelector('.tip canvas');
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return [c.width, d.some((value, i) => i % 4 < 3 && value > 0)]; }"""
    )
    assert drawn == [12, True]
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_the_arrow_keys_go_from_point_to_point(desktop: Seen) -> None:
    page, tip = desktop.page, desktop.page.locator("#map .tip")
    page.locator("canvas.points").focus()
    page.keyboard.press("ArrowRight")
    first = page.evaluate("[document.querySelector('.tip').style.left, document.querySelector('.tip').style.top]")
    assert tip.is_visible()
    page.keyboard.press("ArrowDown")
    second = page.evaluate("[document.querySelector('.tip').style.left, document.querySelector('.tip').style.top]")
    assert first[0] == second[0]
    assert float(first[1][:-2]) < float(second[1][:-2])
    assert WORDS in page.locator("#map-said").text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_the_legend_hides_a_class_and_shows_it_again(desktop: Seen) -> None:
    page, button = desktop.page, desktop.page.locator("#map-legend button").first
    whole = coloured(page)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert 0.4 * whole < coloured(page) < 0.8 * whole
    page.locator("#map-all").click()
    assert coloured(page) == whole
    page.locator("#map-all").click()
    assert coloured(page) == 0
    page.locator("#map-all").click()
    assert coloured(page) == whole


def test_another_map_takes_the_place_of_the_first(desktop: Seen) -> None:
    page, tabs = desktop.page, desktop.page.locator("#map-methods button")
    assert tabs.all_inner_texts() == ["PCA", "t-SNE"]
    tabs.nth(1).click()
    assert tabs.nth(1).get_attribute("aria-pressed") == "true"
    assert page.locator("#map-meanings").inner_text().startswith("t-SNE keeps neighbours")
    assert coloured(page) > 0
    tabs.nth(0).click()


def test_a_phone_shows_the_page_without_scrolling_sideways(phone: Seen) -> None:
    assert phone.said == []
    assert phone.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    phone.page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert phone.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    inside = phone.page.evaluate(
        "[...document.querySelectorAll('table')].every(t => getComputedStyle(t.parentElement).overflowX === 'auto')"
    )
    assert inside


def test_touching_the_map_shows_the_picture(phone: Seen) -> None:
    x, y = middle(phone.page)
    phone.page.touchscreen.tap(x, y)
    tip = phone.page.locator("#map .tip")
    assert tip.is_visible()
    box, canvas = tip.bounding_box(), phone.page.locator("canvas.points").bounding_box()
    assert box["x"] >= canvas["x"] - 1
    assert box["x"] + box["width"] <= canvas["x"] + canvas["width"] + 1


def test_text_is_legible_in_light_and_dark(desktop: Seen, phone: Seen) -> None:
    for seen, dark in ((desktop, False), (phone, True)):
        colours = seen.page.evaluate(
            """() => [...document.querySelectorAll(
                'h1, h2, p, td, th, dt, dd, figcaption, button, svg.plot text, .picture b, .cosine, .mark, summary')]
              .filter(e => e.textContent.trim()).map(e => {
                const style = getComputedStyle(e); let ground = e, back = 'rgba(0, 0, 0, 0)';
                while (ground && back === 'rgba(0, 0, 0, 0)') {
                  back = getComputedStyle(ground).backgroundColor; ground = ground.parentElement; }
                return [e.tagName, e instanceof SVGElement ? style.fill : style.color, back]; })"""
        )
        paper = luminance(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper < 0.1) == dark
        assert len(colours) > 100
        for tag, ink, ground in colours:
            if ground.startswith("rgba"):  # a shade of the matrix, over the card
                ground = over(ground, "rgb(27, 31, 36)" if dark else "rgb(255, 255, 255)")
            first, second = sorted((luminance(ink), luminance(ground)))
            # WCAG 2.2, contrast of at least 4.5.
            assert (second + 0.05) / (first + 0.05) >= 4.5, (tag, ink, ground)


def channels(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")]


def over(shade: str, ground: str) -> str:
    *top, share = channels(shade)
    mixed = [share * one + (1 - share) * other for one, other in zip(top, channels(ground), strict=True)]
    return f"rgb({', '.join(map(str, mixed))})"


def luminance(colour: str) -> float:
    parts = [value / 255 for value in channels(colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
