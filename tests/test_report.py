"""The report page in a real browser: it plays, it is used with the keyboard, and no name can do anything in it."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluating import QUICK, checkpoint, cli, videos  # noqa: F401
from tiny import one_thread  # noqa: F401

from cavmae_fast.evaluation.report.media import exhibit, mp3
from cavmae_fast.evaluation.report.page import (
    Answers,
    Case,
    Exhibit,
    Page,
    PageError,
    Table,
    check_target,
    render,
    write_page,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</title></style></script><img src=x onerror='window.pwned=1'>",
    '" onplay="window.pwned=1" autofocus onfocus="window.pwned=1',
    "javascript:window.pwned=1 & &lt;b&gt; \u202egpj.exe \udcff",
    "<svg/onload=window.pwned=1><!--",
    "a\nb\t<iframe srcdoc='<script>parent.pwned=1</script>'>",
)


def sound(seconds: float = 1.0) -> np.ndarray:
    return (8000 * np.sin(np.arange(int(16000 * seconds)) * 0.2)).astype(np.int16)


def picture(shade: int) -> np.ndarray:
    return np.full((32, 32, 3), shade, np.uint8)


def hostile_page() -> Page:
    cases = []
    for number, name in enumerate(HOSTILE):
        query = exhibit(name, sound(), [picture(40 * number)] * 3, note=name)
        found = tuple(exhibit(f"{name} {k}", sound(), [picture(20 * k)], f"cosine {k} {name}", k == 1) for k in range(5))
        cases.append(Case(query, (Answers(name, name, found),)))
    return Page(HOSTILE[1], HOSTILE[0], (Table(HOSTILE[0], (HOSTILE[1], "R@1"), ((HOSTILE[2], HOSTILE[3]),)),), tuple(cases))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield opened
        opened.close()


@pytest.fixture
def shown(browser, tmp_path):
    """Opens a page in the browser; afterwards nothing may have been complained of or asked for."""
    complaints: list[str] = []
    asked: list[str] = []

    def show(page: Page):
        path = tmp_path / "page.html"
        write_page(page, path)
        tab = browser.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield show
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def until(tab, condition: str) -> None:
    """Waits until the condition holds. (Playwright's own way to wait needs `eval`, which the page's policy forbids.)"""
    end = time.monotonic() + 20
    while not tab.evaluate(condition):
        assert time.monotonic() < end, f"not within 20 s: {condition}"
        tab.wait_for_timeout(20)


def visible(tab) -> list[int]:
    return tab.evaluate("[...document.querySelectorAll('.case')].flatMap((c, i) => c.hidden ? [] : [i])")


def test_one_hears_and_sees(shown):
    tab = shown(hostile_page())
    assert visible(tab) == [0]
    tab.locator("section:not([hidden]) audio").first.evaluate("sound => sound.play()")
    until(tab, "document.querySelector('audio').currentTime > 0.05")
    assert abs(tab.evaluate("document.querySelector('audio').duration") - 1) < 0.2
    second = "document.querySelectorAll('audio')[1]"
    tab.evaluate(f"{second}.play()")
    until(tab, f"{second}.currentTime > 0.05")
    assert tab.evaluate("document.querySelector('audio').paused")  # one sound at a time
    sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 6 * (3 + 5) and set(sizes) == {32}


def test_by_keyboard(shown):
    tab = shown(hostile_page())
    tab.keyboard.press("n")
    assert visible(tab) == [1] and tab.evaluate("document.activeElement.id") == "query-2"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert tab.inner_text("#place") == "Query 2 of 6"
    tab.keyboard.press("p")
    assert visible(tab) == [0]
    assert tab.is_disabled("#previous") and tab.is_enabled("#next")
    tab.keyboard.press("p")
    assert visible(tab) == [0]
    # By tabulator alone: the skip link, the buttons, the check box, then the sound of the query.
    tab.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    tab.focus(".skip")
    order = []
    for _ in range(3):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order == ["next", "keys", "AUDIO"]
    tab.focus("#next")
    tab.keyboard.press("Enter")
    assert visible(tab) == [1]
    tab.uncheck("#keys")
    tab.keyboard.press("n")
    assert visible(tab) == [1]  # single letters can be switched off


def test_for_screen_readers(shown):
    tab = shown(hostile_page())
    names = tab.evaluate("[...document.querySelectorAll('audio')].map(a => a.getAttribute('aria-label'))")
    assert all(name.startswith("sound of ") for name in names)
    assert tab.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
    assert tab.evaluate("document.documentElement.lang") == "en"
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert tab.locator(".card.right .mark").count() == 6  # said in words, not by color alone
    assert tab.get_attribute("#place", "role") == "status"
    assert tab.locator("table caption").count() == 1 and tab.locator("th[scope=row]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(shown, scheme):
    """Text has at least 4.5 : 1, as WCAG AA asks."""
    tab = shown(hostile_page())
    tab.emulate_media(color_scheme=scheme)
    pairs = tab.evaluate("""() => {
        const ground = (e) => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return c; } };
        const kinds = "h1 .lead .summary .note .name .rank .mark button:enabled label thead".split(" ");
        return kinds.map(s => {
            const e = document.querySelector(s); return [s, getComputedStyle(e).color, ground(e)]; }); }""")

    def luminance(color: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for selector, ink, ground in pairs:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, ink, ground)


def test_hostile_names_do_nothing(shown):
    tab = shown(hostile_page())
    for _ in HOSTILE:
        tab.keyboard.press("n")
    tab.evaluate("document.querySelectorAll('audio').forEach(sound => sound.play().catch(() => 0))")
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.pwned") is None
    assert tab.evaluate("document.scripts.length") == 1 and tab.locator("iframe, svg").count() == 0
    assert tab.evaluate("document.querySelectorAll('[onplay],[onerror],[onfocus],[onload]').length") == 0
    assert HOSTILE[0] in tab.evaluate("document.querySelector('#query-1').textContent")
    assert tab.title() == HOSTILE[1]


def test_the_policy_stops_what_escaping_would_miss(browser, tmp_path):
    """Even markup that got into the page could run nothing and load nothing."""
    text = render(hostile_page())
    evil = "<script>window.pwned = 1</script><img src=x onerror='window.pwned=1'><img src='http://example.invalid/a.png'>"
    path = tmp_path / "page.html"
    path.write_text(text.replace("<main", evil + "<main"), encoding="utf-8", errors="replace")
    tab, complaints = browser.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(path.as_uri())
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.pwned") is None
    for words in ("Executing inline script", "Executing inline event handler", "http://example.invalid/a.png"):
        assert any(words in text and "Content Security Policy" in text for text in complaints), complaints


def test_without_scripts_everything_is_shown(browser, tmp_path):
    path = tmp_path / "page.html"
    write_page(hostile_page(), path)
    tab = browser.new_page(java_script_enabled=False)
    tab.goto(path.as_uri())
    assert tab.locator(".case:visible").count() == 6 and not tab.is_visible("#steps")


def test_markup_is_whole_without_a_browser():
    """The same for machines without one: names are text, and what is opened is closed."""

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text, self.scripts = [], [], 0

        def handle_starttag(self, tag, attributes):
            self.scripts += tag == "script"
            assert not any(name.startswith("on") for name, _ in attributes)
            if tag not in ("meta", "link", "img", "input"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    tags = Tags()
    tags.feed(render(hostile_page()))
    assert tags.open == [] and tags.scripts == 1
    assert all(any(name in text for text in tags.text) for name in HOSTILE)


def test_targets(tmp_path):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, r"which is a folder; it must be a file"),
        (tmp_path / "no" / "page.html", r"is no folder; it must be there"),
        (tmp_path / "file" / "page.html", r"is no folder"),
        (tmp_path / ("x" * 300), r"cannot be written"),
    ):
        with pytest.raises(PageError, match=words):
            check_target(path)
    old = tmp_path / "page.html"
    old.write_text("an older page")
    check_target(old)
    assert old.read_text() == "an older page" and len(list(tmp_path.iterdir())) == 2


def test_an_exhibit_without_sound_or_picture():
    page = render(Page("t", "l", (), (Case(Exhibit("x"), (Answers("a", "b", (Exhibit("y", mp3(sound())),)),)),)))
    assert page.count("<audio") == 1 and "<img" not in page and "Query</span>" in page


def test_retrieve_writes_a_page(checkpoint, videos, tmp_path, browser):  # noqa: F811
    """The command, hostile file names included, as a user would run it."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path, name in zip(sorted(videos.glob("*.mp4")), (*"abcd", "<script>window.pwned=1<", "' onerror='window.pwned=1")):
        shutil.copy(path, folder / f"{name}.mp4")
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n")
    rows = [f'"{path.name}",{"/m/a" if place < 4 else "/m/b"}' for place, path in enumerate(sorted(folder.iterdir()))]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    page = tmp_path / "page.html"
    options = ("--device", "cpu", "--dtype", "float32", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    done = cli("retrieve", checkpoint, "--data", folder / "list.csv", "--report", page, "--report-queries", 4, *options)
    assert done.returncode == 0, done.stderr
    assert "retrieval among 6 clips (chance: R@1 16.7 %, R@5 83.3 %, R@10 100.0 %, rank 3.5)" in done.stdout
    assert "by class" in done.stdout and "4 clips  A" in done.stdout
    assert (tmp_path / "out" / "classes.csv").read_text().count("\n") == 3
    assert '"A->V R@1"' in (tmp_path / "out" / "retrieval.json").read_text()
    tab, complaints = browser.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    assert tab.locator(".case").count() == 4 and tab.locator("audio").count() == 4 * (1 + 5 + 5)
    tab.locator("audio").first.evaluate("sound => sound.play()")
    until(tab, "document.querySelector('audio').currentTime > 0.05")
    for _ in range(4):
        tab.keyboard.press("n")
    assert tab.evaluate("window.pwned") is None and complaints == []
    one = cli("retrieve", checkpoint, "--data", folder / "a.mp4", *options[:4])
    assert one.returncode == 1 and "the data names 1 clip; retrieval needs two or more" in one.stderr
    lost = cli("retrieve", checkpoint, "--data", folder, "--report", tmp_path, *options[:4])
    assert lost.returncode == 2 and "which is a folder" in lost.stderr


def test_nothing_private_is_on_the_page():
    assert "/root" not in render(hostile_page()) and str(Path.cwd()) not in render(hostile_page())
