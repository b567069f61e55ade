"""A tiny graph whose scales are fixed fractions, the same on every machine, and the encodings it has on disk.

``python -m tests.exporters.fixed`` writes the files in ``golden/`` again, after a change meant to change them.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import torch

from optimum_mobilequant.checkpoint.pack import key_path
from optimum_mobilequant.exporters.encodings import tensor_encodings, write_encodings
from optimum_mobilequant.exporters.onnx import FLOAT, Emitted, Layout, WeightStore, emit
from optimum_mobilequant.exporters.options import ENCODINGS_VERSIONS
from optimum_mobilequant.exporters.targets.planned import PlannedTensors
from optimum_mobilequant.graph import Encoding, Graph, build_graph
from optimum_mobilequant.graph.source import Constant
from optimum_mobilequant.numerics.integer_elementwise import shift_step
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQUENCE, CONTEXT = 2, 4


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


class FixedTensors(PlannedTensors):
    """Scales, zero points and codes from the tensors' names."""

    def activation(self, name: str) -> Encoding:
        spec = self.plan.activations[name]
        if spec.fixed is not None:
            scale, zero_point = spec.fixed
        else:
            scale = (8 + _number(name) % 8) / 8 * 2.0 ** -(spec.bits - 2)
            zero_point = spec.grid.qmax // 2 + _number(name) % 5
        return Encoding(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), spec.grid)

    def weight(self, path: str) -> Constant:
        return _filled(path, super().weight(path))

    def bias(self, path: str, owner: str) -> Constant | None:
        found = super().bias(path, owner)
        return None if found is None else _filled(f"{path}.bias", found)

    def key_shift(self, attention: str) -> Constant | None:
        found = super().key_shift(attention)
        if found is None:
            return None
        of_keys = self.activation(f"{attention}.{key_path(self.plan)}.output")
        encoding = replace(found.encoding, scale=of_keys.scale * shift_step(of_keys.grid.bits))
        return Constant(found.shape, encoding, lambda: _codes(attention, found.shape, encoding))

    def table(self) -> Constant:
        found = super().table()
        return Constant(found.shape, found.encoding, lambda: _codes("table", found.shape, found.encoding))


def _filled(name: str, constant: Constant) -> Constant:
    old = constant.encoding
    scale = (8 + (torch.arange(old.scale.numel()) + _number(name)) % 8) / 8 * 2.0**-old.grid.bits
    encoding = Encoding(scale.reshape(old.scale.shape).float(), old.zero_point, old.grid)
    return Constant(constant.shape, encoding, lambda: _codes(name, constant.shape, encoding))


def _codes(name: str, shape: tuple[int, ...], encoding: Encoding) -> torch.Tensor:
    grid, count = encoding.grid, int(torch.tensor(shape).prod())
    spread = min(grid.qmax, 1000)
    codes = (torch.arange(count) * 37 + _number(name)) % (2 * spread) - spread + (0 if grid.signed else grid.qmax // 2)
    return codes.clamp(grid.qmin, grid.qmax).reshape(shape).to(grid.dtype)


def graph(
    preset: str = "w8a8",
    variant: str = "llama-gqa",
    overrides: dict | None = None,
    *,
    key_shift: bool = False,
    **changes: object,
) -> Graph:
    model = tiny.build(variant, **changes)
    plan = replace(tiny.plan_of(model, preset, overrides), key_shift=key_shift)
    return build_graph(model, plan, FixedTensors(model, plan))


def emitted(found: Graph, folder: Path) -> Emitted:
    """The float form, weights in ``folder``."""
    with WeightStore(folder / "model.data") as store:
        return emit(found, Layout.fixed(SEQUENCE, CONTEXT), FLOAT, store, name="tiny")


def small(folder: Path) -> Emitted:
    """One layer of W4A8, as the golden files describe it."""
    return emitted(graph("w4a8", "qwen2", **SMALL), folder)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = tensor_encodings(small(Path(scratch)).records)
    for version in ENCODINGS_VERSIONS:
        write_encodings(found, GOLDEN / f"{version}.encodings", version)
