"""`make web-test`: a real browser does each of the page's stories against a real server, which is killed in the middle.

It prints what it saw, a line a story, and ends with one that sums up; it exits with 1 where anything was missed. Screenshots go to
docs/images/web. Needs Chromium (`apt-get install chromium`, or CHROMIUM=/path/to/it) and the extra `webtest`.

Judged: every story's own checks; no score that tells of what broke in between, the server or the page's process; axe's rules on each
story, light, dark and on a phone, without a violation; nothing on the console; interactive within a second of the navigation's start,
without a cache; 100 open pages at once, each with a live session that gets the very same scores.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from tests.process import ROOT, web

SHOTS = ROOT / "docs" / "images" / "web"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-background-timer-throttling", "--disable-renderer-backgrounding",
]  # fmt: skip
STORIES = ("sentiment", "translator", "forecaster", "generate", "tag", "draw", "inside")
DESK, PHONE = {"width": 1120, "height": 840}, {"width": 390, "height": 844}
INTERACTIVE_S = 1.0
PAGES = 100
WAIT_MS = 120_000  # this machine may be busy with other things
COLORS = 224  # of a screenshot: half the bytes, and hardly a difference to be seen


class Missed(AssertionError):
    """Something that was to be seen was not."""


def sure(held: object, what: str) -> None:
    if not held:
        raise Missed(what)


class Demo:
    """`python -m web.demo`, as `make web` starts it."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}/"
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def target(self) -> str:
        """The server's own address."""
        found = re.search(r"serving \d+ models on (\S+) ", self.log)
        assert found is not None
        return found[1]

    @property
    def killed(self) -> list[int]:
        """The server's processes that were killed."""
        return [int(pid) for pid in re.findall(r"killing the server, process (\d+)", self.log)]

    @property
    def took_up(self) -> list[int]:
        """How many sessions each server process found in the store."""
        return [int(count) for count in re.findall(r"took up (\d+) sessions", self.log)]


@contextmanager
def demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="seqserve-web-test-") as directory:
        port, log = Path(directory, "port"), Path(directory, "log")
        command = [sys.executable, "-m", "web.demo", "--port", "0", "--port-file", str(port), "--store", str(Path(directory, "sessions"))]
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True)
        try:
            until = time.monotonic() + 90
            while not port.exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise Missed(f"the page did not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield Demo(process, int(port.read_text()), log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


class Visitor:
    """A browser's window, and what its console said."""

    def __init__(self, browser: Browser, url: str, said: list[str], *, dark: bool = False, phone: bool = False) -> None:
        self._url = url
        self._said = said
        self.context: BrowserContext = browser.new_context(
            viewport=PHONE if phone else DESK,  # type: ignore[arg-type]
            color_scheme="dark" if dark else "light", has_touch=phone, reduced_motion="no-preference",
        )  # fmt: skip
        self.context.set_default_timeout(WAIT_MS)

    def open(self, story: str, ready: bool = True) -> Page:
        page = self.context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._said.append(f"{story}: {error}"))
        page.goto(f"{self._url}#/{story}")
        if ready:
            page.wait_for_selector(f"html[data-ready={story}]")
            page.wait_for_selector("#status[data-state=here]")
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._said.append(f"{message.type}: {message.text}")

    def close(self) -> None:
        self.context.close()


def shoot(page: Page, name: str, full: bool = True) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    image = Image.open(BytesIO(page.screenshot(full_page=full, animations="allow"))).convert("RGB")
    image.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(SHOTS / f"{name}.png", optimize=True)


def figure(page: Page, selector: str) -> float:
    found = re.search(r"-?[\d.]+", page.inner_text(selector))
    sure(found, f"{selector} shows no number: {page.inner_text(selector)!r}")
    assert found is not None
    return float(found[0])


# The stories; each gives a line for people


