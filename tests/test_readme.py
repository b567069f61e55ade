"""README.md and docs/*.md: every block of Python and every `mobilequant` command runs, in the order of the page.

``org/model``, ``calib.txt`` and ``eval.txt`` exist in the folder where the blocks run; efforts are cut down.
"""

import re
import shlex
from dataclasses import dataclass, replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import cli
from optimum_mobilequant.config import recipes
from tests import tiny

PAGES = sorted([tiny.ROOT / "README.md", *(tiny.ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(tiny.ROOT).as_posix() for page in PAGES]
LANGUAGES = {"python", "bash", "text", "json"}
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Block:
    language: str
    code: str
    line: int
    executed: bool
    reason: str = ""


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        marked = re.fullmatch(r"<!-- not executed: (.+) -->", found["before"])
        reason = marked.group(1) if marked else ""
        yield Block(found["language"], found["code"], text[: found.start("code")].count("\n"), marked is None, reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a byte tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("pages")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "org" / "model")
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 512, "num_hidden_layers": 1}
    tiny.build("llama-gqa", **sizes).save_pretrained(folder / "org" / "model")
    (folder / "calib.txt").write_text("Once there was a small dog who liked to read. " * 200, encoding="utf-8")
    (folder / "eval.txt").write_text("The dog met a cat and they went to the park. " * 20, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_efforts(monkeypatch):
    for name, effort in recipes.EFFORTS.items():
        small = {"samples": 8, "seq_len": 32, "batch_size": 4, "eval_every": 1}
        small |= {steps: min(getattr(effort, steps), 2) for steps in ("steps", "rounding_steps", "finetune_steps")}
        monkeypatch.setitem(recipes.EFFORTS, name, replace(effort, **small))


def run_commands(code, where):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert words[:1] == ["mobilequant"], f"{where}: {line!r} is no mobilequant command: mark the block"
        assert cli.main(words[1:]) == 0, f"{where}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_blocks_of_a_page_run(page, folder, tmp_path, monkeypatch, capsys):
    for item in folder.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: name the language of the block"
        if not block.executed:
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        elif block.language == "bash":
            run_commands(block.code, where)
    assert "error" not in capsys.readouterr().err.lower()


def test_pages_hold_blocks_and_only_shell_commands_of_the_repository_are_left_out():
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert sum(block.language == "python" and block.executed for block in blocks) >= 6
    assert sum(block.language == "bash" and block.executed for block in blocks) >= 4
    # Python is left out only where this machine cannot run it
    left_out = [block for block in blocks if not block.executed and block.reason != "needs a GPU"]
    assert {block.language for block in left_out} <= {"bash"}
    fences = sum(line.startswith("```") for page in PAGES for line in page.read_text(encoding="utf-8").splitlines())
    assert fences == 2 * len(blocks)  # none escapes the pattern


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_between_pages_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.is_file(), f"{page.name}: {target}"
        if not anchor:  # a picture has no headings
            continue
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_the_readme_names_every_preset_recipe_effort_and_family():
    from optimum_mobilequant.families import FAMILIES
    from optimum_mobilequant.plan import PRESETS

    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*PRESETS, *recipes.RECIPES, *recipes.EFFORTS]:
        assert f"`{name}`" in text, name
    for family in FAMILIES:
        assert family.name in text.lower(), family.name


def test_the_method_page_names_every_role():
    from optimum_mobilequant.plan import PRESETS

    text = (tiny.ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for scheme in PRESETS.values():
        assert all(f"`{role}`" in text for role in [*scheme.activations, *scheme.weights])


def test_the_format_page_names_every_kind_of_key(folder, monkeypatch):
    from safetensors import safe_open

    from optimum_mobilequant import quantize

    text = (tiny.ROOT / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")
    for variant, preset in (
        ("llama-bias", "w4a8"),
        ("stablelm", "w8a8-paper"),
        ("qwen3", "w8a8"),
        ("llama", "w4a8-g128"),
    ):
        model = quantize(tiny.build(variant), None, tiny.config(preset))
        monkeypatch.chdir(folder)
        model.save_pretrained("format")
        with safe_open("format/model.safetensors", framework="pt") as file:
            endings = {re.search(r"\.(weight\..+|[a-z_]+)$", key)[1] for key in file.keys()}  # noqa: SIM118
            assert set(file.metadata()) == {"format", "mobilequant_scheme"}
        for ending in endings:
            assert f".{ending}`" in text, ending
