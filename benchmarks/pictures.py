"""The pictures of the documentation, as SVG, from the stored results: the same bytes each time.

    python benchmarks/pictures.py            # writes docs/pictures/*.svg
    python benchmarks/pictures.py --check    # says which would change, and writes nothing
    python benchmarks/pictures.py --report report.html    # docs/pictures/report.png, with Chromium

Colours follow the reader's light or dark setting; text is text. No number is typed here: each comes from
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from static_dynamic import CASES

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "docs" / "pictures"
WIDTH, LABEL, ROW, BAR = 640, 220, 26, 16
# Not black on white: it stays readable on both grounds until the style sheet chooses.
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:15px}"
    ".small{font-size:12px;fill:#555}"
    ".a{fill:#3367b0}.b{fill:#c77700}.ground{fill:#fff}.axis{stroke:#999}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.small{fill:#b0b0b0}.a{fill:#7aa7ec}.b{fill:#f0a94a}"
    ".ground{fill:#1b1c20}.axis{stroke:#777}}"
)


@dataclass(frozen=True)
class Bar:
    """One bar: its label, length, the text behind it, and its series ("a" or "b")."""

    label: str
    value: float
    text: str
    kind: str = "a"


def bars(title: str, note: str, parts: Sequence[tuple[str, Sequence[Bar]]], *, most: float) -> str:
    """Horizontal bars in named groups. ``most`` is where the axis ends: longer bars are cut and marked."""
    body, y = [], 54
    space = WIDTH - LABEL - 110
    for name, group in parts:
        if name:
            body.append(f'<text class="small" x="8" y="{y + 12}">{html.escape(name)}</text>')
            y += 22
        start = y
        for bar in group:
            long = space * min(bar.value, most) / most
            cut = " ›" if bar.value > most else ""
            body.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{html.escape(bar.label)}</text>')
            body.append(f'<rect class="{bar.kind}" x="{LABEL}" y="{y}" width="{max(long, 1):.1f}" height="{BAR}"/>')
            body.append(f'<text x="{LABEL + long + 6:.1f}" y="{y + 13}">{html.escape(bar.text)}{cut}</text>')
            y += ROW
        body.append(f'<line class="axis" x1="{LABEL}" x2="{LABEL}" y1="{start - 4}" y2="{y - 6}"/>')
        y += 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'aria-label="{html.escape(title)}"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="ground" width="{WIDTH}" height="{y}" rx="6"/>'
        f'<text class="title" x="8" y="24">{html.escape(title)}</text>'
        f'<text class="small" x="8" y="42">{html.escape(note)}</text>{"".join(body)}</svg>\n'
    )


def load(name: str) -> Any:
    return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))


def ladder() -> str:
    """Static against dynamic, and what each part of the method adds; from static_dynamic.json."""
    found = load("static_dynamic.json")["rows"]
    parts = []
    for variant, told in (("plain", "the model as it is"), ("injected", "the same model with outlier channels")):
        rows = [
            row for row in found if row["variant"] == variant and row["preset"] == "w4a8" and row["gap"] is not None
        ]
        rows.sort(key=lambda row: CASES.index(row["case"]))
        group = [
            Bar(row["case"], 100 * row["gap"], f"{100 * row['gap']:.2f} %", "b" if "dynamic" in row["case"] else "a")
            for row in rows
        ]
        parts.append((told, group))
    note = "W4A8, demo model (2.6 M parameters), loss of perplexity against float; orange: ranges at run time"
    return bars("From float to learned static ranges", note, parts, most=18)


def speed() -> str:
    """Tokens per second of contenders; from speed_tinyllama.json."""
    found = load("speed_tinyllama.json")
    parts = []
    for phase, told in (("prefill", "reading a prompt of 256 tokens"), ("decode", "writing")):
        longest = max(
            row[f"{phase}_tokens_per_s"] for p in ("w8a8", "w4a8") for row in found[p]["contenders"].values()
        )
        for preset in ("w8a8", "w4a8"):
            group = []
            for name, row in found[preset]["contenders"].items():
                value = row[f"{phase}_tokens_per_s"]
                label = "this package" if name == "mobilequant" else name
                group.append(Bar(label, value / longest, f"{value:.3g}", "a" if name == "mobilequant" else "b"))
            parts.append((f"{told}, {preset.upper()}, tokens per second", group))
    note = "TinyLlama-1.1B's shape, random weights, two cores with AVX512-VNNI"
    return bars("Speed on a CPU", note, parts, most=1)


def screenshot(page: Path, picture: Path) -> None:
    """The top of a report, at the width of a tablet."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += ["--window-size=820,1900", f"--screenshot={picture}"]
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FILES = {"ladder.svg": ladder, "speed.svg": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a picture is not up to date")
    parser.add_argument(
        "--report", type=Path, metavar="HTML", help="take a picture of this page of `mobilequant report`"
    )
    args = parser.parse_args()
    if args.report:
        screenshot(args.report, PICTURES / "report.png")
        return
    PICTURES.mkdir(exist_ok=True)
    for name, draw in FILES.items():
        path, text = PICTURES / name, draw()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            raise SystemExit(f"{path.name} is not what the results give: run python benchmarks/pictures.py")
        path.write_text(text, encoding="utf-8")
        print(path.name, f"{len(text):,} bytes")


if __name__ == "__main__":
    main()
