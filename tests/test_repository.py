"""The files around the code: they parse, and what they say of versions and commands is true."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
yaml = pytest.importorskip("yaml", reason='pip install "optimum-mobilequant[dev]"')

ROOT = Path(__file__).parent.parent
PINS = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_the_citation_has_what_tools_require():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert "2408.13933" in citation["preferred-citation"]["url"]


def test_the_workflow_runs_the_check_and_the_oldest_supported_versions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert any(step.get("run") == ".ci/run" for step in workflow["jobs"]["check"]["steps"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (
        row for row in workflow["jobs"]["versions"]["strategy"]["matrix"]["include"] if row["name"] == "oldest"
    )
    assert project["requires-python"] == f">={oldest['python']}"
    for package in ("torch", "transformers", "optimum", "optimum-quanto"):
        (floor,) = re.findall(rf"^{package}>=([\d.]+)", "\n".join(project["dependencies"]), re.MULTILINE)
        assert re.search(rf"\b{package}=={re.escape(floor)}(\.\*)?( |$)", oldest["packages"]), package


def test_the_hooks_are_those_of_the_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks["repos"][0]["rev"] == f"v{PINS['ruff']}"
    names = {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
    assert names == {"ruff-check", "ruff-format", "mypy"}


def test_every_development_dependency_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=; ]", line)[0].lower() for line in extras["dev"] + extras["test"]} - {
        "optimum-mobilequant"
    }
    assert names - {name.lower() for name in PINS} == set()


def test_issue_forms_ask_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert any("mobilequant doctor" in str(item) for item in form["body"])


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|txt))`", text)
    assert len(named) > 6
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "optimum_mobilequant" / name).exists(), name
