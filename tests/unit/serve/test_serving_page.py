"""The page in a real browser: Chromium without a window, where the machine has one."""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from region_indexes import made
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from proxydet import RegionIndex
from proxydet.inference.exemplars import vocabulary_of_exemplars
from proxydet.modeling.weights import weights_digest
from proxydet.serve.app import Served, ServingSettings, build_app
from proxydet.serve.examples import Example
from proxydet.visualization.drawing import instance_colours
from proxydet.visualization.report import (
    CaptionedImage,
    Command,
    Report,
    Section,
    Table,
    write_report,
)
from proxydet.vocabulary.exemplars import STATISTICS_NAME, RegionStatistics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,900
"""
DROP = """
    const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], arguments[1], { type: "image/png" }));
    const target = document.getElementById("stage");
    for (const kind of ["dragover", "drop"]) {
      target.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    }
"""
PASTE = """
    const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
"""
PLACES = """
    const [svg, ...box] = arguments;
    const at = (x, y) => { const p = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM()); return [Math.round(p.x), Math.round(p.y)]; };
    return [at(box[0], box[1]), at(box[2], box[3])];
"""
SLIDE = """
    const slider = document.getElementById("threshold");
    slider.value = arguments[0];
    slider.dispatchEvent(new Event("input"));
"""
MODULE = """
    const [module, call, value, done] = arguments;
    import(module).then((loaded) => done(JSON.stringify(loaded[call](value))), (error) => done(String(error)));
