"""The picture of the page in the documentation: real answers of the real server (`make screenshot`).

    python -m tests.screenshot docs/images/page.png

The page takes its font from the machine; with `fonts-inter` installed it looks as most people will see it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from benchmarks.server import ServerProcess
from tests.browser import open_browser

SAMPLES = ("coffee-photo", "frog", "automobile", "cat-photo")
"""The last one is shown first."""


def main() -> None:
    """Takes the picture."""
    path = Path(sys.argv[1])
    with ServerProcess() as server:
        _take(server.wait_until_ready(), path)
    with Image.open(path) as picture:  # with a palette it has half of the size
        colours = picture.convert("RGB")
    colours.quantize(palette=colours.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def _take(url: str, path: Path) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(url)
        page.get_by_text("kinds of things apart").wait_for()
        for name in SAMPLES:
            page.click(f"[data-sample={name}]")
            page.locator(f".has-heat .filename:text-is('{name}.webp')").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path=path, full_page=True, animations="disabled")


if __name__ == "__main__":
    main()
