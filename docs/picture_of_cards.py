"""A picture of some figures of ``bdkd report``, for the documentation.

    python docs/picture_of_cards.py docs/images/entropy.png "Entropy H" RUN_OR_FOLDER ...

The first argument is the picture and the second a regular expression of the figures' titles. The
height of the picture is that of the figures. Needs Chromium, or Google Chrome, and Pillow.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bdkd.evaluation.report import write_report

WIDTH = 1180
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--disable-background-networking", f"--window-size={WIDTH},6000",
         "--blink-settings=preferredColorScheme=1")  # fmt: skip
CARD = re.compile(r'<figure class="card[^"]*"><h3>(.*?)</h3>.*?</figure>', re.DOTALL)


def only(page: str, titles: str) -> str:
    """Return a report with nothing but the figures whose titles match, without their numbers."""
    cards = [card for card in CARD.finditer(page) if re.search(titles, card[1])]
    if not cards:
        known = "\n  ".join(dict.fromkeys(card[1] for card in CARD.finditer(page)))
        sys.exit(f"no figure matches {titles!r}; there are\n  {known}")
    shown = [re.sub(r"<details>.*?</details>", "", card[0], flags=re.DOTALL) for card in cards]
    head = page[: page.index("<body>")]
    patterns = re.search(r"<svg[^>]*class=\"patterns\">.*?</svg>", page, re.DOTALL)
    grid = f'<div class="grid">{"".join(shown)}</div>'
    return f"{head}<body>{patterns[0] if patterns else ''}<main>{grid}</main></body></html>"


def main(picture: Path, titles: str, folders: list[Path], tsne: bool) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        sys.exit("picture_of_cards.py needs chromium")
    from PIL import Image, ImageChops

    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary, "report.html")
        write_report(folders, page, tsne=tsne)
        page.write_text(only(page.read_text("utf-8"), titles), "utf-8")
        subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={temporary}/profile", f"--screenshot={picture}",
             page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        with Image.open(picture) as image:
            pixels = image.convert("RGB")
        ground = Image.new("RGB", pixels.size, pixels.getpixel((0, 0)))
        box = ImageChops.difference(pixels, ground).getbbox()
        assert box is not None
        left, top, right, bottom = box
        pixels.crop((left, top, right, bottom)).quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("titles", help="regular expression of the titles of the figures")
    parser.add_argument("folders", type=Path, nargs="+", help="runs, or folders of runs")
    parser.add_argument("--tsne", action="store_true", help="draw the t-SNE maps too")
    given = parser.parse_args()
    main(given.picture, given.titles, given.folders, given.tsne)
