"""The compiled passes of tuning: the values of torch's operations bit for bit, their gradients, and what is done
without a compiler."""

import logging

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.kernels import tuning
from optimum_mobilequant.kernels.tuning import build
from optimum_mobilequant.nn.modules import _Normalise
from optimum_mobilequant.nn.tuned_attention import Encoding, attend
from optimum_mobilequant.numerics import (
    Grid,
    fake_quantize_learned,
    fake_quantize_offset,
    fake_quantize_open,
    fake_quantize_weight,
)
from optimum_mobilequant.tune.objective import kl_top_k
from tests.kernels.test_build import no_compiler, read_only_cache
from tests.tiny import build as build_model
from tests.tiny import config

U8, U16, S4 = Grid(8, signed=False), Grid(16, signed=False), Grid(4, signed=True)


@pytest.fixture
def by_both(monkeypatch):
    """Runs a function with the compiled passes, then without them."""
    if tuning.passes() is None:
        pytest.skip("no compiler")

    def run(function):
        found = function()
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "passes", lambda: None)
            return found, function()

    return run


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def same(found, expected, *, exact=1, room=1e-7):
    """The first ``exact`` tensors bit for bit, sums up to their order and to ``room``."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None:
            assert b is None
        elif number < exact:
            assert torch.equal(a, b) and a.stride() == b.stride()
        else:
            assert (a - b).norm() <= 1e-5 * b.norm() + room, number


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33), (70, 300)])
@pytest.mark.parametrize("grid", [U8, U16])
def test_activations(by_both, shape, grid):
    x, grad = torch.randn(shape) * 3, torch.randn(shape)
    steps = torch.tensor(7.0 / grid.qmax), torch.tensor(float(grid.qmax // 3))

    def run():
        inner, scale, zero = leaves(x, *steps)
        out = fake_quantize_learned(inner, scale, zero, grid)
        out.backward(grad)
        return out.detach(), inner.grad, scale.grad, zero.grad

    # torch takes the scale's gradient as the difference of two large sums
    same(*by_both(run), exact=2, room=float(1e-6 * grad.norm() * x.norm() / steps[0]))


def test_ties_ends_and_what_is_not_a_number(by_both):
    x = torch.tensor([0.5, 1.5, -0.5, 300.0, -300.0, 255.5, float("inf"), -float("inf"), float("nan")])

    def run():
        out = fake_quantize_open(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), U8)
        return (torch.nan_to_num(out, nan=-7.0),)

    same(*by_both(run))


def test_any_strides(by_both):
    x, grad = torch.randn(2, 4, 6, 8), torch.randn(2, 6, 4, 8)
    for view in (lambda t: t.transpose(1, 2), lambda t: t[:, ::2].transpose(1, 2), lambda t: t[:, :1].expand_as(t)):

        def run(view=view):
            inner, scale = leaves(x, torch.tensor(0.02))
            out = fake_quantize_learned(view(inner), scale, torch.tensor(100.0), U8)
            out.backward(grad.expand_as(out) if out.shape == grad.shape else torch.ones_like(out))
            return out.detach(), inner.grad, scale.grad

        same(*by_both(run), exact=2, room=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_weights(by_both, symmetric, parts):
    shape = (130, 77)
    weight, grad = torch.randn(shape), torch.randn(shape)
    weight[5], weight[6] = 0.0, weight[6].abs()  # a row of zeros, a row of one sign
    learned = torch.randn(130) * 0.3, torch.randn(77) * 0.3, torch.randn(130, 2) + 2
    learned = [t if there else None for t, there in zip(learned, parts, strict=True)]

    def run():
        inner = leaves(*learned)
        out = fake_quantize_weight(weight, *inner, S4, symmetric=symmetric, per_channel=True)
        out.backward(grad)
        return out.detach(), *(None if t is None else t.grad for t in inner)

    same(*by_both(run))


def test_weights_that_learn_themselves_and_single_ranges(by_both):
    weight, rows, grad = torch.randn(20, 40), torch.randn(20) * 0.2, torch.randn(20, 40)
    for per_channel in (True, False):

        def run(per_channel=per_channel):
            inner = leaves(weight, rows)
            out = fake_quantize_weight(*inner, None, None, S4, symmetric=True, per_channel=per_channel)
            out.backward(grad)
            return out.detach(), *(t.grad for t in inner)

        same(*by_both(run))


def test_offsets(by_both):
    base, offset, grad = torch.randn(130, 77) * 4, torch.randn(130, 77) * 0.6, torch.randn(130, 77)
    scale, gain = torch.rand(130, 1), torch.randn(130, 1) * 0.1
    zero = torch.randint(-3, 3, (130, 1), dtype=torch.int32)

    def run():
        inner = leaves(offset, gain)
        out = fake_quantize_offset(base, scale, zero, *inner, S4)
        out.backward(grad)
        return out.detach(), *(t.grad for t in inner)

    same(*by_both(run), exact=2)


@pytest.mark.parametrize("centre", [True, False])
def test_norms(by_both, centre):
    x, gain, grad = torch.randn(3, 50, 77), torch.rand(77), torch.randn(3, 50, 77)

    def run():
        inner = leaves(x, gain)
        out = _Normalise.apply(*inner, 1e-6, centre)
        out.backward(grad)
        return out.detach(), *(t.grad for t in inner)

    same(*by_both(run))


@pytest.mark.parametrize("masked", [True, False])
def test_attention(by_both, masked):
    query, grad = torch.randn(2, 2, 6, 40, 8)
    key, value = torch.randn(2, 2, 2, 40, 8)
    mask = torch.full((2, 1, 40, 40), -3e38).triu(1) if masked else None
    scores = Encoding(torch.tensor(2e-4), torch.tensor(32000), U16)
    probabilities = Encoding(torch.tensor(1 / 65535), torch.tensor(0), U16)

    def run():
        inner = leaves(query, key, value)
        out = attend(*inner, mask, 8**-0.5, scores, probabilities)
        out.backward(grad)
        return out.detach(), *(t.grad for t in inner)

    same(*by_both(run), exact=0)


@pytest.mark.parametrize("shape", [(3, 7), (70, 300), (5, 5000)])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_divergence(by_both, shape, size):
    student, teacher = torch.randn(2, *shape) * size
    student = teacher + student / size

    def run():
        (inner,) = leaves(student)
        loss = kl_top_k(inner, teacher, shape[1])
        loss.backward()
        with torch.no_grad():
            assert kl_top_k(student, teacher, shape[1]) == loss
        return loss.detach(), inner.grad

    same(*by_both(run), exact=0)


def test_the_comparison_sees_a_step():
    x = torch.randn(100)
    with pytest.raises(AssertionError):
        same([x], [x + 1e-6])
    with pytest.raises(AssertionError):
        same([x, x], [x, x * 1.001])


def test_the_number_of_threads_changes_no_bit(by_both):
    weight, rows, grad = torch.randn(300, 200), torch.randn(300) * 0.1, torch.randn(300, 200)

    def run():
        (log,) = leaves(rows)
        fake_quantize_weight(weight, log, None, None, S4, symmetric=True, per_channel=True).backward(grad)
        inner, scale, zero = leaves(weight, torch.tensor(0.01), torch.tensor(90.0))
        fake_quantize_learned(inner, scale, zero, U8).backward(grad)
        return log.grad, inner.grad, scale.grad, zero.grad

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    same(one, two, exact=4)


def test_a_run_learns_the_same(by_both):
    def run():
        model = quantize(build_model("llama-gqa"), None, config("w4a8", recipe="mobilequant"))
        return [value for _, value in model.config.quantization_config.recorded["history"]]

    with_passes, without = by_both(run)
    assert with_passes[0] == pytest.approx(without[0], rel=1e-5)  # nothing was learned yet
    # Adam takes whole steps along gradients that are nothing but rounding, so runs part at once, and stay as good.
    assert with_passes[-1] == pytest.approx(without[-1], rel=0.1) and with_passes[-1] < with_passes[0]


@pytest.mark.parametrize("fault", [no_compiler, read_only_cache])
def test_without_a_compiler_torch_computes_and_one_message_says_so(fault, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    tuning.logger.addHandler(handler)
    tuning.passes.cache_clear()
    try:
        fault(monkeypatch, tmp_path)
        assert tuning.passes() is None and tuning.passes() is None
        x = fake_quantize_open(torch.ones(3), torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), U8)
        assert torch.equal(x, torch.ones(3))
    finally:
        tuning.logger.removeHandler(handler)
        tuning.passes.cache_clear()
    assert len(messages) == 1 and "tuning takes longer" in messages[0]


def test_a_variable_leaves_it_to_torch(monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "0")
    tuning.passes.cache_clear()
    try:
        assert tuning.passes() is None
    finally:
        tuning.passes.cache_clear()


def test_a_file_that_cannot_be_loaded_names_itself(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(build.BuildError, match="delete .*broken.so to compile again"):
        tuning.Passes(tmp_path / "broken.so")
