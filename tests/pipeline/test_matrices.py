"""Rotations and other matrices through the whole pipeline: they merge, and leave nothing behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import pipeline, quantize
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.transform import stage as transform_stage
from tests.folding import divergence
from tests.tiny import FAMILIES, build, config, logits_of, token_ids

TIED = ("llama-tied", "gemma")
MIX = ["norm_qkv", "norm_mlp", "up_down", "v_o", "q_k"]


def options_for(variant, **more):
    options = {"rotate": "r1r2", "recipe": "mobilequant", **more}
    if variant in TIED and "1" in options["rotate"]:
        options["untie"] = True
    return options


def learned(variant="llama-gqa", preset="w8a8", **options):
    return quantize(build(variant), None, config(preset, **options_for(variant, **options)))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("variant", FAMILIES)
def test_rotated_model_saves_and_loads_as_any_other(variant, tmp_path):
    sites = MIX if variant == "qwen3" else [*MIX, "q_k_rotation"]
    model = learned(variant, preset="w8a16", transforms=sites)
    reference = logits_of(build(variant))
    assert divergence(logits_of(model), reference) < 0.05
    plain = quantize(build(variant), None, config("w8a16"))
    names = {name for name in model.state_dict() if not name.startswith("lm_head.weight")}
    assert names == {name for name in plain.state_dict() if not name.startswith("lm_head.weight")}
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(reloaded, model)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    # a plain transformers model of the rotated weights computes nearly what the float model does
    assert divergence(logits_of(reloaded.dequantize()), reference) < 0.05


def test_an_untied_head_has_a_table_of_its_own(tmp_path):
    model = build("llama-tied")
    untied = quantize(model, None, config(untie=True))
    assert "lm_head.weight._data" in untied.state_dict()
    assert not plan_of(untied, untied.config.quantization_config).geometry.tied
    untied.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(reloaded, untied)
    tied = quantize(build("llama-tied"), None, config())
    assert "lm_head.weight._data" not in tied.state_dict()
    assert tied.config.tie_word_embeddings
    assert torch.equal(logits_of(tied), logits_of(untied)), "the same table, stored twice"


def test_a_failed_run_leaves_the_model_tied(monkeypatch):
    model = build("llama-tied")
    monkeypatch.setattr(pipeline, "fold_and_round", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, None, config(untie=True, rotate="r1"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("llama-tied", {"rotate": "r1"}, "set untie=True"),
        ("llama", {"untie": True}, "untie=True would have no effect"),
        ("qwen3", {"recipe": "mobilequant", "transforms": ["q_k_rotation"]}, "does not merge into qwen3"),
    ],
)
def test_refused_before_any_long_work(variant, options, message, monkeypatch):
    monkeypatch.setattr(pipeline, "calibrate", lambda *a: pytest.fail("the run had begun"))
    with pytest.raises(ValueError, match=message):
        quantize(build(variant), None, config(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": "r2"},
        {"rotate": "r1", "lr_matrices": 5e-3},
        {"transforms": ["v_o_dense"]},
        {"transforms": ["q_k_rotation"]},
    ],
    ids=["r2", "r1", "v_o_dense", "q_k_rotation"],
)
def test_matrices_alone_learn(options):
    """With everything else off, the objective falls, in the validation that decides what is kept."""
    off = dict.fromkeys(("learn_clips", "learn_ranges"), False)
    model = learned(
        **{"rotate": None, "transforms": [], "lr_matrices": 0.02, **options, **off},
        preset="w8a8-full",
        steps=48,
        samples=16,
    )
    recorded = model.config.quantization_config.recorded
    assert recorded["best_step"] > 0
    assert recorded["loss"]["best"] < 0.97 * recorded["loss"]["start"]


def test_fixed_matrices_stay_fixed():
    seen = []
    attach = transform_stage.attach_matrices

    def keep(*args):
        seen.append(attach(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform_stage, "attach_matrices", keep)
        learned(learn_matrices=False)
        assert not any(p.any() for m in seen[0].values() for p in m.parameters())


def test_rotation_with_rounding_only():
    """The recipe that does nothing but round takes a rotation as well: its start is the same function."""
    model = quantize(build("llama-gqa"), None, config("w8a16", rotate="r1r2"))
    assert divergence(logits_of(model), logits_of(build("llama-gqa"))) < 1e-2


def test_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    options = options_for("llama-gqa", effort="light", steps=4, dataset=token_ids(), transforms=[*MIX, "q_k_rotation"])
    expected = quantize(build("llama-gqa"), None, config("w4a8", **options))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fold_and_round", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(build("llama-gqa"), None, config("w4a8", **options), run_dir=str(tmp_path))
    resumed = quantize(build("llama-gqa"), None, config("w4a8", **options), run_dir=str(tmp_path))
    assert same(resumed, expected)


def test_learned_rounding_follows_matrices():
    model = learned(preset="w4a8", recipe="best", rounding_steps=4)
    recorded = model.config.quantization_config.recorded
    assert recorded["rounding"]["best"] <= recorded["rounding"]["start"]


def test_gradient_checkpointing_changes_no_bit():
    runs = [learned(preset="w4a8", gradient_checkpointing=option) for option in (True, False)]
    assert same(*runs)


def test_a_prefix_follows_the_matrices(monkeypatch):
    """Its keys and values in the cache are those of the changed weights; the run refuses any others."""
    from optimum_mobilequant.nn.tunable import TunableWeight
    from optimum_mobilequant.numerics.fake_weight import rescale

    sites = [*MIX, "q_k_rotation", "v_o_dense"]
    options = {"prefix": [1, 5], "recipe": "mobilequant", "rotate": "r1", "transforms": sites, "steps": 2}
    model = quantize(build("llama-gqa"), None, config("w8a16", **options))
    assert len(model.config.quantization_config.prefix_ids()) == 2
    monkeypatch.setattr(TunableWeight, "carry_rows", lambda self, x: rescale(x, None, None))
    with pytest.raises(ValueError, match="already differs from the float model"):
        quantize(build("llama-gqa"), None, config("w8a16", **{**options, "rotate": "r2", "transforms": MIX}))
