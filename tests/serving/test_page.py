"""The page in a real headless Chromium, in front of a real server: what people do, by mouse and by keyboard alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sora.config import Project
from sora.dataset.corrections import Inbox
from sora.serving.source import ModelCache
from tests.programs import needs
from tests.serving.browser import Browser, chromium
from tests.serving.conftest import CLASSES, Made, make_model
from tests.serving.standing import Standing, standing
from tests.videos import make_video

pytestmark = needs("chromium")

ANSWERED = "document.querySelector('#result .label')?.textContent"
# Every text of the page against what lies behind it: the lowest contrast ratio (WCAG 2), and whose it is.
CONTRAST = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let it = element; it; it = it.parentElement) {
      const colour = parse(getComputedStyle(it).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.disabled) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 200)];
  }
  return worst;
})()"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def server(models: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    folder = tmp_path_factory.mktemp("page")
    models[0].promote(ModelCache(folder / "registry"))
    project = folder / "project"
    (project / "data" / "sit").mkdir(parents=True)
    (project / "params.yaml").write_text(f"classes: {list(CLASSES)}\n", encoding="utf-8")
    with standing(folder, poll_seconds=0.2, decode_workers=1) as it:
        it.until_ready()
        yield it


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(tab: Browser, server: Standing) -> Iterator[Browser]:
    """The page, opened anew, with an empty inbox and no answers yet."""
    inbox = _inbox(server)
    for entry in inbox.entries():
        inbox.reject(entry.id)
    tab.look(1100, 900)
    tab.open(str(server.client.base_url))
    tab.js("sessionStorage.clear()")
    tab.open(str(server.client.base_url))
    tab.until("document.getElementById('state').dataset.state === 'ready'")
    tab.until("!document.getElementById('inbox-card').hidden")
    tab.complaints.clear()
    yield tab
    assert tab.complaints == []  # neither an exception nor a breach of the content security policy
    outside = [url for url in tab.requested if not url.startswith((str(server.client.base_url), "data:", "blob:"))]
    assert outside == ["about:blank"][: len(outside)]


def _inbox(server: Standing) -> Inbox:
    return Inbox(Project(server.folder / "project"), 100, 10**9)


def _classify(page: Browser, video: Path) -> str:
    page.give_file("#file", video)
    page.until("!document.getElementById('send').disabled")
    page.js("document.getElementById('send').click()")
    answer: str = page.until(ANSWERED)
    return answer


def _press(page: Browser, text: str) -> None:
    """Clicks the first button with this text."""
    clicked = f"[...document.querySelectorAll('button')].find((b) => b.textContent === {text!r})"
    page.until(f"Boolean({clicked})")
    page.js(f"{clicked}.click()")


def test_an_unsure_answer_says_so(page: Browser, server: Standing, models: list[Made], video: Path) -> None:
    registry = ModelCache(server.folder / "registry")
    models[1].put(registry, replace(models[1].recipe, unsure_below=1.5))
    registry.remember(models[1].champion)
    try:
        server.until(lambda: server.client.get("/readyz").json()["version"] == 2)
        label = _classify(page, video)
        assert page.js("document.querySelector('#result .unsure').innerText").startswith("Unsure")
        assert page.js("document.querySelector('#history strong').textContent") == f"{label}?"
        assert "unsure" in page.js("document.getElementById('said').textContent")
    finally:
        models[0].promote(registry)
        server.until(lambda: server.client.get("/readyz").json()["version"] == 1)


def test_several_labels_are_shown_and_corrected(
    page: Browser, server: Standing, models: list[Made], video: Path, tmp_path: Path
) -> None:
    registry = ModelCache(server.folder / "registry")
    made = make_model(tmp_path, 3)  # other bytes: what the server has of a digest it does not fetch again
    made.put(registry, replace(made.recipe, schema=2, multilabel=True, golden=()))
    registry.remember(made.champion)
    try:
        server.until(lambda: server.client.get("/readyz").json()["version"] == 3)
        expected = server.send(video).json()
        assert _classify(page, video) == (", ".join(expected["labels"]) or "None of the classes")
        bold = page.js("[...document.querySelectorAll('.bars .first .name')].map((it) => it.textContent)")
        assert bold == expected["labels"]
        assert page.js("document.querySelectorAll('.bars li').length") == len(CLASSES)
        assert page.js("document.querySelectorAll('#result b').length") == 0  # a class's name is text

        _press(page, "This is wrong…")
        chosen = page.js("[...document.querySelectorAll('.correction option:checked')].map((it) => it.value)")
        assert sorted(chosen) == sorted(expected["labels"])
        page.js(
            "[...document.querySelectorAll('.correction option')].forEach((it) => it.selected = it.value !== 'sit')"
        )
        assert page.js(CONTRAST)[0] >= 4.5
        _press(page, "Send")
        page.until("document.querySelector('.done')?.textContent.includes('for review')")
        (entry,) = _inbox(server).entries()
        assert entry.label == "<b>wave</b>|jump" and entry.version == 3
        page.until("document.querySelectorAll('#inbox li').length === 1")
        assert page.js("document.querySelector('#inbox select').value") == entry.label
    finally:
        models[0].promote(registry)
        server.until(lambda: server.client.get("/readyz").json()["version"] == 1)


def test_upload_answer_heat_map_correction_and_review(
    page: Browser, server: Standing, video: Path, tmp_path: Path
) -> None:
    expected = server.send(video).json()
    assert _classify(page, video) == expected["label"]
    shown = page.js("[...document.querySelectorAll('.bars li')].map((li) => li.innerText.split('\\n'))")
    ranked = sorted(expected["probabilities"].items(), key=lambda item: -item[1])
    assert [[name.strip() for name in row][:2] for row in shown] == [[n, f"{100 * p:.1f}%"] for n, p in ranked]
    assert expected["label"] in page.js("document.getElementById('said').textContent")  # for screen readers

    _press(page, "Show what decided")
    page.until("document.querySelector('.strip img')?.naturalHeight > 100")
    assert page.js("document.querySelectorAll('.weights li').length") == 4
    assert "Grad-CAM" in page.js("document.querySelector('figcaption').textContent")

    _press(page, "This is wrong…")
    right = next(name for name in ("sit", "jump") if name != expected["label"])
    choices = page.js("[...document.querySelectorAll('.correction option')].map((o) => o.value)")
    assert choices == [name for name in CLASSES if name != expected["label"]]
    page.js(f"document.querySelector('.correction select').value = {right!r}")
    _press(page, "Send")
    page.until("document.querySelector('.done')?.textContent.includes('for review')")
    (entry,) = _inbox(server).entries()
    assert (entry.label, entry.predicted, entry.version) == (right, expected["label"], 1)

    page.until("document.querySelectorAll('#inbox li').length === 1")
    assert entry.id[:12] in page.js("document.getElementById('inbox').innerText")
    _press(page, "Play")
    page.until("document.querySelector('.player video')?.readyState >= 2")
    page.js("document.querySelector('#inbox select').value = 'sit'")
    _press(page, "Accept")
    said = page.until("document.getElementById('inbox-said').textContent.includes('Accepted') "
                      "&& document.getElementById('inbox-said').textContent")  # fmt: skip
    assert f"data/sit/corrections/{entry.id[:12]}.mp4" in said and "sora run" in said
    accepted = server.folder / "project" / "data" / "sit" / "corrections" / f"{entry.id[:12]}.mp4"
    assert accepted.read_bytes() == video.read_bytes()
    accepted.unlink()

    another = make_video(tmp_path / "<img src=x onerror=alert(1)>.mp4", seed=77)
    _classify(page, another)
    page.until("document.querySelectorAll('#history li').length === 2")
    assert page.js("document.querySelectorAll('#history img, #result img').length") == 0  # a name is text
    assert another.name in page.js("document.getElementById('history').innerText")
    page.js("document.querySelectorAll('#history button')[1].click()")
    page.until(f"document.getElementById('result').innerText.includes({video.name!r})")
    page.open(str(server.client.base_url))  # the session's answers outlive a reload
    page.until("document.querySelectorAll('#history li').length === 2")


def test_by_keyboard_alone(page: Browser, server: Standing, video: Path) -> None:
    page.call("Page.setInterceptFileChooserDialog", enabled=True)
    try:
        page.tab_to("it.id === 'file'")
        page.press("Space")
        chooser = page.event("Page.fileChooserOpened")
        page.call("DOM.setFileInputFiles", files=[str(video)], backendNodeId=chooser["backendNodeId"])
    finally:
        page.call("Page.setInterceptFileChooserDialog", enabled=False)
    page.until("!document.getElementById('send').disabled")
    page.tab_to("it.id === 'send'")
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
    page.press("Enter")
    answered = page.until(ANSWERED)
    page.tab_to("it.textContent === 'Show what decided'")
    page.press("Enter")
    page.until("document.querySelector('.strip img')?.naturalHeight > 100")
    page.tab_to("it.textContent === 'This is wrong…'")
    page.press("Enter")
    page.until("document.activeElement.tagName === 'SELECT'")
    page.press("ArrowDown")
    said = page.js("document.activeElement.value")
    page.tab_to("it.textContent === 'Send'")
    page.press("Enter")
    page.until("Boolean(document.querySelector('.done'))")
    (entry,) = _inbox(server).entries()
    assert (entry.label, entry.predicted) == (said, answered)
    assert said == [name for name in CLASSES if name != answered][1]
    page.until("document.querySelectorAll('#inbox li').length === 1")
    page.tab_to("it.textContent === 'Reject'")
    page.press("Space")
    page.until("document.querySelectorAll('#inbox li').length === 0")
    assert page.js("document.activeElement.id") == "inbox-card"  # the focus is not lost with what was removed
    assert _inbox(server).entries() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1100])
def test_narrow_and_dark(page: Browser, video: Path, width: int, dark: bool) -> None:
    page.look(width, 800, dark=dark, phone=width < 600)
    _classify(page, video)
    _press(page, "Show what decided")
    page.until("document.querySelector('.strip img')?.naturalHeight > 100")
    _press(page, "This is wrong…")
    page.until("Boolean(document.querySelector('.correction'))")
    _press(page, "Send")
    page.until("document.querySelectorAll('#inbox li').length === 1")
    assert page.js(OVERFLOW) <= 0
    ratio, whose = page.js(CONTRAST)
    assert ratio >= 4.5, whose
    back = page.js("getComputedStyle(document.body).backgroundColor")
    assert (max(int(value) for value in back[4:-1].split(",")) < 60) is dark
    small = page.js("[...document.querySelectorAll('button, select')].filter((b) => b.checkVisibility())"
                    ".map((b) => b.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b))")  # fmt: skip
    assert small >= 40  # pixels: for fingers


def test_the_camera(page: Browser) -> None:
    """A made-up camera, a real recording, a real answer."""
    page.until("!document.getElementById('camera').hidden")
    _press(page, "Use the camera")
    page.until("document.getElementById('live').videoWidth > 0")
    _press(page, "Record 3 seconds")
    page.until("document.getElementById('prompt').innerText.includes('camera ')", 20)
    assert page.js("document.activeElement.id") == "send"
    page.js("document.getElementById('send').click()")
    assert page.until(ANSWERED) in CLASSES


def test_without_a_camera_there_is_no_button(page: Browser, server: Standing) -> None:
    script = page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="Object.defineProperty(navigator, 'mediaDevices', {value: undefined})",
    )
    try:
        page.open(str(server.client.base_url))
        page.until("document.getElementById('state').dataset.state === 'ready'")
        assert page.js("document.getElementById('camera').hidden")
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_what_goes_wrong_is_said(page: Browser, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video", encoding="utf-8")
    page.give_file("#file", text)
    page.until("!document.getElementById('send').disabled")
    page.js("document.getElementById('send').click()")
    words = page.until("document.querySelector('.problem')?.innerText")
    assert "no video format" in words and "send a video file" in words
    page.complaints[:] = [line for line in page.complaints if "422" not in line]  # the console lists the answer


def test_the_timeline_of_a_longer_video(page: Browser, server: Standing) -> None:
    spans = [(0.0, 2.0, "jump"), (2.5, 4.5, "sit"), (5.0, 9.0, "sit")]
    answer = {
        "filename": "long.mp4", "label": "sit", "probabilities": {"sit": 0.6, "jump": 0.4}, "version": 1, "clips": 3,
        "seconds": {"model": 0.01}, "at": "2026-01-01T00:00:00Z", "span": {"start": 2.5, "end": 9.0},
        "timeline": [
            {"start": a, "end": b, "label": label, "probabilities": {label: 0.8}} for a, b, label in spans
        ],
    }  # fmt: skip
    page.js(f"sessionStorage.setItem('sora-answers', {json.dumps(json.dumps([answer]))})")
    page.open(str(server.client.base_url))
    page.until("document.querySelectorAll('#history li').length === 1")
    page.js("document.querySelector('#history button').click()")
    shown = page.js("[...document.querySelectorAll('.timeline li')].map((li) => li.innerText)")
    assert [text.split() for text in shown] == [
        ["0.0–2.0", "s", "jump", "80.0%"], ["2.5–4.5", "s", "sit", "80.0%"], ["5.0–9.0", "s", "sit", "80.0%"],
    ]  # fmt: skip
    widths = page.js("[...document.querySelectorAll('.timeline li')].map((li) => li.offsetWidth)")
    assert widths[2] > widths[0]
    assert "from 2.5 to 9.0 s" in page.js("document.getElementById('result').innerText")
    page.look(320, 800, phone=True)
    assert page.js(OVERFLOW) <= 0
