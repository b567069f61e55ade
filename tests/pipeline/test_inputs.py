"""Unsuitable input gives one clear error, and whatever goes wrong the caller's model stays as it was."""

import copy
import errno
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from optimum_mobilequant import MobileQuantConfig, pipeline, quantize
from optimum_mobilequant.checkpoint import stage as checkpoint_stage
from optimum_mobilequant.run.run_dir import RunDirectory
from optimum_mobilequant.tune import LearnResult
from optimum_mobilequant.tune import stage as tune_stage
from tests.tiny import VOCAB, build, config, logits_of, token_ids


def state_of(model):
    """Everything about a model that a failed run could have changed."""
    return {
        "tensors": {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "modules": {n: (type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "gradients": {k: p.grad is None for k, p in model.named_parameters()},
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "quantized": getattr(model, "is_quantized", False),
    }


def assert_unchanged(model, before):
    after = state_of(model)
    tensors, kept = after.pop("tensors"), dict(before)
    expected = kept.pop("tensors")
    assert after == kept
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        if not tensor.is_meta:
            assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name


def half_trained(variant="llama-gqa", dtype=torch.float32):
    """A model in train mode with some parameters frozen: flags that must come back as they are."""
    model = build(variant).to(dtype).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    return model


def with_nan():
    model = half_trained()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    return model


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                            num_attention_heads=4))  # fmt: skip


def on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build("llama").config)


def from_inference_mode():
    with torch.inference_mode():
        return build("llama")


def offloaded():
    model = build("llama")
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    return model


def spread():
    """As after ``device_map="auto"`` with two cards; no test machine has two, so the parameters only say so."""
    model = build("llama")
    places = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    model.parameters = lambda recurse=True: iter(places)
    return model


def in_float64():
    return half_trained(dtype=torch.float64)


def of_integers():
    model = half_trained()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (half_trained, {"dataset": None}, "need calibration text: give dataset="),
        (half_trained, {"dataset": token_ids(1, 20)}, "has 20 tokens, but one training and one validation .* take 32"),
        (half_trained, {"dataset": [[1, 2, VOCAB + 5] * 40]}, "token ids reach from 1 to 101, but .* has 96 entries"),
        (half_trained, {"dataset": ["some text"] * 99}, "no tokenizer could be loaded from .*; pass tokenizer="),
        (half_trained, {"overrides": {"*.nothing": {"bits": 16}}}, 'override "\\*.nothing" matches no tensor'),
        (half_trained, {"family": "qwen3"}, 'family "qwen3" expects modules that this model lacks'),
        (with_nan, {}, "parameter model.layers.1.mlp.up_proj.weight holds values that are not finite"),
        (neox, {}, 'no family serves model_type "gpt_neox"'),
        (spread, {}, "the model is spread over \\['cuda:0', 'cuda:1'\\]; load it on one device"),
        (on_meta, {}, "weights without data \\(meta device\\)"),
        (from_inference_mode, {}, "loaded under torch.inference_mode"),
        (offloaded, {}, "offloaded to disk or split with the CPU"),
        (in_float64, {}, "is float64, which tuning in float32 would round; call model.float"),
        (of_integers, {}, "parameter lm_head.weight is torch.int8: load the float model"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_unsuitable_input(make, options, message, monkeypatch):
    monkeypatch.setattr(pipeline, "build_student", lambda *a: pytest.fail("work began before the input was checked"))
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, None, config(**options))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("org/model", None, config()), "needs a transformers model in memory, not a str"),
        ((build("llama"), config()), r"quantize\(model, tokenizer, config\)"),
        ((build("llama"), None, {"preset": "w4a8"}), "not NoneType and dict"),
        ((build("llama").model, None, config()), "load the model with AutoModelForCausalLM"),
        ((build("llama"), None, config(device="cuda:99")), 'device "cuda:99" cannot be used here'),
        ((build("llama"), None, config(dataset="missing/calib.txt")), "calib.txt does not exist"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quantize(*arguments)


def test_a_config_serves_several_runs():
    shared = config()
    for variant in ("llama", "qwen2"):
        quantize(build(variant), None, shared)
    assert isinstance(shared.dataset, list) and not shared.recorded and shared.scheme is None


def test_a_loss_too_large_for_a_perplexity_is_recorded_as_infinite():
    model = build("llama")
    model.lm_head.weight.data *= 3000
    recorded = quantize(model, None, config()).config.quantization_config.recorded
    assert recorded["validation_perplexity"]["float"] == float("inf")


def test_empty_dataset_is_refused_when_configured():
    with pytest.raises(ValueError, match="dataset is empty"):
        MobileQuantConfig(dataset=[])


def test_a_quantized_model_is_refused(tmp_path):
    model = quantize(build("llama"), None, config())
    before = state_of(model)
    with pytest.raises(ValueError, match="quantized already; load the float model"):
        quantize(model, None, config())
    assert_unchanged(model, before)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(AutoModelForCausalLM.from_pretrained(tmp_path), None, config())


def overflowing():
    """Finite weights, activations that are not."""
    model = half_trained()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e38)
    return model


