"""The GPU backend without a GPU: availability, the choice, packed weights, configurations, workspace, cache."""

import json
import logging
import types

import pytest
import torch

from optimum_mobilequant.kernels import LinearSpec, Output, choose, gpu, prepare, registry, weight_only
from optimum_mobilequant.kernels.gpu import autotune, configs, device, layout
from optimum_mobilequant.kernels.gpu import workspace as workspaces
from optimum_mobilequant.kernels.gpu.configs import Config, cut
from optimum_mobilequant.kernels.spec import Groups, Weights
from tests import tiny
from tests.kernels.layers import OUTPUTS, make

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton and GPUs of the given compute capabilities."""
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    monkeypatch.delenv(device.INTERPRETER, raising=False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "triton_version", lambda: device.OLDEST_TRITON)
    registry.unavailable.cache_clear()

    def has(*capabilities, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {capabilities[index]}")

    yield has
    registry.unavailable.cache_clear()


def spec(**changes):
    values = {
        "weight_bits": 4, "activation_bits": 8, "symmetric": True, "in_features": 64, "out_features": 64,
        "device": "cuda", "output": OUTPUTS["codes"],
    }  # fmt: skip
    return LinearSpec(**(values | changes))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_ampere_and_newer_are_used(machine, capability):
    machine(capability)
    assert gpu.available() is None
    assert choose(spec()).backend.name == "triton"


def test_a_triton_that_came_with_an_old_torch_is_named(machine, monkeypatch):
    assert f'"triton>={device.OLDEST_TRITON} ;' in (tiny.ROOT / "pyproject.toml").read_text()
    machine((9, 0))
    monkeypatch.setattr(device, "triton_version", lambda: "3.2.0")
    assert gpu.available().startswith("Triton 3.2.0 lacks what the kernels use, 3.6 has it")
    assert choose(spec()).backend.name == "simulate"
    for fits in ("3.6.0", "3.10.1+cu130", None):
        monkeypatch.setattr(device, "triton_version", lambda fits=fits: fits)
        assert gpu.available() is None


def test_an_older_gpu_has_one_reason_and_the_next_backend(machine):
    machine((7, 5))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    registry.logger.addHandler(handler)
    try:
        choices = [choose(spec()) for _ in range(3)]
    finally:
        registry.logger.removeHandler(handler)
    assert {choice.backend.name for choice in choices} == {"simulate"}
    assert "compute capability 7.5, and the kernels need 8.0" in choices[0].reasons["triton"]
    assert len(messages) == 1 and choices[0].reasons["triton"] in messages[0]
    with pytest.raises(ValueError, match="'triton' cannot run linear_w4a8: GPU .* has compute capability 7.5"):
        choose(spec(), backend="triton")


def test_one_older_gpu_among_newer_ones_is_named(machine):
    machine((9, 0), (7, 0))
    assert "7.0" in gpu.available() and "CUDA_VISIBLE_DEVICES" in gpu.available()


def test_other_reasons(machine, monkeypatch):
    machine()
    assert gpu.available() == "torch sees no CUDA GPU"
    machine((9, 4), hip="6.2")
    assert "AMD" in gpu.available()
    machine((9, 0))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert gpu.available() == "Triton is not installed; pip install 'optimum-mobilequant[gpu]'"


def test_what_it_cannot_run():
    assert gpu.supports(spec()) is None
    assert gpu.supports(spec(device="cpu")) == "it computes on NVIDIA GPUs"
    assert "65793" in gpu.supports(spec(in_features=70000))
    assert "leave int32" in gpu.supports(spec(activation_bits=16, output=Output.totals()))


def test_only_grouped_layers_ask_for_groups():
    assert registry.why_not("reference", spec(device="cpu", group=128)) == "it has no multipliers of groups"
    layer = make(3, 20, 200, bits=4)
    multiplier = torch.randint(1, 17, (20, 2), dtype=torch.uint8)
    arguments = {
        "weight_bits": 4, "input_scale": 0.1, "input_zero_point": 128, "output": OUTPUTS["codes"], "group": 128,
    }  # fmt: skip
    run = prepare(layer.codes, layer.scale, multiplier=multiplier, backend="reference", **arguments)
    assert run.spec.weight_bits == 8 and run.spec.group == 0
    products = (layer.codes * multiplier.repeat_interleave(128, 1)[:, :200].to(torch.int8)).to(torch.int8)
    plain = prepare(products, layer.scale, backend="reference", **(arguments | {"weight_bits": 8, "group": 0}))
    assert torch.equal(run(layer.x), plain(layer.x))
    for wrong, message in (
        ({"multiplier": multiplier + 16}, "lie in 1 to 16"),
        ({"multiplier": multiplier[:, :1]}, r"uint8 \[20, 2\]"),
        ({"multiplier": multiplier, "group": 100}, "group is 100"),
        ({"multiplier": multiplier, "zero_point": torch.ones(20, dtype=torch.int32)}, "symmetric 4-bit"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(layer.codes, layer.scale, **(arguments | wrong))


@pytest.mark.parametrize("shape", [(1, 1), (20, 128), (130, 300)])
@pytest.mark.parametrize("group", [0, *layout.GROUPS])
def test_packed_nibbles_come_back(shape, group):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = layout.pack_nibbles(codes, group=group)
    assert packed.shape[1] % layout.ROWS == 0 and 2 * packed.shape[2] == layout.block_of(group)
    assert torch.equal(layout.unpack_nibbles(packed, *shape), codes)
    unsigned = layout.pack_unsigned_nibbles(codes, group=group)
    assert torch.equal(layout.unpack_nibbles(unsigned, *shape, unsigned=True), codes)
    assert not torch.equal(layout.unpack_nibbles(packed ^ 1, *shape), codes)


@pytest.mark.parametrize("shape", [(1, 1), (20, 128), (130, 300)])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), *((4, group) for group in (0, *layout.GROUPS))])
def test_the_codes_come_back_from_a_packed_layer(shape, bits, group):
    rows, columns = shape
    layer = make(1, rows, columns, bits=bits, symmetric=bool(group))
    codes, groups = layer.codes, None
    if group:
        factors = torch.randint(1, 17, (rows, -(-columns // group)), dtype=torch.uint8)
        groups = Groups(layer.codes, factors)
        codes = layer.codes * factors.repeat_interleave(group, 1)[:, :columns].to(torch.int8)
    weights = Weights(codes, layer.scale, layer.zero_point, layer.bias, 0.02, 128, groups)
    described = spec(weight_bits=bits, in_features=columns, out_features=rows, group=group)
    packed = gpu.pack(described, weights)
    found = gpu.unpack(described, packed)
    assert found.dtype == torch.int8 and found.is_contiguous() and torch.equal(found, codes)
    some = torch.tensor([[rows - 1], [0]])
    assert torch.equal(gpu.unpack_rows(described, packed, some), codes[some])
    packed.weight[0, 0, 0] ^= 1
    assert not torch.equal(gpu.unpack(described, packed), codes)


def test_a_byte_holds_a_column_and_the_one_half_a_block_on():
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 3], codes[0, 67] = -7, 5
    packed = layout.pack_nibbles(codes)
    assert int(packed[0, 0, 3]) & 15 == -7 & 15 and int(packed[0, 0, 3]) >> 4 == 5
    assert packed.count_nonzero() == 1


def test_packed_4_bit_weights_take_half_a_byte():
    assert layout.pack_nibbles(torch.zeros(256, 512, dtype=torch.int8)).numel() == 256 * 512 // 2
    assert layout.pack_bytes(torch.zeros(256, 512, dtype=torch.int8)).numel() == 256 * 512


def test_every_architecture_has_rows_for_every_kind_and_any_number_of_rows():
    for arch, memory in configs.SHARED_MEMORY.items():
        assert set(configs.TABLE[arch]) == set(configs.KINDS) and memory > 48 * 1024
        for kind in configs.KINDS:
            sizes = [row.most_rows for row in configs.TABLE[arch][kind]]
            assert sizes[-1] is None and sizes[:-1] == sorted(sizes[:-1])
            for rows in (1, 16, 17, 64, 65, 100000):
                config = configs.bucket(arch, kind, rows).config
                assert not config.parts or workspaces.fits(1, config.parts, config.block_n, config.block_m)
                assert layout.ROWS % config.block_n == 0  # a tile never reads past the padded rows


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm80"), ((8, 6), "sm89"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 0), "sm80"), ((12, 0), "sm89")],
)
def test_the_architecture_of_a_gpu(capability, arch):
    assert configs.architecture(capability) == arch


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("tiles", [1, 32, 64, 500])
@pytest.mark.parametrize("blocks", [1, 7, 32, 86])
def test_parts_cover_the_columns_once(tiles, blocks, processors):
    pieces = cut(Config(32, 16, 2, 4, 8), tiles, blocks, processors)
    assert 1 <= pieces.parts <= 8
    assert (pieces.parts - 1) * pieces.blocks < blocks <= pieces.parts * pieces.blocks
    assert pieces.parts * tiles <= max(tiles, 2 * processors)


def test_a_narrow_layer_is_split_and_a_wide_one_is_not():
    config = configs.bucket("sm90", "w4a8", 1).config
    assert cut(config, 256 // config.block_n, 4096 // 128, 132).parts == 8
    assert cut(config, 32000 // config.block_n, 4096 // 128, 132).parts == 1


def test_a_workspace_is_made_once_and_never_during_capture(monkeypatch):
    monkeypatch.setattr(workspaces, "_PIECES", {})
    assert workspaces.workspace_of(CPU) is workspaces.workspace_of(CPU)
    made, state = [], {"capturing": True, "stream": 7}
    monkeypatch.setattr(workspaces, "_make", lambda found: made.append(found) or object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda found: types.SimpleNamespace(cuda_stream=state["stream"]))
    cuda = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="call the layer once before capturing"):
        workspaces.workspace_of(cuda)
    state["capturing"] = False
    eager = workspaces.workspace_of(cuda)
    assert len(made) == 2  # this stream's and the graphs'
    state["capturing"] = True
    assert workspaces.workspace_of(cuda) is workspaces.workspace_of(cuda) is not eager and len(made) == 2
    state.update(capturing=False, stream=8)
    assert workspaces.workspace_of(cuda) is not eager and len(made) == 3


def test_weight_only_refuses_and_says_why(machine):
    machine()
    codes, scale = torch.zeros(4, 40, dtype=torch.int8), torch.ones(4)
    run = weight_only.prepare_weight_only(codes, scale)
    assert run.backend == "simulate" and run.reason == "it computes on NVIDIA GPUs"
    for changes, message in (
        ({"codes": codes + 9}, "are these 8-bit codes"),
        ({"codes": codes.float()}, "codes are int8"),
        ({"scale": torch.ones(5)}, "scale has 5 elements for 4 channels of 1 groups"),
        ({"group": 32}, "scale has 4 elements for 4 channels of 2 groups"),
        ({"group": 100}, "a group has 32, 64, 128 columns"),
        ({"decode": "e4m0"}, "decode is int4 or e0m4, not 'e4m0'"),
        ({"backend": "triton"}, "'triton' cannot run this layer: it computes on NVIDIA"),
        ({"backend": "cpp"}, "run by triton or simulate, not 'cpp'"),
        ({"bias": torch.ones(5)}, "bias has 5"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_only.prepare_weight_only(**({"codes": codes, "scale": scale} | changes))
    for x in (torch.zeros(2, 40), torch.zeros(2, 41, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"takes bfloat16 or float16 of shape \[..., 40\]"):
            run(x)


@pytest.mark.parametrize("decode", weight_only.DECODES)
@pytest.mark.parametrize("group", [0, 32])
def test_the_dequantized_weight_is_the_same_by_both_decodings(decode, group):
    codes = torch.randint(-8, 8, (20, 70), dtype=torch.int8)
    groups = 3 if group else 1
    scale, zero = torch.rand(20, groups), torch.randint(-8, 8, (20, groups))
    run = weight_only.prepare_weight_only(codes, scale, zero_point=zero, group=group, decode=decode)
    found = weight_only.dequantized(run.weight, run.scale, run.offset, 70, 20, decode)
    step, less = (t.repeat_interleave(group or 70, 1)[:, :70] for t in (scale.double(), zero.double()))
    assert torch.allclose(found.double(), (codes - less) * step, atol=1e-5)
    torch.library.opcheck(
        torch.ops.mobilequant.linear_w4_real.default, run.arguments(torch.randn(2, 70).bfloat16())
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="the file's name holds Triton's version")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    autotune._known.cache_clear()
    yield tmp_path / "optimum_mobilequant"
    autotune._known.cache_clear()


def test_tuning_keeps_the_fastest_for_its_shape_and_rows(cache):
    start = autotune.best("w4a8", 40, 300, 2, CPU)
    assert start == configs.bucket("sm80", "w4a8", 2).config and not cache.exists()
    fastest = Config(32, 16, 2, 3, 2)
    seconds = autotune.tune("w4a8", 40, 300, 2, CPU, lambda config: 1.0 if config == fastest else 2.0)
    assert start in seconds and min(seconds, key=seconds.get) == fastest
    autotune.tune("w8a8", 40, 300, 2, CPU, lambda config: 1.0)
    (file,) = cache.iterdir()
    assert set(json.loads(file.read_text())) == {"w4a8 40x300 rows <= 16", "w8a8 40x300 rows <= 16"}
    autotune._known.cache_clear()  # as another process reads it
    assert autotune.best("w4a8", 40, 300, 16, CPU) == fastest
    assert autotune.best("w4a8", 40, 300, 17, CPU) == configs.bucket("sm80", "w4a8", 17).config
    assert autotune.best("w4a8", 40, 301, 2, CPU) == start


def test_what_cannot_run_is_left_out_and_nothing_is_kept_of_nothing(cache):
    def none(config):
        raise RuntimeError("out of shared memory")

    with pytest.raises(RuntimeError, match="no configuration runs for w4a8 40x300: out of shared memory"):
        autotune.tune("w4a8", 40, 300, 2, CPU, none)
    assert not cache.exists()


def test_a_damaged_cache_is_reported_and_not_used(cache):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    autotune.logger.addHandler(handler)
    try:
        for text in ("{", '{"w4a8 40x300 rows <= 16": {"block": 1}}', "[]"):
            cache.mkdir(exist_ok=True)
            autotune.cache_file("interpreter").write_text(text)
            autotune._known.cache_clear()
            assert autotune.best("w4a8", 40, 300, 2, CPU) == configs.bucket("sm80", "w4a8", 2).config
    finally:
        autotune.logger.removeHandler(handler)
    assert len(messages) == 3 and all("delete the file to tune again" in message for message in messages)


def test_the_cache_is_another_for_another_gpu_and_other_kernels(cache, monkeypatch):
    assert autotune.cache_file("NVIDIA H100") != autotune.cache_file("NVIDIA A100")
    before = autotune.cache_file("NVIDIA H100")
    monkeypatch.setattr(autotune, "_SOURCES", autotune._SOURCES[1:])
    assert autotune.cache_file("NVIDIA H100") != before


def test_candidates_fit_and_start_with_the_table():
    for arch, kinds in configs.TABLE.items():
        for rows in kinds.values():
            for row in rows:
                found = autotune.candidates(row.config, arch)
                assert found[0] == row.config and len(found) == len(set(found)) > 3
                assert all(layout.ROWS % config.block_n == 0 for config in found)
                assert all(bool(config.parts) == bool(row.config.parts) for config in found)