def sentiment(v: Visitor, demo: Demo) -> str:
    """Words in, the score moves; back to a word, another way, and words read again from a fork have the very same scores."""
    page = v.open("sentiment")
    page.locator("#s-input").press_sequentially("The first hour is slow and dull , but the ending is superb ", delay=25)
    expect(page.locator("#s-words li")).to_have_count(13)
    expect(page.locator("#s-words li.waiting")).to_have_count(0)
    before = page.eval_on_selector_all("#s-table tbody td:last-child", "cells => cells.map(cell => cell.textContent)")
    sure(len(set(before)) > 6, f"the score moved with the words: {before}")
    page.locator("#s-words li:nth-child(7) button").click()
    expect(page.locator("#s-words li")).to_have_count(7)
    expect(page.locator("#s-facts")).to_contain_text("3 words read again")
    expect(page.locator("#s-facts")).to_contain_text("to the very same scores")
    page.locator("#s-input").press_sequentially("and I loved every minute of it ", delay=25)
    expect(page.locator("#s-words li")).to_have_count(14)
    expect(page.locator("#s-words li.waiting")).to_have_count(0)
    after = page.eval_on_selector_all("#s-table tbody td:last-child", "cells => cells.map(cell => cell.textContent)")
    sure(after[:7] == before[:7], f"what was read before stays: {before[:7]}, {after[:7]}")
    expect(page.locator("#s-chart .ghost")).to_have_count(1)
    page.keyboard.press("Backspace")  # in the empty field
    expect(page.locator("#s-words li")).to_have_count(13)
    expect(page.locator("#s-input")).to_have_value("it")
    page.locator("#s-input").press_sequentially(" ")
    expect(page.locator("#s-words li")).to_have_count(14)
    expect(page.locator("#s-words li.waiting")).to_have_count(0)
    page.get_by_role("button", name="great cast, and yet").click()
    expect(page.locator("#s-words li")).to_have_count(24)
    expect(page.locator("#s-words li.waiting")).to_have_count(0)
    page.locator("#s-words li:nth-child(13) button").click()
    page.locator("#s-input").press_sequentially("most beautiful film I have ever seen ", delay=25)
    expect(page.locator("#s-words li.waiting")).to_have_count(0)
    page.wait_for_timeout(400)
    shoot(page, "sentiment")
    page.close()
    return "a turn a word, back to a word and on from a fork, the same scores to the last digit"


