"""Teachers are checked before anything is computed, and loaded as float models."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import quantize
from optimum_mobilequant.calibrate import stage as calibrate_stage
from optimum_mobilequant.run.teachers import load_teachers
from tests.tiny import VOCAB, build, config, token_ids

FINETUNE = {"recipe": "rtn", "effort": "light", "steps": None, "finetune": "scales", "finetune_steps": 4}


def tokenizer_of(words):
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token=words[0])


WORDS = [f"w{i}" for i in range(VOCAB)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    build("llama-gqa", seed=1).save_pretrained(folder / "other")
    build("llama-gqa", seed=2, hidden_size=48).save_pretrained(folder / "wider")
    build("llama-gqa", vocab_size=VOCAB + 1).save_pretrained(folder / "vocabulary")
    build("llama-gqa", max_position_embeddings=8).save_pretrained(folder / "short")
    quantize(build("llama-gqa"), None, config("w8a8")).save_pretrained(folder / "quantized")
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    for name, words in (("same words", WORDS), ("other words", swapped)):
        build("llama-gqa", seed=3).save_pretrained(folder / name)
        tokenizer_of(words).save_pretrained(folder / name)
    return folder


def run(teachers, tokenizer=None, run_dir=None, **options):
    options = config("w4a8", **{**FINETUNE, "teachers": teachers, **options})
    return quantize(build("llama-gqa"), tokenizer, options, run_dir=run_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocabulary", f'teacher ".*vocabulary" has a vocabulary of {VOCAB + 1} tokens and the model one of {VOCAB}'),
        ("quantized", "is quantized; give a float model"),
        ("short", "has 8 positions, fewer than seq_len=16"),
    ],
)
def test_unsuitable_teachers_are_refused_before_any_work(folder, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(calibrate_stage, "collect", lambda *a, **k: pytest.fail("the run had begun"))
    with pytest.raises(ValueError, match=message):
        run(["float", str(folder / name)], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_of_the_same_size_is_refused(folder):
    with pytest.raises(ValueError, match="another vocabulary: the token 'w0' has id 1 there and 0 here"):
        run([str(folder / "other words")], tokenizer_of(WORDS))
    run([str(folder / "same words")], tokenizer_of(WORDS))  # the control


def test_a_missing_teacher_and_one_named_twice_are_refused(folder):
    with pytest.raises(ValueError, match="is named twice"):
        run(["float", "float"])
    with pytest.raises(OSError):
        run([str(folder / "nothing here")])


def test_teachers_are_loaded_frozen_with_their_weights(folder):
    rows = ["float", {"model": str(folder / "wider"), "weight": 3}]
    own, other = load_teachers(rows, build("llama-gqa"), None, seq_len=16)
    assert (own.weight, own.model, other.weight) == (1.0, None, 3.0)
    assert other.model.dtype == torch.float32 and not other.model.training
    assert not any(p.requires_grad for p in other.model.parameters())
    assert [t.name for t in load_teachers(None, build("llama-gqa"), None, seq_len=16)] == ["float"]


def test_the_teachers_decide_the_result_and_belong_to_the_run(folder, tmp_path):
    losses = {}
    for name, teachers in {
        "none": None,
        "float": ["float"],
        "both": ["float", str(folder / "wider")],
        "mostly": [{"model": "float", "weight": 9}, str(folder / "wider")],
    }.items():
        losses[name] = run(teachers).config.quantization_config.recorded["finetune"]["start"]
    assert losses["none"] == losses["float"] < losses["mostly"] < losses["both"]
    run([str(folder / "other")], run_dir=tmp_path)
    run([str(folder / "other")], run_dir=tmp_path)
    with pytest.raises(ValueError, match="holds another run, which differs in: .*teachers"):
        run([str(folder / "wider")], run_dir=tmp_path)


@pytest.mark.parametrize(
    "teachers", [[], "float", [3], [{"weight": 1}], [{"model": "a", "weight": 0}], [{"model": "a", "w": 1}]]
)
def test_bad_lists_are_refused(teachers):
    with pytest.raises(ValueError, match="teachers must be a list of"):
        run(teachers)


def test_ids_without_tokenizer_compare_sizes_only(folder, monkeypatch):
    from optimum_mobilequant.run import teachers

    found = []
    monkeypatch.setattr(teachers.logger, "warning", found.append)
    run([str(folder / "other")], dataset=token_ids())
    assert "only the sizes of the vocabularies were compared" in found[0]
