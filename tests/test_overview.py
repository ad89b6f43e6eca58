"""The files of a sweep's overview, and its page in a browser."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_pareto import made

from pl_sparse.core.files import write_json
from pl_sparse.results.fronts import AXES
from pl_sparse.results.overview import overview

ROOT = Path(__file__).parent.parent
EVIL = "</script><img src=x onerror=alert(1)>&\"'"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two levels, two seeds, a dense run, one that failed and one that runs."""
    folder = tmp_path_factory.mktemp("a sweep")
    for i, (scorer, sparsity, seed) in enumerate(
        (scorer, sparsity, seed) for scorer in ("magnitude", "movement") for sparsity in (0.5, 0.9) for seed in (0, 1)
    ):
        value = 0.9 - (sparsity == 0.9) / 10 - (scorer == "movement") / 50 + seed / 100
        run = made(folder / str(i), value, sparsity, scorer=scorer, seed=seed, size=int(2500 * (1.1 - sparsity)))
        (run / "training.png").write_bytes(b"")
    made(folder / f"dense {EVIL.replace('/', '')}", 0.905, 0.0, size=2000, overrides=["method=dense", f"+note={EVIL}"])
    write_json(folder / "bad/status.json", {"state": "failed", "error": f"exploded {EVIL}"})
    write_json(folder / "runs/status.json", {"state": "running", "step": 5, "total": 10})
    return folder


@pytest.fixture(scope="module")
def contents(sweep: Path) -> dict[str, Any]:
    return overview([sweep], sweep, kb=1, ms=1)


def test_files_and_figures(sweep: Path, contents: dict[str, Any]) -> None:
    with open(sweep / "pareto.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], float(row["sparsity"]), int(row["seeds"])) for row in rows[:4]] == [
        ("magnitude", 0.5, 2), ("magnitude", 0.9, 2), ("movement", 0.5, 2), ("movement", 0.9, 2),
    ]  # fmt: skip
    assert float(rows[0]["test/acc"]) == pytest.approx(0.905) and rows[0]["on_front"] == "sparsity size macs"
    assert float(rows[0]["spread"]) == pytest.approx(0.01 / 2**0.5)
    assert json.loads((sweep / "pareto.json").read_text()) == json.loads(json.dumps(contents))
    with Image.open(sweep / "pareto.png") as picture:
        assert picture.size == (1200, 750)
    summary = contents["summary"]
    assert summary["columns"] == [
        "method", "hypervolume (sparsity)", "on the front", "smallest within 1 point of dense", "best up to 1 kB",
        "best up to 1 ms",
    ]  # fmt: skip
    # magnitude: 0.1 dense at 0.805, 0.5 dense at 0.905 -> 0.9 x 0.805 + 0.5 x 0.1
    assert summary["rows"][0][1] == "0.7745"
    assert summary["rows"][0][3:] == ["1.5 kB, sparsity 0.5, 0.9050", "0.5 kB, sparsity 0.9, 0.8050", "none"]
    assert {other["run"]: other["state"] for other in contents["others"]} == {"bad": "failed", "runs": "running"}


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    made(tmp_path / "a", None)
    with pytest.raises(ValueError, match=r"none of the 1 runs below .* has test/loss yet"):
        overview([tmp_path], tmp_path, key="test/loss")
    for arguments, message in (([], "required: DIR"), (["nowhere"], "nowhere is not a folder")):
        code = "import sys; from pl_sparse.app.cli import main; main()"
        command = [sys.executable, "-c", code, "pareto", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_sweep_ends_with_its_overview(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "sparsity=0,0.8", "trainer.max_epochs=1"]
    command += ["data.limit=320", "trainer.enable_progress_bar=false", "hydra.sweep.dir=swept"]
    wide = {**os.environ, "COLUMNS": "150"}
    done = subprocess.run(command, cwd=tmp_path, env=wide, capture_output=True, text=True, check=True)
    assert "smallest within 1 point of dense" in done.stdout and "pareto.html" in done.stdout
    groups = json.loads((tmp_path / "swept/pareto.json").read_text())["groups"]
    assert [g["differ"] for g in groups] == [["sparsity=0"], ["sparsity=0.8"]]
    assert [g["costs"]["sparsity"] for g in groups] == pytest.approx([1, 0.2])


# The page


def test_the_page_is_whole_and_escaped(sweep: Path, contents: dict[str, Any]) -> None:
    text = (sweep / "pareto.html").read_text()
    assert links_of(text) == []
    assert text.count("</script>") == 2 and "<img" not in text


def links_of(text: str) -> list[str]:
    """What a page would load or lead to."""
    return re.findall(r"""(?:src|href)\s*=\s*["']|@import|https?://(?!www\.w3\.org/2000/svg)""", text)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A page in a browser, which asks for nothing but itself, and in which nothing goes wrong."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, headless=True, args=arguments)
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.trouble, tab.requests = [], []
        tab.on("console", lambda message: tab.trouble.append(message.text))
        tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.trouble.append("a dialog"), dialog.dismiss()))
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.goto(path.as_uri())
        yield tab
        assert tab.requests == [path.as_uri()] and tab.trouble == []
        browser.close()


