"""The explorer in a real browser: headless Chromium, driven by Playwright.

``VTR_SCREENSHOTS=docs python -m pytest tests/explore/test_browser.py`` writes the pictures of docs/explore.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), ""
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG = 120_000  # milliseconds: libraries are loaded from a cold disk beside other tests
OUT = os.environ.get("VTR_SCREENSHOTS")

pytestmark = pytest.mark.timeout(420)
pytest.importorskip("gradio")
if not CHROMIUM and os.environ.get("CI") != "true":
    pytest.skip("needs Chromium (Debian's package chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address that the command prints; Ctrl-C ends it with status 0."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vtr", "explore", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, error = process.communicate(timeout=60)
            pytest.fail(f"no address: {error}")
        yield json.loads(line)["url"]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert "Traceback" not in error
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM or None, args=FLAGS)
        yield chromium
        chromium.close()


class Visitor:
    """A session of its own, on the page, with its first result."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1360, "height": 860}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.hosts: set[str] = set()
        self.page.on("request", lambda r: self.hosts.add(urlsplit(r.url).netloc))
        self.page.goto(url)
        self.page.wait_for_selector("#result .vtr-column:nth-child(4)")

    def column(self, number: int) -> Any:
        return self.page.locator("#result .vtr-column").nth(number)

    def pictures(self) -> list[str]:
        """The pictures of the first method."""
        return [i.get_attribute("src") for i in self.column(1).locator("img").all()]

    def title(self, number: int = 1) -> str:
        return self.column(number).locator("h3").inner_text()

    def expect_title(self, text: str, number: int = 1) -> None:
        playwright.expect(self.column(number).locator("h3")).to_have_text(text, timeout=LONG)

    def slide(self, steps: int) -> None:
        """Move the slider with the keys."""
        slider = self.page.locator("#keep input[type=range]")
        slider.focus()
        for _ in range(abs(steps)):
            slider.press("ArrowRight" if steps > 0 else "ArrowLeft")

    def upload(self, *files: Path) -> None:
        self.page.locator("#upload input[type=file]").set_input_files([str(f) for f in files])

    def choose(self, model: str) -> None:
        self.page.click("#model input")
        self.page.click(f'[role=option]:has-text("{model}")')

    def tab(self, name: str) -> None:
        self.page.click(f'button[role=tab]:has-text("{name}")')

    def shot(self, name: str) -> None:
        if OUT:
            self.page.wait_for_timeout(1500)  # the marks of progress fade
            self.page.mouse.move(0, 0)
            self.page.screenshot(path=Path(OUT) / f"explore-{name}.png", full_page=True)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(browser, url) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def go(**options: Any) -> Visitor:
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield go
    for visitor in visitors:
        visitor.close()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> list[Path]:
    """Pictures of a 3 and a 7 that are no samples of the page."""
    from vtr.zoo import data, samples

    folder, found = tmp_path_factory.mktemp("digits"), []
    pixels, labels = samples("digits-vit", 60, seed=77)
    for digit in (3, 7):
        view = data.denormalise(pixels[labels.tolist().index(digit)])
        array = (view * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{digit}.png")
        found.append(folder / f"{digit}.png")
    return found


def test_a_picture_is_uploaded_and_the_slider_changes_what_is_left(visit, digits):
    """And a broken file is answered with a message, after which the page goes on working."""
    visitor = visit()
    visitor.expect_title("EViT(keep=0.3)")
    visitor.shot("vit")
    before = visitor.pictures()
    visitor.upload(digits[0])
    said = visitor.column(0).locator(".vtr-said")
    playwright.expect(said).to_contain_text("3", timeout=LONG)
    uploaded = visitor.pictures()
    assert uploaded != before

    visitor.slide(3)
    visitor.expect_title("EViT(keep=0.45)")
    visitor.expect_title("Random(keep=0.45, seed=0)", 3)
    assert visitor.pictures() != uploaded
    tokens = visitor.page.locator("#result tr", has_text="tokens").locator("td").all_inner_texts()
    assert tokens[0] == "tokens" and tokens[1] == "144" and tokens[4].startswith("65 ")

    broken = digits[0].parent / "broken.png"
    broken.write_bytes(digits[0].read_bytes()[:100])
    now = visitor.pictures()
    visitor.upload(broken)
    toast = visitor.page.locator(".toast-wrap")
    playwright.expect(toast).to_contain_text("broken.png: not a picture", timeout=LONG)
    assert "/" not in re.sub("broken.png", "", toast.inner_text())  # no path of the machine
    visitor.shot("broken")
    assert visitor.pictures() == now
    visitor.upload(digits[1])
    playwright.expect(said).to_contain_text("7", timeout=LONG)

    huge = digits[0].parent / "huge.png"
    Image.new("L", (5000, 4000)).save(huge)
    visitor.upload(huge)
    playwright.expect(toast).to_contain_text("5000 x 4000 pixels, at most 16 million", timeout=LONG)
    assert visitor.hosts == {urlsplit(visitor.page.url).netloc}


def test_two_sessions_do_not_disturb_each_other(visit, digits):
    first, second = visit(), visit(color_scheme="dark")
    first.upload(digits[0])
    second.upload(digits[1])
    second.slide(-2)
    first.slide(2)
    first.expect_title("EViT(keep=0.4)")
    second.expect_title("EViT(keep=0.2)")
    for visitor, digit in ((first, "3"), (second, "7")):
        playwright.expect(visitor.column(0).locator(".vtr-said")).to_contain_text(
            digit, timeout=LONG
        )
        assert visitor.page.locator("#seen img").count() == 1
    assert first.pictures() != second.pictures()
    tokens = [v.page.locator("#result tr", has_text="tokens").inner_text() for v in (first, second)]
    assert "58" in tokens[0] and "29" in tokens[1]


def test_a_model_answers_and_its_attention_and_code_are_shown(visit):
    visitor = visit(color_scheme="dark")
    visitor.choose("digits-llava")
    visitor.expect_title("FastV(keep=0.3)")
    playwright.expect(visitor.column(0).locator(".vtr-said")).to_contain_text("%")
    visitor.shot("llava")
    visitor.tab("Attention")
    playwright.expect(visitor.page.locator("#maps")).to_contain_text("first token", timeout=LONG)
    assert visitor.page.locator("#maps img").count() == 5
    visitor.shot("attention")
    visitor.tab("Export")
    lines = visitor.page.locator("#lines .cm-content")
    playwright.expect(lines).to_contain_text("vtr.VisionZip(keep=0.3)", timeout=LONG)
    playwright.expect(visitor.page.locator("#plan")).to_contain_text('"vtr_plan": 1')
    visitor.tab("Refused methods")
    playwright.expect(visitor.page.locator("#refused")).to_contain_text("does not have")
    assert visitor.hosts == {urlsplit(visitor.page.url).netloc}


@pytest.mark.skipif(not OUT, reason="writes pictures of the documentation (VTR_SCREENSHOTS=docs)")
@pytest.mark.parametrize(
    ("model", "title"),
    [("digits-video", "EVS(keep=0.3)"),
     ("digits-wan", "TopKSparse(dense_steps=0.4, block=16, density=0.3)")],
)  # fmt: skip
def test_pictures_of_other_models(visit, model, title):
    visitor = visit()
    visitor.choose(model)
    visitor.expect_title(title)
    visitor.shot(model.removeprefix("digits-"))
