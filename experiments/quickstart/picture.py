"""A picture of a run's page: `python experiments/quickstart/picture.py runs/quickstart/report.html report.png`.

The README's picture of the quickstart is made this way. Needs Chromium (Debian: chromium).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def main(page: Path, picture: Path, width: int = 1120, height: int = 3080) -> None:
    """Write what the page shows in a window of this size, in pixels, once it is drawn."""
    with tempfile.TemporaryDirectory() as profile:
        # Virtual time: the picture is taken when five seconds of the page's own clock are over.
        window = (f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=5000")
        subprocess.run(
            ["chromium", *FLAGS, *window, f"--screenshot={picture.absolute()}", page.absolute().as_uri()],
            check=True,
            capture_output=True,
        )
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