"""

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="there is no chromium with its chromedriver"
)


class Page:
    """The page, as a test handles it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def until(self, condition: Any) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda _: condition())

    def requests(self) -> int:
        """How many prediction requests were sent."""
        script = 'return performance.getEntriesByName(new URL("api/predict", location.href)).length'
        return int(self.driver.execute_script(script))

    def rows(self) -> list[str]:
        script = 'return [...document.querySelectorAll("#list button")].map((b) => [b.children[1], b.children[2]].map((e) => e.textContent).join(" "))'
        return list(self.driver.execute_script(script))

    def drawn(self) -> np.ndarray:
        """What is drawn: uint8 (h, w, 3)."""
        script = 'return document.getElementById("canvas").toDataURL("image/png").split(",")[1]'
        data = base64.b64decode(self.driver.execute_script(script))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def page(detector, start_server, driver, tmp_path) -> Iterator[Page]:
    settings = ServingSettings(max_upload_bytes=100_000)
    with start_server(build_app(detector, settings, name="tiny")) as running:
        where = {"behavior": "allow", "downloadPath": str(tmp_path)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        driver.get(running.url)
        made = Page(driver)
        made.until(lambda: made["model"].text)
        yield made
        noise = [line for line in driver.get_log("browser") if "status of 4" not in line["message"]]
        assert noise == [], "the console shows errors or a broken policy"
        driver.get("about:blank")


def test_from_a_dropped_image_to_downloads(page, detector, png, pixels, tmp_path):
    assert page["model"].text == "tiny on cpu, version " + page["model"].text.split()[-1]
    page["words"].send_keys("red star, blue circle")
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    wanted = detector.predict(pixels, ["red star", "blue circle"], score_threshold=0.1)
    page.driver.execute_script(SLIDE, "0.1")
    lines = [
        f"{label} {score:.2f}" for label, score in zip(wanted.labels, wanted.scores, strict=True)
    ]
    assert page.rows() == lines
    plural = "" if len(wanted) == 1 else "s"
    assert page["summary"].text.startswith(f"{len(wanted)} detection{plural}: ")

    # The slider filters without another request.
    full = page.drawn()
    assert full.shape[0] // 48 == full.shape[1] // 64 >= 8
    cut = float(np.sort(wanted.scores)[-1]) - 0.001
    page.driver.execute_script(SLIDE, str(round(cut, 2)))
    kept = wanted.above(float(page["threshold"].get_attribute("value")))
    assert page.rows() == lines[: len(kept)]
    assert len(kept) < len(wanted)
    assert np.any(page.drawn() != full)
    assert page.requests() == 1

    page["save-json"].click()
    page.until(lambda: (tmp_path / "noise.json").exists())
    saved = json.loads((tmp_path / "noise.json").read_text())
    assert saved == json.loads(json.dumps({"file": "noise.png", **kept.to_dict()}))
    page["save-image"].click()
    page.until(lambda: (tmp_path / "noise_found.png").exists())
    with Image.open(tmp_path / "noise_found.png") as image:
        assert image.size == full.shape[1::-1]


def test_colours_and_masks_are_those_of_the_program(page, detector, pixels):
    page.driver.set_script_timeout(30)
    found = detector.predict(pixels, score_threshold=0.02)
    boxes = np.random.default_rng(0).uniform(0, 500, (60, 4)).tolist()
    shown = page.driver.execute_async_script(MODULE, "./colours.js", "instanceColours", boxes)
    assert [tuple(colour) for colour in json.loads(shown)] == instance_colours(boxes)
    for item, rle in zip(found, found.rles, strict=True):
        told = page.driver.execute_async_script(MODULE, "./drawing.js", "runLengths", rle["counts"])
        runs = json.loads(told)
        mask_WH = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(64, 48)
        np.testing.assert_array_equal(mask_WH.T, item.mask)


def test_boxes_and_masks_are_drawn_where_they_are(page, detector, png, pixels):
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    page.driver.execute_script(SLIDE, "0.99")
    plain = page.drawn().astype(int)
    page["show-labels"].click()
    best = detector.predict(pixels, score_threshold=0.1).top(1)
    page.driver.execute_script(SLIDE, str(round(float(best.scores[0]) - 0.006, 2)))
    changed_HW = (page.drawn().astype(int) - plain).any(axis=2)
    scale = plain.shape[0] // 48
    left, top, right, bottom = best.boxes_xyxy[0] * scale
    rows, columns = np.flatnonzero(changed_HW.any(1)), np.flatnonzero(changed_HW.any(0))
    assert np.allclose([rows[0], rows[-1]], [top, bottom], atol=scale)
    assert np.allclose([columns[0], columns[-1]], [left, right], atol=scale)
    inner = np.repeat(np.repeat(best.masks[0], scale, 0), scale, 1)[20:-20, 20:-20]
    assert changed_HW[20:-20, 20:-20][inner].mean() > 0.99
    page["show-masks"].click()
    assert (page.drawn().astype(int) - plain).any(axis=2)[20:-20, 20:-20][inner].mean() < 0.5


def test_by_keyboard_alone(page, png, tmp_path):
    (tmp_path / "noise.png").write_bytes(png)
    page["file"].send_keys(str(tmp_path / "noise.png"))
    page.until(lambda: page["results"].is_displayed())
    page.driver.execute_script(SLIDE, "0.1")
    page["words"].send_keys("red star", Keys.ENTER)
    page.until(lambda: page.rows() and all(row.startswith("red star") for row in page.rows()))
    before = page["threshold-value"].text
    page["threshold"].send_keys(Keys.ARROW_RIGHT)
    assert page["threshold-value"].text != before
    assert "shown" in page["threshold"].get_attribute("aria-valuetext")
    button = page["list"].find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    unnamed = page.driver.execute_script(
        """return [...document.querySelectorAll("input, textarea, button, canvas, section")]
           .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
           .map((e) => e.id)"""
    )
    assert unnamed == []


def test_one_label_for_each_box_sends_another_request(page, detector, png, pixels):
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    page.driver.execute_script(SLIDE, "0.1")
    one = len(page.rows())
    page["one-label"].click()
    page.until(lambda: page.requests() == 2 and len(page.rows()) > one)
    best = detector.predict(pixels, score_threshold=0.1, one_label=False)
    assert page.rows() == [
        f"{label} {score:.2f}" for label, score in zip(best.labels, best.scores, strict=True)
    ]


DRAG = """
    const [x0, y0, x1, y1] = arguments;
    const canvas = document.getElementById("canvas");
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const send = (name, x, y) => canvas.dispatchEvent(new PointerEvent(name, {
      pointerId: 1, isPrimary: true, pointerType: "touch", bubbles: true, clientX: left + x * width, clientY: top + y * height,
    }));
    canvas.setPointerCapture = () => {};
    send("pointerdown", x0, y0); send("pointermove", x1, y1); send("pointerup", x1, y1);
"""


def test_what_a_box_shows_is_found_in_other_images(
    page, detector, png, pixels, tmp_path, monkeypatch
):
    # As if the region embeddings of a class were its text's.
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    weights = weights_digest(detector.network)
    texts_KD = detector.vocabulary.normalised()
    RegionStatistics(
        weights=weights,
        temperature=detector.network.config.classifier.temperature,
        means_KD=texts_KD * np.float32(0.3),
        counts_K=np.full(len(texts_KD), 9),
        texts_KD=texts_KD,
        within_DD=np.eye(texts_KD.shape[1], dtype=np.float32) / 1000,
        shrinkage=1.0,
    ).save(tmp_path / "cache" / "statistics" / weights[:32] / STATISTICS_NAME)
    assert not page["by-example"].is_displayed()
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    page["by-example"].click()
    assert page["by-example"].get_attribute("aria-pressed") == "true"
    page.driver.execute_script(DRAG, 0.1, 0.1, 0.101, 0.101)  # too small: still drawing
    page.driver.execute_script(DRAG, 0.5, 0.75, 0.125, 0.25)
    page.until(lambda: page.requests() == 2)
    page.driver.execute_script(SLIDE, "0.1")
    wanted = vocabulary_of_exemplars(detector, [pixels], [[[8, 12, 32, 36]]], [["example 1"]])
    found = detector.predict(pixels, wanted, score_threshold=0.1)
    lines = [f"example 1 {score:.2f}" for score in found.scores]
    page.until(lambda: page.rows() == lines)
    assert len(lines) > 0
    assert page["by-example"].get_attribute("aria-pressed") == "false"

    # Another image, the same example; a selected detection becomes a second one.
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "other.png")
    page.until(lambda: page.requests() == 3 and page.rows() == lines)
    page["list"].find_element(By.TAG_NAME, "button").click()
    assert page["by-example"].text == "Find more like this"
    page["by-example"].send_keys(Keys.ENTER)
    page.until(
        lambda: page.requests() == 4 and len(page["shown"].find_elements(By.TAG_NAME, "li")) == 2
    )
    for _ in range(2):
        page["shown"].find_element(By.TAG_NAME, "button").click()
    page.until(lambda: page.requests() >= 5 and not any("example" in row for row in page.rows()))
    assert not page["shown"].is_displayed()