def translator(v: Visitor, demo: Demo) -> str:
    """Tokens and rows of the map appear one after another; hovering, focus and arrows say what looked where; a beam on request."""
    page = v.open("translator")
    expect(page.locator("#t-facts")).to_contain_text("tokens")
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => window.seen.push(document.querySelectorAll('#t-map tbody tr').length))
        .observe(document.querySelector('#t-map tbody'), {childList: true}); }"""
    )
    page.locator("#t-text").fill("A woman with a red umbrella waits for the bus in the rain.")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#t-said")).to_contain_text("Frau")
    expect(page.locator("#t-said.running")).to_have_count(0)
    expect(page.locator("#t-map thead th").nth(1)).to_have_text("A")
    rows = page.locator("#t-map tbody tr").count()
    seen = page.evaluate("window.seen")
    sure(set(range(1, rows + 1)) <= set(seen), f"each row of the map appeared by itself: {seen} of {rows}")
    greedy = page.inner_text("#t-said")
    cell = page.locator("#t-map tbody tr").nth(1).locator("td").nth(1)
    cell.hover()
    expect(page.locator("#t-readout")).to_contain_text("Frau looked")
    page.locator("#t-map td[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#t-readout")).to_contain_text("woman")
    expect(page.locator("#t-said .token.lit")).to_have_count(1)
    page.locator("#t-beam").fill("8")
    page.locator("#t-beam").dispatch_event("change")
    expect(page.locator("#t-said.running")).to_have_count(0)
    expect(page.locator("#t-said")).to_contain_text("Frau")
    expect(page.locator("#t-facts")).to_contain_text("tokens")
    page.locator("#t-map tbody tr").nth(4).locator("td").nth(4).hover()
    shoot(page, "translator")
    page.close()
    return f"{rows} tokens, each a row of the map when it came; hover, focus and arrows answer; beam 8; “{greedy.strip()}”"


def forecaster(v: Visitor, demo: Demo) -> str:
    """The series plays in and the fan moves; a dragged what-if is a fork that says otherwise, and both read on."""
    page = v.open("forecaster")
    expect(page.locator("#f-play")).to_have_text("Pause")
    expect(page.locator("#f-facts strong")).to_contain_text(re.compile(r"Turn ([5-9]|\d\d)"))
    first = page.locator(".median.a").get_attribute("points")
    page.wait_for_timeout(600)
    sure(page.locator(".median.a").get_attribute("points") != first, "the fan moves")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#f-play")).to_have_text("Play")
    box = page.locator(".handle").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 70, steps=12)
    page.mouse.up()
    expect(page.locator(".median.b")).to_have_count(1)
    expect(page.locator("#f-facts")).to_contain_text("A day after the what-if")
    turn = int(figure(page, "#f-facts strong"))
    told = page.inner_text("#f-facts")
    without, with_ = (float(n) for n in re.findall(r"(-?\d+\.\d) with", told))
    sure(without != with_, f"the fork says otherwise: {told}")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#f-facts strong")).to_have_text(re.compile(rf"Turn ({'|'.join(str(turn + n) for n in range(8, 40))})"))
    page.get_by_role("button", name="Pause").click()
    fork = int(re.findall(r"is at turn (\d+)", page.inner_text("#f-facts"))[0])
    sure(fork > turn + 1, f"the fork reads on too: turn {fork}")
    page.locator("#f-whatif").focus()
    for _ in range(5):
        page.keyboard.press("ArrowUp")
    expect(page.locator("#f-facts")).to_contain_text("A day after the what-if")
    page.wait_for_timeout(500)
    shoot(page, "forecaster")
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator(".median.b")).to_have_count(0)
    page.close()
    return f"{turn} hours a turn each, a what-if dragged: {without} °C without, {with_} with; both read on; by keyboard too"


def generate(v: Visitor, demo: Demo) -> str:
    """Streamed; with the same seed the same again, with another not; stopped when asked."""
    page = v.open("generate")

    def written() -> str:
        expect(page.locator("#g-facts")).to_contain_text("characters")
        expect(page.locator("#g-stop")).to_be_disabled()
        return page.inner_text("#g-out")

    page.evaluate(
        """() => { window.lengths = []; new MutationObserver(() => window.lengths.push(document.querySelector('#g-out').textContent.length))
        .observe(document.querySelector('#g-out'), {childList: true, subtree: true, characterData: true}); }"""
    )
    page.get_by_role("button", name="Write").click()
    one = written()
    sure(page.evaluate("new Set(window.lengths).size") > 20, "it came piece by piece")
    shoot(page, "generate")
    page.evaluate("document.querySelector('#g-facts').textContent = ''")
    page.get_by_role("button", name="Write").click()
    sure(written() == one, "the same seed, the same text")
    page.evaluate("document.querySelector('#g-facts').textContent = ''")
    page.get_by_role("button", name="Another seed").click()
    sure(written() != one, "another seed, another text")
    page.evaluate("document.querySelector('#g-facts').textContent = ''")
    page.get_by_role("button", name="Go on from here").click()
    page.locator("#g-stop").click()
    expect(page.locator("#g-facts")).to_contain_text("stopped")
    page.close()
    return f"{len(one)} characters streamed, twice the same with a seed, stopped on the way"


def tag(v: Visitor, demo: Demo) -> str:
    """Spans are marked in the text and listed; a change is read again."""
    page = v.open("tag")
    expect(page.locator("#n-out mark").first).to_be_visible()
    names = page.eval_on_selector_all("#n-table tbody td:first-child", "cells => cells.map(cell => cell.textContent)")
    sure("London" in names, f"London is found: {names}")
    shoot(page, "tag")
    page.locator("#n-text").fill("😀 I saw Angela Merkel in Berlin.")
    expect(page.locator("#n-table tbody")).to_contain_text("Berlin")
    marks = page.eval_on_selector_all("#n-out mark", "marks => marks.map(mark => mark.firstChild.textContent)")
    sure("Berlin" in marks, f"marked where it is, behind an emoji too: {marks}")
    page.close()
    return f"{len(names)} names coloured and listed; read again with each change"


def draw(v: Visitor, demo: Demo) -> str:
    """A digit by key and one by pointer, read a row a turn."""
    page = v.open("draw")
    page.keyboard.press("3")
    expect(page.locator("#d-best")).to_have_text("3")
    expect(page.locator("#d-facts")).to_contain_text("28 turns")
    page.get_by_role("button", name="Clear").click()
    box = page.locator("#d-canvas").bounding_box()
    assert box is not None
    strokes = [[(80, 60), (200, 60), (130, 240)]]  # a seven
    for stroke in strokes:
        page.mouse.move(box["x"] + stroke[0][0], box["y"] + stroke[0][1])
        page.mouse.down()
        for x, y in stroke[1:]:
            page.mouse.move(box["x"] + x, box["y"] + y, steps=10)
        page.mouse.up()
    expect(page.locator("#d-best")).to_have_text("7")
    expect(page.locator("#d-facts")).to_contain_text("28 turns")
    page.wait_for_timeout(300)
    facts = page.inner_text("#d-facts")
    shoot(page, "draw")
    page.close()
    return facts.split("; ")[-1]


def inside(v: Visitor, demo: Demo) -> str:
    """Rounds, sessions, times; the server is killed while twelve sessions play, and nothing is lost, doubled or different."""
    page = v.open("inside")
    typing = v.open("sentiment")
    typing.locator("#s-input").press_sequentially("A great ", delay=20)
    page.bring_to_front()
    page.get_by_role("button", name="Play twelve sessions").click()
    expect(page.locator("#i-score")).to_contain_text(re.compile(r"[1-9]\d\d turns answered"))
    expect(page.locator("#i-rounds tbody")).to_contain_text("sentiment")
    for name in ("p50", "Sessions"):
        expect(page.locator("#i-tiles")).to_contain_text(name)
    page.wait_for_timeout(2500)
    shoot(page, "inside")
    before = int(figure(page, "#i-score"))
    killed = len(demo.killed)
    page.get_by_role("button", name="Kill the server").click()
    expect(page.locator("#status-text")).to_have_text("reconnecting")
    expect(page.locator("#banner")).to_be_visible()
    began = time.monotonic()
    typing.locator("#s-input").press_sequentially("cast and ", delay=20)  # while there is no server
    sure(typing.locator("#s-words li.waiting").count() >= 1, "words wait while the server is away")
    shoot(page, "inside-away")
    expect(page.locator("#status-text")).to_have_text("live", timeout=90_000)
    away = time.monotonic() - began
    expect(page.locator("#i-facts")).to_contain_text("started anew once")
    until = time.monotonic() + 60
    while int(figure(page, "#i-score")) < before + 150 and time.monotonic() < until:
        page.wait_for_timeout(200)
    shoot(page, "inside-back")
    page.get_by_role("button", name="Stop them").click()
    expect(page.locator("#i-score")).to_contain_text(re.compile(r"\d+ of \d+ turns answered"))
    expect(page.locator("#i-score")).to_contain_text(re.compile(r"(\d+) of \1 turns answered"))  # who was under way has arrived
    answered, sent, twice, differing = (int(n) for n in re.findall(r"\d+", page.inner_text("#i-score")))
    sure(len(demo.killed) == killed + 1, "the server was killed with SIGKILL")
    sure(not Path(f"/proc/{demo.killed[-1]}").exists(), "the killed process is gone")
    sure(demo.took_up and demo.took_up[-1] >= 10, f"the next one took the sessions up from the store: {demo.took_up}")
    sure(answered > before + 100, f"they went on: {answered} after {before}")
    sure(twice == 0 and differing == 0, f"none doubled, none different: {twice}, {differing}")
    sure(sent == answered, f"none lost: {sent} sent, {answered} answered")
    expect(typing.locator("#s-words li.waiting")).to_have_count(0)
    expect(typing.locator("#s-facts strong")).to_have_text("Turn 4")
    typing.close()
    page.close()
    return f"killed while 13 sessions played; back after {away:.1f} s; {answered} turns answered, 0 lost, 0 doubled, 0 different"


def lost(browser: Browser, demo: Demo) -> str:
    """The page's own process is killed under an open page, and started anew: what was typed meanwhile is read, as if nothing had been."""
    first, meanwhile = ["The", "first", "hour", "is", "slow"], ["and", "then", "it", "is", "superb"]
    refused: list[str] = []  # the console tells of each attempt to connect: that is the story
    with web(demo.target) as one:
        v = Visitor(browser, f"{one.url}/", refused)
        page = v.open("sentiment")
        page.locator("#s-input").press_sequentially(" ".join(first) + " ", delay=20)
        expect(page.locator("#s-words li.waiting")).to_have_count(0)
        one.process.kill()
        expect(page.locator("#status")).to_have_attribute("data-state", "lost")
        page.locator("#s-input").press_sequentially(" ".join(meanwhile) + " ", delay=20)
        expect(page.locator("#s-words li.waiting")).to_have_count(len(meanwhile))
        port = one.port
    with web(demo.target, "--port", str(port)):
        expect(page.locator("#status")).to_have_attribute("data-state", "here")
        expect(page.locator("#s-words li.waiting")).to_have_count(0)
        cells = "cells => cells.map(cell => cell.textContent)"
        there = page.eval_on_selector_all("#s-table tbody td:last-child", cells)
        expect(page.locator("#s-facts strong")).to_have_text(f"Turn {len(first) + len(meanwhile)}")
        calm = v.open("sentiment")
        calm.locator("#s-input").press_sequentially(" ".join([*first, *meanwhile]) + " ", delay=20)
        expect(calm.locator("#s-words li")).to_have_count(len(there))
        expect(calm.locator("#s-words li.waiting")).to_have_count(0)
        undisturbed = calm.eval_on_selector_all("#s-table tbody td:last-child", cells)
        sure(there == undisturbed, f"the same scores as undisturbed: {there}, {undisturbed}")
        v.close()
    return f"the page's process killed and started anew: {len(there)} words, the scores of an undisturbed reading"


