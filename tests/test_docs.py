"""The documentation site: it builds without a warning, holds every page, and documents every public name."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_mobilequant

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def build(config, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason='pip install "optimum-mobilequant[docs]"')
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


def test_every_page_is_in_the_site(site):
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        path = site / ("index.html" if name == Path("index") else f"{name}/index.html")
        assert path.is_file(), name
    assert "MobileQuantConfig" in (site / "api" / "index.html").read_text(encoding="utf-8")


def test_the_site_asks_no_other_server(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="https?://(?!optimum)[^"]*\.(?:js|css|woff2?)"', text
        )


def test_a_broken_link_fails_the_build(site, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](missing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "missing.md" in done.stderr


PUBLIC = sorted(set(optimum_mobilequant.__all__) - {"__version__"})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_reference_with_all_its_parameters(name):
    what = getattr(optimum_mobilequant, name)
    assert f"::: {what.__module__}.{what.__name__}\n" in (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^ +(\w+(?:, \w+)*):", what.__doc__, re.MULTILINE))
    documented |= set(re.findall(r"[.;] (\w+(?:, \w+)*):", what.__doc__))
    names = {part for group in documented for part in group.split(", ")}
    missing = set(inspect.signature(what).parameters) - names - {"_"}
    assert not missing, f"{name}: {sorted(missing)} not documented"


def test_the_paper_index_names_what_exists():
    text = (DOCS / "paper_index.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        *_, modules, tests, _ = row.split("|")
        for path in re.findall(r"`([^`]+)`", modules):
            assert (ROOT / "optimum_mobilequant" / path).exists(), path
        for path in re.findall(r"`([^`]+)`", tests):
            assert (ROOT / path).exists(), path
