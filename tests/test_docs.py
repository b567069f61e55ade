"""The documentation site: it builds without a warning, holds every page, and documents every public name."""

import dataclasses
import importlib
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
REFERENCE = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
SET_BY_THE_PACKAGE = {"quant_method", "format_version", "recorded"}


def resolve(name):
    module, _, attribute = name.rpartition(".")
    what = getattr(importlib.import_module(module), attribute)
    assert what.__module__ == module, f"{name} is defined in {what.__module__}"
    return what


def parameters_of(what):
    """Names that the docstring must explain: parameters of a function, fields of a dataclass."""
    if dataclasses.is_dataclass(what):
        return {
            field.name for field in dataclasses.fields(what) if not field.name.startswith("_")
        } - SET_BY_THE_PACKAGE
    return set(inspect.signature(what).parameters)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_name_of_the_reference_is_documented_with_all_its_parameters(name):
    what = resolve(name)
    documented = set(re.findall(r"^ +(\w+(?:, \w+)*):", what.__doc__, re.MULTILINE))
    documented |= set(re.findall(r"[.;] (\w+(?:, \w+)*):", what.__doc__))
    names = {part for group in documented for part in group.split(", ")}
    assert not (missing := parameters_of(what) - names), f"{name}: {sorted(missing)} not documented"
    for member, value in vars(what).items() if inspect.isclass(what) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and not member.startswith("_"):
            assert function.__doc__, f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_reference_with_its_errors_and_what_it_returns(name):
    what = getattr(optimum_mobilequant, name)
    assert f"{what.__module__}.{what.__name__}" in REFERENCE
    assert "Raises:" in what.__doc__
    if not inspect.isclass(what):
        returned = inspect.signature(what).return_annotation  # a text: the modules defer annotations
        explained = {name.rpartition(".")[2] for name in REFERENCE} | {"None"}
        assert returned in explained or "Returns:" in what.__doc__


def test_the_site_shows_every_name_of_the_reference(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert len(REFERENCE) > 25 and not [name for name in REFERENCE if f'id="{name}"' not in text]
    for member in ("MobileQuantConfig.resolve", "MobileQuantConfig.to_dict"):
        assert f'id="optimum_mobilequant.config.config.{member}"' in text


def test_the_pages_import_what_the_reference_has():
    """Tables such as ``PRESETS`` and parts of the kernels, which their own page explains, are left out."""
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    imports = [re.match(r"from (optimum_mobilequant[\w.]*) import ([\w, ]+)", line) for line in lines]
    seen = set()
    for found in filter(None, imports):
        for name in re.findall(r"\w+", found[2]) if ".kernels" not in found[1] else ():
            what = getattr(importlib.import_module(found[1]), name)
            if callable(what):
                seen.add(f"{what.__module__}.{what.__name__}")
    assert len(seen) > 10 and not seen - set(REFERENCE)


def test_every_page_has_one_place_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": (\S+\.md)$", menu, re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))
    assert re.findall(r"^  - ([^:]+):$", menu, re.MULTILINE) == [
        "Tutorials",
        "How-to guides",
        "Explanations",
        "Reference",
    ]


def test_the_paper_index_names_what_exists():
    text = (DOCS / "paper_index.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        *_, modules, tests, _ = row.split("|")
        assert "`" in modules and "`tests/" in tests, row
        for path in re.findall(r"`([^`]+)`", modules):
            assert (ROOT / "optimum_mobilequant" / path).exists(), path
        for path in re.findall(r"`([^`]+)`", tests):
            assert (ROOT / path).exists(), path