def test_errors_are_shown_in_place_of_the_old_result(page, png):
    page["detect"].click()
    assert page["problem-message"].text == "No image yet."
    page.driver.execute_script(PASTE, base64.b64encode(png).decode())
    page.until(lambda: page["results"].is_displayed())
    assert not page["problem"].is_displayed()
    plain = page.drawn()
    page["words"].send_keys("a giraffe", Keys.ENTER)
    page.until(lambda: page["problem"].is_displayed())
    assert "'giraffe'" in page["problem-message"].text
    assert "red, blue, green" in page["problem-hint"].text
    assert not page["results"].is_displayed()
    bare = page.drawn()
    assert np.any(bare != plain)
    page["words"].clear()
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    page.driver.execute_script(DROP, base64.b64encode(b"no image").decode(), "a.png")
    page.until(lambda: "unsupported image format" in page["problem-message"].text)
    assert page["file-name"].text == "a.png"
    assert not page["canvas"].is_displayed()
    assert not page["results"].is_displayed()
    sent = page.requests()
    page.driver.execute_script(DROP, base64.b64encode(bytes(100_001)).decode(), "large.png")
    page.until(lambda: "large.png is larger" in page["problem-message"].text)
    assert page.requests() == sent


def test_the_whole_drop_area_is_a_button(page):
    opened = "document.getElementById('file').addEventListener('click', (e) => { e.preventDefault(); window.opened = (window.opened ?? 0) + 1; })"
    page.driver.execute_script(opened)
    area, button = page["stage"].rect, page["invitation"].rect
    assert button["width"] >= area["width"] - 6
    assert button["height"] >= area["height"] - 6
    page["invitation"].click()
    page["invitation"].send_keys(Keys.ENTER)
    assert page.driver.execute_script("return window.opened") == 2


