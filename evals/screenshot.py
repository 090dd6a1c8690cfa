"""Pictures of a report's page in a real browser: light and dark, at the width of a desk and of a phone.

    python -m evals.screenshot runs/offline/report.html --out runs/offline

Needs Chromium (`apt-get install chromium`, or any `--browser` that takes its options).
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

SIZES = {"desktop": (1280, 6000), "phone": (390, 12000)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def screenshots(page: Path, out: Path, browser: str | None = None) -> list[Path]:
    """Take the four pictures of a page, `light-desktop.png` and so on.

    Raises:
        FileNotFoundError: There is no browser.
        subprocess.CalledProcessError: The browser failed.
    """
    found = browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for theme in ("light", "dark"):
        for size, (width, height) in SIZES.items():
            picture = out / f"{theme}-{size}.png"
            with tempfile.TemporaryDirectory() as profile:
                command = [
                    found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={profile}", f"--screenshot={picture.resolve()}",
                    "--virtual-time-budget=2000",
                ]  # fmt: skip
                if theme == "dark":
                    command.append("--blink-settings=preferredColorScheme=0")
                else:
                    command.append("--blink-settings=preferredColorScheme=1")
                # Headless windows have a least width, so that a phone's is set by a frame of its own.
                target = _framed(page, width, height, Path(profile)) if size == "phone" else page.resolve().as_uri()
                command += [f"--window-size={max(width, 520)},{height}", target]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            _trim(picture, width)
            pictures.append(picture)
    return pictures


def _trim(picture: Path, width: int) -> None:
    """Cut off what is beside the page, and the empty end."""
    with Image.open(picture) as found:
        image = found.convert("RGB").crop((0, 0, width, found.height))
    ground = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    box = ImageChops.difference(image, ground).getbbox()
    image.crop((0, 0, width, min(image.height, (box[3] if box else image.height) + 40))).save(picture)


def _framed(page: Path, width: int, height: int, folder: Path) -> str:
    """Return the address of a page that shows another in a frame of this width."""
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><meta name='color-scheme' content='light dark'><body style='margin:0'>"
        f"<iframe src='{page.resolve().as_uri()}' width='{width}' height='{height}' style='border:0'></iframe>"
    )
    return frame.as_uri()


def main(argv: list[str] | None = None) -> None:
    """Takes the pictures that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the pictures; by default the page's")
    parser.add_argument("--browser", help="a Chromium; by default one on the path")
    args = parser.parse_args(argv)
    try:
        pictures = screenshots(args.page, args.out or args.page.parent, args.browser)
    except FileNotFoundError as e:
        raise SystemExit(f"error: {e}") from e
    print(*pictures, sep="\n")


if __name__ == "__main__":
    main()
