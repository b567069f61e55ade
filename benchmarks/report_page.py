"""How long a browser takes to open pages of ``mobilequant report``, and how large they are.

    mobilequant report RUN --out report.html
    python benchmarks/report_page.py report.html --out report_page.json

Headless Chromium, a new profile each time. Milliseconds from the start of navigation until everything is loaded and
laid out, as the page itself sees it (``performance.now``); starting the browser is not in it. Exits with 1 if a page
exceeds a limit: 3 MB, or 1 s in the median.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pictures import BROWSERS
from table import cpu_name, markdown

from optimum_mobilequant.run.prepare import versions

BYTES, MILLISECONDS = 3_000_000, 1000.0
PROBE = """
<script>
addEventListener("load", () => {
  document.body.dataset.height = document.documentElement.scrollHeight;
  document.body.dataset.milliseconds = performance.now();
});
</script></body>"""


def open_once(browser: str, page: str) -> float:
    """Milliseconds until the page is loaded and laid out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page.replace("</body>", PROBE), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
        done = subprocess.run(
            [browser, *options, path.as_uri()], check=True, capture_output=True, text=True, timeout=120
        )
    found = re.search(r'data-milliseconds="([\d.]+)"', done.stdout)
    if found is None:
        raise SystemExit("the page was not loaded to its end")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="HTML")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    args = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is here: apt-get install chromium")
    load, rows = os.getloadavg()[0], []
    for path in args.pages:
        page = path.read_text(encoding="utf-8")
        times = [open_once(browser, page) for _ in range(args.repeat)]
        rows.append({"page": path.name, "bytes": path.stat().st_size, "milliseconds": times})
    print(markdown(["page", "kB", "median, ms", "longest, ms"], [cells(row) for row in rows]))
    if args.out is not None:
        about = {"cpu": cpu_name(), "load_average": load, "versions": versions()}
        args.out.write_text(json.dumps(about | {"pages": rows}, indent=1) + "\n", encoding="utf-8")
    if any(row["bytes"] > BYTES or statistics.median(row["milliseconds"]) > MILLISECONDS for row in rows):
        raise SystemExit(1)


def cells(row: dict[str, Any]) -> list[str]:
    times = row["milliseconds"]
    return [row["page"], f"{row['bytes'] / 1000:.0f}", f"{statistics.median(times):.0f}", f"{max(times):.0f}"]


if __name__ == "__main__":
    main()