def test_examples_are_offered_and_the_one_in_the_footer_is_accepted(
    detector, start_server, driver, tmp_path
):
    image = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(image, "JPEG")
    examples = (Example(name="o'clock.jpg", data=image.getvalue(), words="red star, blue circle"),)
    app = build_app(Served(detector=detector, examples=examples))
    with start_server(app) as running:
        driver.get(running.url)
        page = Page(driver)
        page.until(lambda: page["examples"].is_displayed())
        page["examples"].find_element(By.TAG_NAME, "button").click()
        page.until(lambda: page["results"].is_displayed())
        assert page["file-name"].text == "o'clock.jpg"
        assert page["words"].get_attribute("value") == "red star, blue circle"
        command = shlex.split(page["curl"].text)
        words = next(word for word in command if word.startswith("words="))
        with running.client() as client:
            answer = client.post(
                command[-1],
                files={"picture": image.getvalue()},
                data={"words": words.removeprefix("words=")},
            )
            assert answer.status_code == 200, answer.text
            assert client.get("/examples/1.jpg").status_code == 404
        driver.get("about:blank")


def test_loading_is_shown(detector, start_server, driver, png):
    release = threading.Event()

    def opened() -> Served:
        assert release.wait(60)
        return Served(detector=detector)

    with start_server(build_app(opened, name="late")) as running:
        driver.get(running.url)
        page = Page(driver)
        page.until(lambda: page["loading"].text.startswith("Loading the model"))
        driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
        page.until(lambda: page["working-text"].text == "Waiting for the model…")
        assert page.requests() == 0
        release.set()
        page.until(lambda: page["results"].is_displayed())
        assert page["model"].text.startswith("late on cpu")
        assert not page["loading"].is_displayed()
        driver.get("about:blank")


def test_no_placeholder_is_cut(page):
    cut = page.driver.execute_script(
        """return [...document.querySelectorAll("input[placeholder]")].filter((input) => {
             const pen = document.createElement("canvas").getContext("2d"), style = getComputedStyle(input);
             pen.font = style.font;
             const room = input.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
             return pen.measureText(input.placeholder).width > room;
           }).map((input) => input.id)"""
    )
    assert cut == []


def test_a_narrow_window_needs_no_sideways_scrolling(page, png):
    page.driver.execute_script(DROP, base64.b64encode(png).decode(), "noise.png")
    page.until(lambda: page["results"].is_displayed())
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide = page.driver.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        assert wide == [360, 360]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_report_fits_a_phone_and_keeps_its_commands(driver, tmp_path):
    command = "proxydet train --recipe quickstart --data 'a  b/description.toml' --dry-run"
    section = Section(
        title="Scores",
        tables=[Table(columns=("protocol", "classes", "AP"), rows=[("LVIS", "novel", 1.0)] * 2)],
        plots=['<svg width="900" height="90"></svg>'],
        images=[CaptionedImage(image=Image.new("RGB", (640, 320)), caption="a.jpg")],
        commands=[Command(command=command, does="Plans a training.")],
    )
    report = Report(title="Report", summary="", facts=[("AP", "57.6 ± 4.0")], sections=[section])
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get(write_report(report, tmp_path / "report.html").as_uri())
        wide = "return [document.documentElement.scrollWidth, innerWidth]"
        assert driver.execute_script(wide) == [390, 390]
        words = driver.find_elements(By.CSS_SELECTOR, "pre span")
        assert max(word.rect["height"] for word in words) < 30, "a word is broken"
        text = "return document.querySelector('pre code').textContent"
        assert driver.execute_script(text) == command
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get("about:blank")


