"""Draws the picture of a report that docs/ and README show: picture.py RUN FILE.png (needs playwright and Chromium)."""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = {"width": 1500, "height": 930}
COLOURS = 256
"""Of the palette: the picture then takes less than half of the space."""
STYLE = """
header, nav, footer, main > *, h3 + .card ~ *, .query:nth-child(n + 3), .near li:nth-child(n + 7), .verdict ul,
#map-methods, #map-all, #map-section > p, #neighbours > h3 { display: none !important; }
html { scrollbar-width: none; }
main { display: grid; grid-template-columns: 43rem 1fr; column-gap: 2.2rem; max-width: none; padding: 0 1.6rem 1.4rem; }
main > #scores, main > #neighbours, main > #map-section { display: block !important; min-width: 0; }
#scores { grid-area: 1 / 1; } #neighbours { grid-area: 2 / 1; } #map-section { grid-area: 1 / 2 / 3; }
canvas.points { height: 44rem !important; }
h2 { margin-top: 1.1rem; } .verdict { margin-bottom: 0.6rem; } .near { grid-template-columns: repeat(6, 1fr); }
.query { grid-template-columns: 5.6rem minmax(0, 1fr); padding: 0.5rem 0; }
"""
"""Three sections of the page side by side: the scores, some neighbours, and the map."""


def screenshot(report: Path) -> Image.Image:
    """Returns a picture of scores, nearest neighbours and map of a report.

    Raises:
        ValueError: if playwright or Chromium is missing, or the report is.
    """
    if not report.is_file():
        raise ValueError(f"{report} is missing: manyviews evaluate {report.parent}")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(f"no Chromium (one of {', '.join(BROWSERS)}): apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as problem:
        raise ValueError("playwright is missing: pip install -e '.[test]'") from problem
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        # The page's own policy allows no style from outside.
        page = chromium.new_page(viewport=SIZE, color_scheme="light", bypass_csp=True, device_scale_factor=1.25)
        page.goto(report.resolve().as_uri())
        page.add_style_tag(content=STYLE)
        page.evaluate("dispatchEvent(new Event('resize'))")
        page.wait_for_timeout(500)
        png = page.locator("main").screenshot()
        chromium.close()
    return Image.open(io.BytesIO(png)).convert("RGB")


def main() -> int:
    """Writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with report.html")
    parser.add_argument("file", type=Path, help="the PNG that is written")
    args = parser.parse_args()
    try:
        picture = screenshot(args.run / "report.html")
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(args.file, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
