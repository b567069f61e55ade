"""``mobilequant push``."""

import pytest

from optimum_mobilequant import cli
from tests.hub.loopback import READER

REPO = "me/model-w4a8"


def test_push_prints_the_address(saved, hub, store, capsys):
    code = cli.main(["push", str(saved[0]), REPO, "--private", "--license", "mit", "--message", "First"])
    assert code == 0
    assert capsys.readouterr().out == f"{hub.url}/{REPO}\n"
    assert store.repos[REPO].private
    assert store.repos[REPO].commits[0]["summary"] == "First"
    assert b"license: mit" in store.repos[REPO].files["README.md"]


def test_a_dry_run_sends_nothing_and_prints_card_and_files(saved, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = sorted(saved[0].rglob("*"))
    assert cli.main(["push", str(saved[0]), REPO, "--license", "mit", "--dry-run"]) == 0
    out = capsys.readouterr().out
    card, _, files = out.partition(f"files for {REPO}:\n")
    assert card.startswith("---\nlibrary_name: transformers\nlicense: mit\n")
    names = [line.split()[1] for line in files.splitlines()]
    assert names == sorted(["README.md", *(path.name for path in saved[0].iterdir())])
    assert sorted(saved[0].rglob("*")) == before


def test_a_dry_run_looks_up_the_base_only(saved, hub, store, capsys):
    assert cli.main(["push", str(saved[0]), REPO, "--base-model", "org/base", "--dry-run"]) == 0
    assert store.requests == [("GET", "/api/models/org/base")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "repository 'model' is no Hub id: give owner/name"),
        ([REPO, "--base-model", "x"], "base model 'x' is no Hub id"),
        ([REPO, "--exports", "nowhere"], "'nowhere' holds no finished export"),
        ([REPO, "--base-model", REPO], "is the base model itself"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_input_is_one_line_and_exit_code_2(saved, hub, store, capsys, arguments, message, dry):
    assert cli.main(["push", str(saved[0]), *arguments, *(["--dry-run"] if dry else [])]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "/api/repos/create" not in [path for _, path in store.requests]


def test_exit_codes_of_a_refused_and_of_an_interrupted_push(saved, hub, store, capsys, monkeypatch):
    store.fault = lambda method, path: 500 if "/commit/" in path else None
    assert cli.main(["push", str(saved[0]), REPO]) == 1
    assert "was interrupted" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", READER)
    assert cli.main(["push", str(saved[0]), REPO, "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "(403)" in err and READER not in err