def test_the_search_page_from_words_to_saved_lists(detector, start_server, driver, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    draw = np.random.default_rng(4)
    for number in range(4):
        pixels = draw.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"photo {number}.png")
    index = RegionIndex(made(tmp_path / "photos.index", detector, photos))
    wanted = index.search(["red star", "blue circle"], score_threshold=0.1)
    Path(wanted[-1].path).unlink()
    with start_server(build_app(Served(index=index))) as running:
        where = {"behavior": "allow", "downloadPath": str(tmp_path)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        driver.get(running.url)
        page = Page(driver)
        page.until(lambda: page["model"].text.startswith("4 images"))
        page["words"].send_keys("red star, blue circle", Keys.ENTER)
        page.until(lambda: page["results"].is_displayed())

        def cards() -> list[Any]:
            return list(page["grid"].find_elements(By.TAG_NAME, "button"))

        page.driver.execute_script(SLIDE, "0.1")
        assert len(cards()) == len(wanted) == 4
        first = cards()[0]
        assert f"{wanted[0].found.labels[0]} {wanted[0].score:.2f}" in first.text
        page.until(lambda: "not there any more" in page["grid"].text)
        # The whole image is seen, and boxes lie where they are in it.
        shape = first.find_element(By.TAG_NAME, "img").rect
        assert shape["height"] <= first.find_element(By.CLASS_NAME, "frame").rect["height"]
        box = first.find_elements(By.TAG_NAME, "rect")[-1].rect
        scale = min(shape["width"] / 64, shape["height"] / 48)
        left = shape["x"] + (shape["width"] - 64 * scale) / 2
        x0, _, x1, _ = wanted[0].found.boxes_xyxy[0].tolist()
        seen = [box["x"] - left, box["x"] + box["width"] - left]
        assert np.allclose(seen, [x0 * scale, x1 * scale], atol=4)

        cut = round(float(np.median([hit.score for hit in wanted])), 2)
        page.driver.execute_script(SLIDE, str(cut))
        kept = [hit for hit in wanted if hit.score > cut]
        assert 0 < len(cards()) == len(kept) < 4
        page["save-json"].click()
        page.until(lambda: (tmp_path / "search.json").exists())
        saved = json.loads((tmp_path / "search.json").read_text())
        assert [image["file"] for image in saved["images"]] == [hit.path for hit in kept]
        page["save-csv"].click()
        page.until(lambda: (tmp_path / "search.csv").exists())
        lines = (tmp_path / "search.csv").read_text().splitlines()
        assert len(lines) == 1 + sum(len(hit.found.above(cut)) for hit in kept)
        cards()[0].send_keys(Keys.ENTER)
        page.until(lambda: page["large"].is_displayed())
        assert page["large-name"].text == kept[0].path
        page["close"].click()

        # More like a region: of a box of the list, of one that is clicked, of one that is drawn.
        like, image = kept[0].found.boxes_xyxy[0].tolist(), kept[0]
        wanted_like = RegionIndex(index.stored.path).like(image.number, like)

        def looked_for() -> str:
            return str(page["like-text"].text) if page["like"].is_displayed() else ""

        for way in ("list", "click", "draw"):
            cards()[0].send_keys(Keys.ENTER)
            page.until(lambda: page["large"].is_displayed())
            assert page["large-name"].text == image.path
            boxes = page["large-frame"].find_element(By.TAG_NAME, "svg")
            if way == "list":
                page["large-list"].find_element(By.TAG_NAME, "button").click()
            else:
                move = ActionChains(driver)
                point = move.w3c_actions.pointer_action
                (x0, y0), (x1, y1) = driver.execute_script(PLACES, boxes, *like)
                if way == "click":
                    point.move_to_location((x0 + x1) // 2, (y0 + y1) // 2)
                    move.click().perform()
                else:
                    point.move_to_location(x0, y0)
                    move.click_and_hold()
                    point.move_to_location(x1, y1)
                    move.release().perform()
                driver.execute_cdp_cmd(
                    "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0}
                )
            page.until(lambda: looked_for() == f"More like the region in {Path(image.path).name}")
            assert not page["large"].is_displayed()
            page.driver.execute_script(SLIDE, "0.1")
            if way != "click":  # a click takes the smallest of the boxes there
                hits = index.search(wanted_like.vocabulary, score_threshold=0.1)
                assert len(cards()) == len(hits)
            page["like-end"].click()
            page.until(lambda: not page["like"].is_displayed())
            page.driver.execute_script(SLIDE, str(cut))

        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            wide = "return [document.documentElement.scrollWidth, innerWidth]"
            assert driver.execute_script(wide) == [360, 360]
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page["words"].clear()
        page["words"].send_keys("a giraffe", Keys.ENTER)
        page.until(lambda: "'giraffe'" in page["problem-message"].text)
        assert not page["results"].is_displayed()
        noise = [line for line in driver.get_log("browser") if "status of 4" not in line["message"]]
        assert noise == []
        driver.get("about:blank")
