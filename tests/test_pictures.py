"""The pictures that README and docs/ show, and the script that draws the report's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from manyviews.report import write_report
from pages import PAGES, ROOT
from report_findings import findings

sys.path.insert(0, str(ROOT / "scripts"))

import picture


def test_pictures_exist_and_are_small() -> None:
    shown = {
        path.parent / name
        for path, text in PAGES.items()
        for name in re.findall(r"(?:!\[[^\]]*\]\(|<img src=\")([^\")]+)", text)
    }
    assert {file.name for file in shown} == {"views.png", "report.png", "sampling.png", "distances_on_sphere.png"}
    assert all(file.stat().st_size <= 250_000 for file in shown)


def test_without_a_browser_or_a_report_a_message_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path), str(tmp_path / "report.png")])
    assert picture.main() == 2
    assert f"manyviews evaluate {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(picture.shutil, "which", lambda name: None)
    (tmp_path / "report.html").touch()
    assert picture.main() == 2
    assert "apt-get install chromium" in capsys.readouterr().err
    assert not (tmp_path / "report.png").exists()


@pytest.mark.slow
def test_the_picture_of_a_report_has_its_three_sections(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    if not any(map(picture.shutil.which, picture.BROWSERS)):
        pytest.skip("no Chromium")
    report = picture_of(tmp_path)
    assert report.width == 1.25 * picture.SIZE["width"]
    assert report.height > 800
    colours = report.getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100


def picture_of(folder: Path) -> Image.Image:
    """The picture of a small run's report."""
    write_report(findings(folder / "run"))
    command = [sys.executable, picture.__file__, str(folder / "run"), str(folder / "report.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "report.png") as image:
        return image.convert("RGB")