def test_activations_that_overflow_name_the_first_one():
    model = overflowing()
    before = state_of(model)
    with pytest.raises(ValueError, match="activation model.layers.0.mlp.up_proj.output is not finite"):
        quantize(model, None, config())
    assert_unchanged(model, before)


# -- failures in the middle -------------------------------------------------------------------------------------------


def nan_objective(*args, **kwargs):
    return lambda student, teacher, ids: student(input_ids=ids).logits.sum() * float("nan")


def full_disk(self, stage, tensors, meta):
    raise OSError(errno.ENOSPC, "the disk is full")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def fail_with_nan_loss(patch):
    patch.setattr(tune_stage, "make_objective", nan_objective)
    return FloatingPointError, "not finite"


def fail_with_a_full_disk(patch):
    patch.setattr(RunDirectory, "save", full_disk)
    return OSError, "disk is full"


def fail_with_an_interrupt(patch):
    patch.setattr(checkpoint_stage, "pack", interrupted)
    return KeyboardInterrupt, None


def fail_by_being_worse(patch):
    patch.setattr(tune_stage, "learn_end_to_end", lambda *a, **k: LearnResult(1.0, 2.0, 1, 0.1, [(0, 1.0)]))
    return RuntimeError, "tuning made the model worse: validation loss 1 -> 2. Lower the learning rates"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fail", [fail_with_nan_loss, fail_with_a_full_disk, fail_with_an_interrupt, fail_by_being_worse]
)
def test_model_is_unchanged_when_a_run_fails(fail, dtype, monkeypatch, tmp_path):
    model = half_trained("qwen2", dtype)
    before, reference = state_of(model), logits_of(model)
    kind, message = fail(monkeypatch)
    with pytest.raises(kind, match=message):
        quantize(model, None, config(recipe="mobilequant"), run_dir=str(tmp_path / "run"))
    assert_unchanged(model, before)
    assert torch.equal(logits_of(model), reference)
    monkeypatch.undo()
    quantize(model, None, config())  # and nothing is left that would disturb another run


# -- surroundings -----------------------------------------------------------------------------------------------------


def learned(model, **options):
    return quantize(model, None, config("w4a8", recipe="mobilequant", **options)).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_mode_of_the_caller_does_not_matter(mode):
    expected = learned(build("llama-gqa"))
    model = build("llama-gqa")
    with mode():
        result = learned(model)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert same(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model_is_tuned_in_float32(dtype):
    model = build("qwen2").to(dtype)
    upcast = copy.deepcopy(model).float()
    quantized = quantize(model, None, config(recipe="mobilequant"))
    assert quantized.dtype == torch.float32
    assert same(quantized.state_dict(), learned_w8a8(upcast))


def learned_w8a8(model):
    return quantize(model, None, config(recipe="mobilequant")).state_dict()


def test_quantizing_changes_the_given_model_and_returns_it():
    model = half_trained()
    result = quantize(model, None, config())
    assert result is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_quantized
    recorded = model.config.quantization_config.recorded
    assert recorded["validation_perplexity"].keys() == {"float", "start", "quantized"}
    assert recorded["versions"]["torch"] == torch.__version__


def test_the_given_config_stays_as_it_is():
    """The model carries a copy of it, with the data replaced by its record."""
    options = config()
    before = options.to_dict()
    stored = quantize(build("llama"), None, options).config.quantization_config
    assert options.to_dict() == before
    assert isinstance(options.dataset, list)
    assert stored is not options
    assert stored.dataset == before["dataset"]


WRONG_FAMILIES = [("llama-gqa", "gemma"), ("gemma", "llama"), ("llama-gqa", "stablelm")]


@pytest.mark.parametrize(("variant", "family"), WRONG_FAMILIES)
def test_a_family_that_computes_something_else_is_refused(variant, family):
    with pytest.raises(ValueError, match="entry does not describe this architecture"):
        quantize(build(variant), None, config("w8a8", family=family))