# What is asked of all of them


def accessible(browser: Browser, demo: Demo, said: list[str]) -> str:
    """axe on each story: light, dark, and on a phone."""
    axe = Axe()
    faults: list[str] = []
    rules = 0
    for look, options in (("light", {}), ("dark", {"dark": True}), ("phone", {"phone": True})):
        v = Visitor(browser, demo.url, said, **options)
        for story in STORIES:
            page = v.open(story)
            if story == "sentiment":
                page.get_by_role("button", name="not bad at all").click()
                expect(page.locator("#s-words li")).to_have_count(14)
                expect(page.locator("#s-words li.waiting")).to_have_count(0)
            elif story == "translator":
                expect(page.locator("#t-facts")).to_contain_text("tokens")
            elif story == "generate":
                page.get_by_role("button", name="Write").click()
                expect(page.locator("#g-facts")).to_contain_text("characters")
            elif story == "draw":
                page.keyboard.press("8")
                expect(page.locator("#d-facts")).to_contain_text("28 turns")
            elif story == "inside":
                page.get_by_role("button", name="Play twelve sessions").click()
                page.wait_for_timeout(1500)
            for details in page.locator(f"#story-{story} details").all():
                details.locator("summary").click()
            found: dict[str, Any] = axe.run(page).response
            rules = max(rules, len(found["passes"]))
            for fault in found["violations"]:
                where = "; ".join(str(node["target"][0]) for node in fault["nodes"][:4])
                faults.append(f"{story}, {look}: {fault['id']} ({fault['help']}) at {where}")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if wide > 0:
                faults.append(f"{story}, {look}: {wide} pixels too wide")
            if look != "light" and story in ("sentiment", "forecaster", "inside"):
                page.evaluate(f"document.querySelectorAll('#story-{story} details').forEach((d) => (d.open = false))")
                page.wait_for_timeout(600)
                shoot(page, f"{story}-{look}", full=look == "dark")
            page.close()
        v.close()
    sure(not faults, "\n  ".join(["axe says:", *faults]))
    return f"0 violations on {len(STORIES)} stories, light, dark and on a phone; up to {rules} rules passed; none wider than its window"


