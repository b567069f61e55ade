"""Integer weights: storage, casts, and optimum-quanto's view of the same bytes."""

import copy

import pytest
import torch

from optimum_mobilequant.nn import QWeight
from optimum_mobilequant.numerics import Grid, quantize, weight_qparams
from optimum_mobilequant.plan import WeightRule

RULES = {
    "int8": (WeightRule(8), (6, 10)),
    "int8 per tensor": (WeightRule(8, granularity="tensor"), (6, 10)),
    "int8 asymmetric": (WeightRule(8, symmetric=False), (6, 10)),
    "int4": (WeightRule(4), (6, 10)),
    "int4 odd rows": (WeightRule(4), (7, 10)),
    "int4 asymmetric": (WeightRule(4, symmetric=False), (7, 10)),
    "int3": (WeightRule(3), (6, 10)),
    "int3 asymmetric": (WeightRule(3, symmetric=False), (9, 10)),
    "int16": (WeightRule(16), (6, 10)),
    "gain": (WeightRule(16, granularity="tensor"), (10,)),
}
KEYS = {
    "int8": {"_data": torch.int8, "_scale": torch.float32},
    "int8 asymmetric": {"_codes": torch.int8, "_scale": torch.float32, "_zero_point": torch.int32},
    "int4": {"_data._data": torch.uint8, "_scale": torch.float32, "_shift": torch.uint8},
    "int3": {"_planes": torch.uint8, "_scale": torch.float32},
    "int3 asymmetric": {"_planes": torch.uint8, "_scale": torch.float32, "_zero_point": torch.int32},
    "int16": {"_codes": torch.int16, "_scale": torch.float32},
    "gain": {"_codes": torch.int16, "_scale": torch.float32},
}


def made(name):
    """A weight, and the float values it stands for."""
    rule, shape = RULES[name]
    grid, values = Grid(rule.bits, True), torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    view = values if rule.granularity == "channel" else values.reshape(1, -1)
    ends = view.amin(1, keepdim=True).clamp(max=0), view.amax(1, keepdim=True).clamp(min=0)
    scale, zero_point = weight_qparams(*ends, grid, rule.symmetric)
    if len(shape) == 1:
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    else:
        scale, zero_point = (t.expand(shape[0], 1).contiguous() for t in (scale, zero_point))
    codes = quantize(values, scale, zero_point, grid)
    return QWeight(codes, scale, zero_point, rule), (codes.float() - zero_point) * scale, codes


@pytest.fixture(params=RULES)
def weight(request):
    return made(request.param)[0]


@pytest.mark.parametrize("name", RULES)
def test_integers_and_values_are_kept(name):
    weight, values, codes = made(name)
    assert torch.equal(weight.codes.long(), codes.long())
    assert torch.equal(weight(), values)
    assert torch.equal(weight(torch.bfloat16), values.bfloat16())
    assert weight.shape == codes.shape


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_dtypes_of_the_state_dict(name):
    assert {k: v.dtype for k, v in made(name)[0].state_dict().items()} == KEYS[name]


def test_integers_take_the_room_they_need():
    def size(name):
        return sum(t.numel() * t.element_size() for k, t in made(name)[0].state_dict().items() if "scale" not in k)

    assert (size("int8"), size("int4"), size("int4 odd rows")) == (60, 30 + 6, 40 + 7)


@pytest.mark.parametrize("name", [n for n in RULES if n != "gain"])
def test_rows_are_the_rows_of_the_whole(name):
    weight, values, _ = made(name)
    ids = torch.tensor([[0, 5, 3], [3, 1, 0]])
    assert torch.equal(weight.rows(ids), values[ids])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_changes_nothing_that_is_stored(weight, cast):
    before = {k: v.clone() for k, v in weight.state_dict().items()}
    weight.to(cast).to(torch.float32)
    after = weight.state_dict()
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in after.items())
    weight.half()
    assert weight._scale.dtype == torch.float32


def test_deep_copy_and_state_dict_round_trip(weight):
    twin = copy.deepcopy(weight)
    assert torch.equal(twin(), weight())
    empty = QWeight.empty(weight.shape, weight.rule, "cpu")
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in weight.state_dict().items()
    }
    empty.load_state_dict(weight.state_dict())
    assert torch.equal(empty(), weight())
    assert torch.equal(empty.zero_point, weight.zero_point)


def test_an_empty_weight_is_not_mistaken_for_a_loaded_one(weight):
    assert QWeight.empty(weight.shape, weight.rule, "cpu")._scale.isnan().all()


@pytest.mark.parametrize("name", ["int8", "int8 per tensor", "int4", "int4 odd rows", "int4 asymmetric"])
def test_quanto_reads_the_same_values(name):
    weight, values, _ = made(name)
    tensor = weight.as_quanto()
    assert tensor.shape == weight.shape
    assert torch.allclose(tensor.dequantize(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int8 asymmetric", "gain"])
def test_what_quanto_cannot_represent_is_refused(name):
    with pytest.raises(ValueError, match="has no quanto type"):
        made(name)[0].as_quanto()
