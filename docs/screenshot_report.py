"""The pictures of ``bdkd report`` in the documentation: ``docs/images/report-{light,dark}.png``.

    bdkd compare digits-hard --methods independent dml bdkd bdkd:gamma=1 --seeds 3 \
        --evaluate-every 2 --folder runs/report
    python docs/screenshot_report.py runs/report

Needs Chromium, or Google Chrome, and Pillow, which halves the pictures' size.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bdkd.evaluation.report import write_report

IMAGES = Path(__file__).parent / "images"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--disable-background-networking", "--window-size=1280,1500")  # fmt: skip


def main(folders: list[Path]) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None or not folders:
        sys.exit("usage: screenshot_report.py FOLDER [FOLDER ...]; it needs chromium")
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary, "report.html")
        write_report(folders, page, title="Four methods on hard digits")
        for theme, setting in (("light", 1), ("dark", 0)):
            picture = IMAGES / f"report-{theme}.png"
            subprocess.run(
                [browser, *FLAGS, f"--user-data-dir={temporary}/profile",
                 f"--blink-settings=preferredColorScheme={setting}", f"--screenshot={picture}",
                 page.as_uri()],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
            with Image.open(picture) as image:
                small = image.convert("RGB").quantize(256)
            small.save(picture, optimize=True)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
