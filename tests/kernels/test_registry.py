"""The choice of a backend: order, reasons, what is refused."""

import pytest
import torch

from optimum_mobilequant.kernels import BACKENDS, LinearSpec, Output, choose, cpp, prepare, registry
from optimum_mobilequant.kernels.registry import why_not
from tests.kernels.layers import OUTPUTS, U8, make


def spec(**changes):
    values = {
        "weight_bits": 8, "activation_bits": 8, "symmetric": True, "in_features": 64, "out_features": 64,
        "device": "cpu", "output": OUTPUTS["codes"],
    }  # fmt: skip
    return LinearSpec(**(values | changes))


@pytest.fixture
def machine(monkeypatch):
    """Says which backends this machine cannot use."""
    monkeypatch.delenv(registry.VARIABLE, raising=False)

    def lacks(*names, amx=False):
        monkeypatch.setattr(registry, "unavailable", lambda name: "not here" if name in names else None)
        monkeypatch.setattr(registry, "has_amx", lambda: amx)

    return lacks


@pytest.mark.parametrize(
    ("lacking", "changes", "amx", "chosen", "reasons"),
    [
        ((), {}, False, "cpp", {}),
        ((), {"weight_bits": 4}, False, "cpp", {}),
        (("cpp",), {}, False, "onednn", {"cpp": "not here"}),
        (("cpp", "onednn"), {}, False, "simulate", {"cpp": "not here", "onednn": "not here"}),
        ((), {}, True, "onednn", {}),
        ((), {"weight_bits": 4}, True, "cpp", {}),
        ((), {"activation_bits": 16}, True, "cpp", {}),
        ((), {"output": Output.totals()}, True, "cpp", {"onednn": "it does not return int32 totals"}),
        (("cpp",), {"symmetric": False, "weight_bits": 4}, False, "onednn", {"cpp": "not here"}),
        (("cpp",), {"symmetric": False}, False, "simulate",
         {"cpp": "not here", "onednn": "it takes symmetric 8-bit weights only"}),
        ((), {"device": "cuda"}, False, "triton", {}),
        (("triton",), {"device": "cuda"}, False, "simulate", {"triton": "not here"}),
        ((), {"device": "cuda", "in_features": 70000}, False, "simulate",
         {"triton": "it takes up to 65793 input features, not 70000"}),
        ((), {"in_features": 70000}, False, "onednn", {"cpp": "it takes up to 65793 input features, not 70000"}),
    ],
)  # fmt: skip
def test_the_fastest_that_can_and_why_not_a_faster_one(machine, lacking, changes, amx, chosen, reasons):
    machine(*lacking, amx=amx)
    choice = choose(spec(**changes))
    assert (choice.backend.name, choice.reasons) == (chosen, reasons)


def test_totals_of_wide_activations_have_no_backend(machine):
    machine()
    with pytest.raises(ValueError, match="no kernel backend can run linear_w8a16: cpp: totals of 16-bit"):
        choose(spec(activation_bits=16, output=Output.totals()))


def test_a_backend_by_name_and_by_variable(machine, monkeypatch):
    machine("onednn")
    assert choose(spec(), backend="reference").backend is BACKENDS["reference"]
    monkeypatch.setenv(registry.VARIABLE, "simulate")
    assert choose(spec()).backend.name == "simulate"
    assert choose(spec(), backend="cpp").backend.name == "cpp"  # the argument comes first
    monkeypatch.setenv(registry.VARIABLE, "gpu")
    with pytest.raises(
        ValueError, match="no kernel backend 'gpu'; there are triton, cpp, onednn, simulate, reference"
    ):
        choose(spec())
    with pytest.raises(ValueError, match="'onednn' cannot run linear_w8a8: not here"):
        choose(spec(), backend="onednn")


def test_what_a_layer_needs_is_asked_before_the_machine_is(monkeypatch):
    monkeypatch.setattr(registry, "unavailable", lambda name: pytest.fail("compiled for nothing"))
    assert why_not("cpp", spec(device="cuda"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused_is_what_fails(machine, backend):
    """A reason of ``supports`` is true of ``run``: no backend turns down what it can do by the table above."""
    assert BACKENDS[backend].supports(spec(device="cuda" if backend == "triton" else "cpu")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 3}, "weights have 4 or 8 bits"),
        ({"weight_bits": 4}, "are these 8-bit codes"),
        ({"codes": torch.zeros(4, 3)}, "codes are int8"),
        ({"codes": torch.zeros(0, 3, dtype=torch.int8)}, "codes are int8"),
        ({"scale": torch.ones(5)}, "scale has 5 elements for 6 output features"),
        ({"bias": torch.zeros(7, dtype=torch.int32)}, "bias has 7 elements"),
        ({"input_zero_point": 256}, "not on its grid"),
        ({"bias": torch.full((6,), 2**31 - 1, dtype=torch.int32), "backend": "cpp"}, "can leave int32"),
    ],
)
def test_bad_layers(changes, message):
    if changes.get("backend") == "cpp" and cpp.available():
        pytest.skip(f"compiled kernels: {cpp.available()}")
    codes = torch.full((6, 10), 100, dtype=torch.int8)
    values = {"codes": codes, "scale": torch.ones(6), "weight_bits": 8, "input_scale": 0.1, "input_zero_point": 3}
    with pytest.raises(ValueError, match=message):
        prepare(**(values | {"output": OUTPUTS["codes"], "backend": "simulate"} | changes))


@pytest.mark.parametrize("x", [torch.zeros(2, 9, dtype=torch.uint8), torch.zeros(2, 10, dtype=torch.int8)])
def test_bad_inputs(x):
    layer = make(2, 4, 10)
    with pytest.raises(ValueError, match=r"takes codes of dtype torch.uint8 and shape \[..., 10\]"):
        layer.prepare(OUTPUTS["codes"], "reference")(x)


def test_bad_outputs():
    with pytest.raises(ValueError, match="write float32 or bfloat16, not torch.float16"):
        Output.real(torch.float16)
    with pytest.raises(ValueError, match="unsigned"):
        Output.codes(1.0, 0, type(U8)(8, True))


def test_a_zero_point_of_zeros_is_symmetric():
    layer = make(1, 4, 8)
    layer.zero_point = torch.zeros(4, 1, dtype=torch.int32)
    assert layer.prepare(OUTPUTS["codes"], "reference").spec.symmetric
