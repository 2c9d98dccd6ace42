"""Open the report in a browser without a network. It sends no requests, and is legible in light
mode, in dark mode and on paper. Without a browser these tests are skipped; test_report.py parses
the page."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evaluation.test_report import make_run
from matplotlib.image import imread

from bdkd.evaluation.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="waits for a browser (Debian: apt install chromium); its twin is test_report.py",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1200,1000",
)  # fmt: skip


def browse(page: Path, folder: Path, *options: str, query: str = "") -> tuple[str, list[str]]:
    """Return the output of the browser, and the requests of the page. All requests fail.

    The log of the browser contains every request with its initiator. The browser itself requests
    the time and updates with the initiator "not an origin". Requests of a page have an origin.
    """
    log = folder / "network.json"
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}",
         "--proxy-server=127.0.0.1:9", f"--log-net-log={log}", *options,
         f"{page.as_uri()}{'?' * bool(query)}{query}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = json.loads(log.read_text("utf-8"))["events"]
    requests = [event.get("params", {}) for event in events]
    return done.stdout, [
        r["url"]
        for r in requests
        if r.get("initiator", "not an origin") != "not an origin"
        and r.get("url", "").startswith(("http:", "https:", "ws:", "wss:", "//"))
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "a <b>run"), make_run(folder / "independent", "independent")]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def test_the_page_sends_no_network_request(page, tmp_path):
    dom, asked = browse(page, tmp_path, "--dump-dom")
    assert asked == []
    assert "Distillation runs</h1>" in dom
    assert "a &lt;b&gt;run" in dom
    assert dom.count("<svg") == page.read_text("utf-8").count("<svg")
    # Prove that the check works: a page with an external image sends a request.
    other = tmp_path / "other.html"
    other.write_text("<!doctype html><img src='http://example.com/x.png'>")
    _, asked = browse(other, tmp_path, "--dump-dom")
    assert any("example.com/x.png" in line for line in asked)
    # The policy of the page also blocks requests of unescaped markup.
    slipped = page.read_text("utf-8").replace(
        "</h1>", "</h1><img src='http://example.com/x.png'><script>document.title='run'</script>"
    )
    other.write_text(slipped, "utf-8")
    dom, asked = browse(other, tmp_path, "--dump-dom")
    assert asked == []
    assert "<title>run</title>" not in dom


def test_text_is_legible_in_light_and_dark_mode(page, tmp_path):
    pixels = {}
    for theme, setting in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{theme}.png"
        browse(page, tmp_path, f"--blink-settings=preferredColorScheme={setting}",
               f"--screenshot={picture}")  # fmt: skip
        pixels[theme] = imread(picture)[..., :3]
    light, dark = pixels["light"], pixels["dark"]
    assert light.shape == dark.shape == (1000, 1200, 3)
    # the background of the page, and the text on it
    assert np.median(light[600:, 4:10]) > 0.9
    assert np.median(dark[600:, 4:10]) < 0.15
    for picture in (light, dark):
        assert picture[600:].std() > 0.05


def test_the_page_can_be_printed(page, tmp_path):
    paper = tmp_path / "report.pdf"
    _, asked = browse(page, tmp_path, f"--print-to-pdf={paper}")
    assert asked == []
    content = paper.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