def quick(browser: Browser, demo: Demo, said: list[str]) -> str:
    """From the navigation's start until the first story answers to keys, each time with nothing in the cache."""
    times = []
    for _ in range(7):
        v = Visitor(browser, demo.url, said)
        page = v.open("sentiment")
        times.append(page.evaluate("performance.getEntriesByName('ready-sentiment')[0].startTime") / 1000)
        v.close()
    print(f"  interactive after {', '.join(f'{t:.2f}' for t in sorted(times))} s")
    sure(median(times) < INTERACTIVE_S, f"interactive after {median(times):.2f} s, not within {INTERACTIVE_S:g}")
    return f"interactive after {median(times):.2f} s (median of {len(times)}, no cache)"


def crowd(browser: Browser, demo: Demo, said: list[str], count: int) -> str:
    """So many open pages, each with a session of its own, all reading at once."""
    v = Visitor(browser, demo.url, said)
    pages = []
    for _ in range(count):
        pages.append(v.open("sentiment", ready=False))
    for page in pages:
        page.wait_for_selector("html[data-ready=sentiment]", timeout=180_000)
    for page in pages:
        page.evaluate("document.querySelector('[data-review]').click()")
    scores = set()
    for page in pages:
        expect(page.locator("#s-words li")).to_have_count(21, timeout=180_000)
        expect(page.locator("#s-words li.waiting")).to_have_count(0, timeout=180_000)
        scores.add(page.eval_on_selector_all("#s-table tbody td:last-child", "cells => cells.map(cell => cell.textContent).join()"))
        sure(page.get_attribute("#status", "data-state") == "here", "connected")
    sure(len(scores) == 1, f"all have the same scores: {len(scores)} differ")
    v.close()
    return f"{count} open pages: {count * 21} turns, all the same scores"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.web_test")
    parser.add_argument("--only", default="", help="stories, or quick, lost, axe, crowd, separated by commas")
    parser.add_argument("--pages", type=int, default=PAGES, help=f"open pages at once (default: {PAGES})")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    said: list[str] = []
    missed: list[str] = []
    did = 0
    expect.set_options(timeout=WAIT_MS)
    with demo() as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)

        def do(name: str, what: Callable[[], str]) -> None:
            nonlocal did
            if only and name not in only:
                return
            did += 1
            began = time.monotonic()
            try:
                line = what()
            except Exception as e:  # a miss, by its own check or the browser's: the others are done all the same
                missed.append(name)
                print(f"MISSED {name}: {e}", flush=True)
            else:
                print(f"{name}: {line} ({time.monotonic() - began:.0f} s)", flush=True)

        do("quick", lambda: quick(browser, running, said))
        for story in STORIES:

            def tell(story: str = story) -> str:
                v = Visitor(browser, running.url, said)
                try:
                    line: str = globals()[story](v, running)
                finally:
                    v.close()
                return line

            do(story, tell)
        do("lost", lambda: lost(browser, running))
        do("axe", lambda: accessible(browser, running, said))
        do("crowd", lambda: crowd(browser, running, said, arguments.pages))
        browser.close()
    if said:
        missed.append("console")
        print("MISSED console:\n  " + "\n  ".join(sorted(set(said))[:20]))
    size = sum(file.stat().st_size for file in SHOTS.glob("*.png")) / 1e6 if SHOTS.is_dir() else 0.0
    verdict = f"MISSED {', '.join(missed)}" if missed else "all held"
    print(f"web-test: {did} checks, {verdict}; console {'not ' if said else ''}silent; screenshots {size:.2f} MB in docs/images/web")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