@pytest.fixture(scope="module")
def page(sweep: Path, contents: dict[str, Any]) -> Iterator[Any]:
    with opened(sweep / "pareto.html") as tab:
        yield tab


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def test_points_and_lines_are_drawn(page: Any) -> None:
    assert page.locator("#svg .mark.mean").count() == 5
    assert page.locator("#svg polyline.front").count() == 2 and page.locator("#svg line.dense").count() == 1
    assert page.locator("#svg line.error").count() == 4  # the dense run has one seed
    page.locator("#seeds").check()
    assert page.locator("#svg .mark.seed").count() == 9
    page.locator("#seeds").uncheck()
    assert "exploded </script><img" in page.locator("#others").inner_text()
    assert "smallest within 1 point of dense" in page.locator("#summary").inner_text()


@pytest.mark.parametrize("width", [390, 1200])
def test_labels_can_be_read_at_any_width(page: Any, width: int) -> None:
    """Each is as large as it is on a desk, within the picture, and beside the others."""
    page.set_viewport_size({"width": width, "height": 900})
    try:
        picture = page.locator("#svg").bounding_box()
        boxes = [label.bounding_box() for label in page.locator("#svg text:not([transform])").all()]
        assert len(boxes) > 6 and min(box["height"] for box in boxes) >= 12
        assert all(box["x"] >= picture["x"] - 1 for box in boxes)
        assert all(box["x"] + box["width"] <= picture["x"] + picture["width"] + 1 for box in boxes)
        for a, b in itertools.combinations(boxes, 2):
            beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert beside or a["y"] + a["height"] <= b["y"] + 4 or b["y"] + b["height"] <= a["y"] + 4
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        page.set_viewport_size({"width": 1200, "height": 900})


def test_hovering_shows_the_settings(page: Any) -> None:
    assert not page.locator("#tip").is_visible()
    page.locator("#svg .mark.mean").first.hover()
    tip = page.locator("#tip").inner_text()
    assert "magnitude" in tip and "scorer=magnitude sparsity=0.5" in tip and "90.50 %" in tip and "± 0.71" in tip
    page.locator("#svg .mark.mean").nth(4).hover()
    assert f"+note={EVIL}" in page.locator("#tip").inner_text()
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()


def test_a_click_pins_command_and_files(page: Any, sweep: Path) -> None:
    page.locator("#svg .mark.mean").nth(1).click()
    assert texts(page, "#pin pre") == [
        f"pl-sparse train scorer=magnitude sparsity=0.9 seed={seed}" for seed in (0, 1)
    ]  # fmt: skip
    hrefs = [link.get_attribute("href") for link in page.locator("#pin a").all()]
    assert hrefs[:2] == ["2/metrics.json", "2/training.png"] and all((sweep / href).is_file() for href in hrefs)
    page.keyboard.press("Escape")
    assert page.locator("#pin pre").count() == 0
    page.locator("#svg .mark.mean").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.locator("#pin pre").count() == 2
    page.keyboard.press("Escape")


def test_the_axis_changes(page: Any) -> None:
    before = page.locator("#svg .mark.mean").first.get_attribute("transform")
    assert texts(page, "#axis option") == [AXES[key].label for key in ("sparsity", "size", "macs")]
    page.locator("#axis").select_option("size")
    assert page.locator("#svg .mark.mean").first.get_attribute("transform") != before
    assert "kB" in page.locator("#svg").text_content()
    page.locator("#axis").select_option("sparsity")
    assert page.locator("#svg .mark.mean").first.get_attribute("transform") == before


def test_the_table_is_sorted_and_filtered(page: Any) -> None:
    def accuracies() -> list[str]:
        return texts(page, "#table tbody td:nth-child(5)")

    page.locator("[data-sort=accuracy]").click()
    assert accuracies() == ["78.50 %", "80.50 %", "88.50 %", "90.50 %", "90.50 %"]
    page.locator("[data-sort=accuracy]").click()
    assert accuracies()[-1] == "78.50 %"
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("test/acc")
    page.locator("#filter").fill("movement 0.9")
    assert accuracies() == ["78.50 %"] and page.locator("#svg .mark.dim").count() == 4
    assert page.locator("#count").inner_text() == "1 of 5"
    page.locator("#filter").fill("")
    page.locator("#legend button").first.click()
    assert len(accuracies()) == 3 and page.locator("#svg .mark.mean").count() == 3
    page.locator("#legend button").first.click()
    assert len(accuracies()) == 5


def test_light_and_dark(page: Any) -> None:
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.locator("#theme").click()
    dark = background()
    page.locator("#theme").click()
    assert light == background() == "rgb(245, 246, 248)" and dark == "rgb(20, 23, 27)"
