"""GPTQ and Qronos inside a run: what they see, what they leave alone, and that they help."""

from contextlib import contextmanager

import pytest
import torch

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.calibrate.stage import calibrate
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.rounding import Compensation, Method, round_layers, sequential
from optimum_mobilequant.run.prepare import prepare
from optimum_mobilequant.transform.stage import transform
from optimum_mobilequant.tune import build_student
from tests.tiny import FAMILIES, build, config, logits_of, token_ids

DATA = {"dataset": token_ids(64), "samples": 48, "batch_size": 16}


def codes_of(model):
    modules = model.named_modules()
    return {n: m.codes.to(torch.int32) for n, m in modules if type(m).__name__ == "QWeight" and len(m.shape) == 2}


def run(rounding, preset="w4a8", variant="llama-gqa", **options):
    return quantize(build(variant), None, config(preset, recipe="rtn", rounding=rounding, **DATA, **options))


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_objective_falls_in_every_family(variant):
    model = run("gptq", variant=variant)
    record = model.config.quantization_config.recorded["rounding"]
    assert record["best"] < record["start"]
    assert record["best_step"] == 2


@pytest.mark.parametrize(
    ("preset", "options"),
    [("w4a8-asym", {}), ("w4a8", {"magr": True}), ("w4a8", {"rounding_act_order": False, "rounding_block": 5})],
)
@pytest.mark.parametrize("rounding", ["gptq", "qronos"])
def test_the_objective_falls_with_every_option(rounding, preset, options):
    record = run(rounding, preset, **options).config.quantization_config.recorded["rounding"]
    assert record["best"] < record["start"]


def test_it_follows_learned_transforms():
    options = config("w4a8", recipe="mobilequant", rounding="gptq", **DATA)
    recorded = quantize(build("llama-gqa"), None, options).config.quantization_config.recorded
    assert recorded["rounding"]["best"] < recorded["rounding"]["start"]
    assert len(recorded["history"]) > 1


def test_it_is_deterministic_and_leaves_the_rest_alone():
    nearest, first, second = (codes_of(run(r)) for r in ("nearest", "gptq", "gptq"))
    assert first.keys() == nearest.keys()
    for name, codes in first.items():
        assert torch.equal(codes, second[name])
        projection = "proj" in name
        assert torch.equal(codes, nearest[name]) != projection, name


def test_worse_than_nearest_is_dropped(monkeypatch, caplog):
    """With inputs that have nothing to do with the layer's own, the result is worse on the text: it is not kept."""

    def other(layer, linear, streams):
        x = torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0)).double()
        x[:, 1:] = x[:, :1] + 0.01 * x[:, 1:]
        return sequential.InputMoments(x.T @ x)

    monkeypatch.setattr(sequential, "_moments", other)
    model = run("gptq")
    record = model.config.quantization_config.recorded["rounding"]
    assert record["best_step"] == 0 and record["best"] == record["start"]
    assert torch.equal(logits_of(model), logits_of(run("nearest")))


@contextmanager
def student_of(**options):
    """A job inside its ``with``: left open, it would hand its grad mode on to other tests."""
    model = build("llama-gqa")
    with prepare(model, None, config("w4a8", recipe="rtn", **DATA, **options), None) as job:
        student = build_student(model, job.plan)
        learnables = transform(model, student, calibrate(student, job), job)
        yield job, student, dict(learnables.projections())


@torch.no_grad()
def test_the_hessian_is_of_what_the_quantized_model_reads(monkeypatch):
    """Each linear's moments equal those of its real input once everything before it is rounded."""
    with student_of() as (job, student, weights):
        names, moments_of, choose = {id(w): n for n, w in weights.items()}, {}, sequential._round

        def watched(weight, moments, method):
            moments_of[names[id(weight)]] = moments
            return choose(weight, moments, method)

        monkeypatch.setattr(sequential, "_round", watched)
        round_layers(student, job.plan, weights, job.data.train, Method(True, Compensation(), False), batch_size=16)
        inputs = {}
        for name in weights:
            linear = student.get_submodule(name)
            linear.register_forward_pre_hook(
                lambda m, args, name=name: inputs.setdefault(name, []).append(
                    args[0] if m.input is None else m.input(args[0])
                )
            )
        for mode in (Mode.QUANTIZE, Mode.OFF):
            set_mode(student, mode)
            for ids in job.data.train.split(16):
                student(input_ids=ids, use_cache=False)
        half = len(job.data.train.split(16))
        for name, moments in moments_of.items():
            quantized, plain = (
                torch.cat([x.flatten(0, -2) for x in part]).double()
                for part in (inputs[name][:half], inputs[name][half:])
            )
            torch.testing.assert_close(moments.hessian, quantized.T @ quantized, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moments.cross, quantized.T @ plain, rtol=1e-4, atol=1e-4)
        assert moments_of.keys() == weights.keys()


@torch.no_grad()
def test_stored_codes_are_the_compensated_ones():
    with student_of() as (job, student, weights):
        rounded = round_layers(
            student, job.plan, weights, job.data.train, Method(False, Compensation(), False), batch_size=16
        )
        for name, weight in weights.items():
            base, scale = rounded[name]["base"], rounded[name]["scale"]
            codes = weight.codes()[0]
            assert torch.equal(codes.float(), base.round().clamp(-8, 7))
            assert torch.equal(weight(torch.float32), codes.float() * scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "mobilequant", "magr": True}, 'magr=True would have no effect with rounding="nearest"'),
        ({"rounding": "learned", "rounding_damping": 0.1}, 'set rounding="gptq" or "qronos"'),
        ({"rounding": "gptq", "rounding_steps": 5}, 'rounded by gptq; set rounding="learned"'),
        ({"rounding": "gptq", "rounding_damping": 0.0}, r"a number in \(0, 1\]"),
        ({"rounding": "gptq", "rounding_block": 0}, "a whole number from 1"),
        ({"rounding": "qronoz"}, 'did you mean "qronos"'),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig("w4a8", **options)
