"""What a target computes: rules, the check of a plan before anything is tuned, widening, names of chips."""

import dataclasses

import pytest
import torch

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.exporters.targets import TARGETS, Rule, check_graph, check_plan, findings, soc_of, widen_graph
from optimum_mobilequant.exporters.targets.check import facts_of
from optimum_mobilequant.graph import KINDS
from optimum_mobilequant.numerics import dequantize
from optimum_mobilequant.plan import PRESETS
from optimum_mobilequant.run import prepare
from tests import tiny
from tests.exporters import fixed
from tests.graph import floating

HTP = TARGETS["qnn_htp"]
_ASYMMETRIC = ("asymmetric weights for each channel", 'use preset "w4a8" or "w8a8"')
REFUSED = {
    "w4a8-asym": _ASYMMETRIC,
    "w8a8-paper": _ASYMMETRIC,
    "w4a8-g128": ("weights for each block", 'preset "w4a8" or "w4a16"'),
}
LAYER = "model.layers.0"


def planned(preset="w8a8", variant="llama-gqa", overrides=None):
    model = tiny.build(variant)
    return check_plan(model, tiny.plan_of(model, preset, overrides), HTP)


def facts(preset, name, variant="llama-gqa", overrides=None, **options):
    graph = fixed.graph(preset, variant, overrides, num_hidden_layers=1, **options)
    return facts_of(graph, next(op for op in graph.ops if op.name == name))


def test_rules_speak_of_operations_and_facts_that_exist():
    asked = {(rule.kind, key) for rule in HTP.rules for key in rule.when}
    known = set()
    for variant in tiny.VARIANTS:
        graph = fixed.graph("w8a8", variant, num_hidden_layers=1)
        known |= {(op.kind, key) for op in graph.ops for key in facts_of(graph, op)}
    assert {kind for kind, _ in asked} <= {*KINDS, "*"}
    assert {(kind, key) for kind, key in asked if kind != "*"} <= known
    for rule in HTP.rules:
        assert rule.verdict in ("accepted", "widen", "unverified", "refused")
        assert (rule.verdict == "widen") == bool(rule.widen) and set(rule.widen) <= {"input", "output"}
        assert rule.verdict != "refused" or (rule.why and rule.fix), rule
        assert rule.verdict == "accepted" or rule.why


def test_facts_of_operations():
    assert facts("w4a8", f"{LAYER}.self_attn.q_proj") == {
        "input": 8,
        "output": 16,
        "weight": 4,
        "bias": 0,
        "granularity": "channel",
        "symmetric": True,
        "floats": False,
    }
    assert facts("w4a8-asym", f"{LAYER}.self_attn.q_proj")["symmetric"] is False
    assert facts("w8a8-paper", f"{LAYER}.self_attn.q_proj")["granularity"] == "tensor"
    assert facts("w8a8", f"{LAYER}.self_attn.q_proj", "qwen2")["bias"] == 32
    assert facts("w8a16", f"{LAYER}.self_attn.scores") == {"input": 16, "second": 8, "output": 16, "floats": False}
    assert facts("w8a8", f"{LAYER}.input_layernorm")["norm"] == "rms"
    assert facts("w8a8", f"{LAYER}.input_layernorm", "stablelm")["norm"] == "layer"
    assert facts("w8a8", f"{LAYER}.self_attn.q_norm", "qwen3")["rank"] == 4
    assert facts("w8a8", f"{LAYER}.mlp.act_fn")["function"] == "silu"
    rotation = {"input": 16, "second": 16, "output": 8, "floats": False}
    assert facts("w8a8", f"{LAYER}.self_attn.key_rotated") == rotation | {"shift": 0}
    assert facts("w8a8", f"{LAYER}.self_attn.key_rotated", key_shift=True) == rotation | {"shift": 16}
    assert facts("w8a8", f"{LAYER}.self_attn.query_rotated", key_shift=True)["shift"] == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_presets_on_htp(variant, preset):
    if preset not in REFUSED:
        assert planned(preset, variant).refused == ()
        return
    with pytest.raises(ValueError, match="qnn_htp cannot run") as error:
        planned(preset, variant)
    text = str(error.value)
    what, fix = REFUSED[preset]
    assert what in text and fix in text
    assert f"{LAYER}." in text
    assert len(text) < 1000


@pytest.mark.parametrize("preset", ["w4a8", "w8a8-full"])
@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_shifted_keys_on_htp(variant, preset):
    model = tiny.build(variant)
    plan = dataclasses.replace(tiny.plan_of(model, preset), key_shift=True)
    found = check_plan(model, plan, HTP)
    plain = planned(preset, variant)
    assert found.refused == () and [op.name for op, _ in found.widen] == [op.name for op, _ in plain.widen]


def test_a_refused_shift_is_called_a_shift():
    graph = fixed.graph(num_hidden_layers=1, key_shift=True)
    nothing = dataclasses.replace(HTP, rules=tuple(rule for rule in HTP.rules if rule.kind != "rope"))
    with pytest.raises(ValueError, match="cannot run 2 operations") as error:
        check_graph(graph, nothing)
    operands = "16-bit input, 16-bit second operand"
    assert f"key_rotated (rope with {operands}, 16-bit shift, 8-bit output)" in str(error.value)
    assert f"query_rotated (rope with {operands}, 8-bit output)" in str(error.value)


def test_the_named_fix_fixes():
    symmetric = {"weight_symmetric": True}
    assert planned("w4a8-asym", overrides={"*_proj": symmetric}).refused == ()
    assert planned("w8a8-paper", overrides={"*_proj": symmetric}).refused == ()
    wide = {"*.key_rotated": {"bits": 16}}
    with pytest.raises(ValueError, match=r"self_attn.scores and 1 more .*16-bit second operand.*key_rotated.*bits.*8"):
        planned("w8a8", overrides=wide)
    fix = {"*.key_rotated": {"bits": 8}, "*.v_proj.output": {"bits": 8}}
    assert planned("w8a8", overrides=wide | fix).refused == ()


def test_what_no_rule_knows_is_refused():
    graph = fixed.graph(num_hidden_layers=1)
    nothing = dataclasses.replace(HTP, rules=tuple(rule for rule in HTP.rules if rule.kind != "softmax"))
    with pytest.raises(ValueError, match="self_attn.probabilities .*not among the combinations that are known to run"):
        check_graph(graph, nothing)
    first = dataclasses.replace(HTP, rules=(Rule("softmax", {}, "refused", "no", "do"), *HTP.rules))
    assert [op.kind for op, _ in findings(graph, first).refused] == ["softmax"]  # the first rule that fits decides


def test_float_activations_are_a_warning_and_blocks_are_refused(monkeypatch):
    graph = fixed.graph("w8a8", num_hidden_layers=1)
    keep = {name for name in graph.constants if name.endswith("_proj.weight")}
    values = {n: v if n in keep else dataclasses.replace(v, encoding=None) for n, v in graph.values.items()}
    floats, said = dataclasses.replace(graph, values=values), []
    monkeypatch.setattr("optimum_mobilequant.exporters.targets.check.logger.warning", said.append)
    assert {op.kind for op, _ in check_graph(floats, HTP).unverified} == {"linear"}
    assert len(said) == 1 and "not verified" in said[0]
    name = f"{LAYER}.mlp.up_proj.weight"
    old = values[name].encoding
    blocks = dataclasses.replace(
        old, scale=old.scale[:, None].repeat(1, 2), zero_point=old.zero_point[:, None].repeat(1, 2), block_size=16
    )
    values[name] = dataclasses.replace(values[name], encoding=blocks)
    with pytest.raises(ValueError, match='one scale for each output channel.*"w4a8" or "w4a16"'):
        check_graph(floats, HTP)


# The hook in the config.


def test_the_config_names_the_target_and_nothing_else_changes():
    named = MobileQuantConfig("w8a8", target="qnn_htp")
    assert MobileQuantConfig.from_dict(named.to_dict()) == named
    assert named.to_diff_dict()["target"] == "qnn_htp"
    assert "target" not in MobileQuantConfig("w8a8").to_diff_dict()
    with pytest.raises(ValueError, match='target "qnn_hpt" is unknown; did you mean "qnn_htp"'):
        MobileQuantConfig("w8a8", target="qnn_hpt")
    with pytest.raises(ValueError, match="target must be a string"):
        MobileQuantConfig("w8a8", target=5)
    logits = [
        tiny.logits_of(quantize(tiny.build("llama-gqa"), None, tiny.config(target=t))) for t in (None, "qnn_htp")
    ]
    assert torch.equal(*logits)


def test_an_illegal_plan_fails_before_the_text_is_read(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the calibration text was read")

    monkeypatch.setattr(prepare, "peek", fail)
    monkeypatch.setattr(prepare, "run_data", fail)
    for preset, overrides in (("w4a8-asym", None), ("w8a8", {"*.v_proj.output": {"bits": 16}})):
        with pytest.raises(ValueError, match="qnn_htp cannot run"):
            quantize(tiny.build("llama-gqa"), None, tiny.config(preset, overrides=overrides, target="qnn_htp"))
        with pytest.raises(AssertionError, match="was read"):  # without a target there is no check
            quantize(tiny.build("llama-gqa"), None, tiny.config(preset, overrides=overrides))


def test_a_run_resumes_whatever_its_target(tmp_path):
    for target in (None, "qnn_htp"):
        quantize(tiny.build("llama-gqa"), None, tiny.config(target=target), run_dir=str(tmp_path / "run"))


# Widening.


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w8a8-full"])
@pytest.mark.parametrize("variant", ["llama-gqa", "qwen2", "qwen3", "stablelm"])
def test_widened_graphs_need_no_more_widening_and_mean_the_same(variant, preset):
    graph = fixed.graph(preset, variant, num_hidden_layers=1)
    wide, widened = widen_graph(graph, HTP)
    assert findings(graph, HTP).widen
    assert findings(wide, HTP).widen == ()
    assert wide.ops is graph.ops
    assert (wide.inputs, wide.outputs) == (graph.inputs, graph.outputs)
    changed = {n for n, v in wide.values.items() if v is not graph.values[n]}
    assert set(widened) <= changed
    for name in changed:
        before, after = graph.values[name].encoding, wide.values[name].encoding
        if name in graph.constants:  # a bias or a table: the same values
            old, new = graph.constants[name](), wide.constants[name]()
            values = [dequantize(old, *before.broadcast(old.ndim)), dequantize(new, *after.broadcast(new.ndim))]
            torch.testing.assert_close(*values, rtol=1e-6, atol=0)
        else:  # the same range, and every old value
            codes = torch.arange(256)
            old, new = (dequantize(c, e.scale, e.zero_point) for c, e in ((codes, before), (codes * 257, after)))
            torch.testing.assert_close(old, new, rtol=1e-6, atol=0)
            assert (before.grid.bits, after.grid.bits) == (8, 16)
    for op in wide.ops:
        if op.kind == "linear" and len(op.inputs) == 3:  # a bias stays on the accumulator's steps
            before, after = (g.values[op.inputs[0]].encoding.scale for g in (graph, wide))
            bias_before, bias_after = (g.values[op.inputs[2]].encoding.scale for g in (graph, wide))
            torch.testing.assert_close(bias_after / bias_before, (after / before).expand_as(bias_before))


def test_widening_leaves_the_cache_alone_and_the_given_graph_too():
    graph = fixed.graph("w8a8", num_hidden_layers=1)
    before = dict(graph.values)
    wide, widened = widen_graph(graph, HTP)
    assert graph.values == before
    layer = [f"{LAYER}.{name}" for name in ("input_layernorm.output", "self_attn.context", "mlp.down_proj.input")]
    assert widened == layer
    for name in (*graph.inputs, *graph.outputs):
        assert wide.values[name] is graph.values[name]
    assert wide.values[f"{LAYER}.self_attn.context.merged"].encoding.grid.bits == 16  # moved data follows
    assert wide.values[f"{LAYER}.mlp.gate_proj.output"].encoding.grid.bits == 8


def test_a_bias_that_does_not_fit_in_32_bits_is_refused():
    graph = fixed.graph("w8a8", "qwen2", num_hidden_layers=1)
    name = f"{LAYER}.self_attn.q_proj.bias"
    graph.constants[name] = lambda: torch.full((32,), 2**24, dtype=torch.int32)
    wide, _ = widen_graph(graph, HTP)
    with pytest.raises(ValueError, match=f"{name} does not fit in 32 bits .* use preset w8a16 or w4a16"):
        wide.constants[name]()


def test_the_widened_graph_computes_what_the_graph_computes():
    """In floats exactly; widening only removes rounding."""
    graph = fixed.graph("w8a8", "qwen2", num_hidden_layers=1)
    wide, _ = widen_graph(graph, HTP)
    for name in graph.constants:
        torch.testing.assert_close(floating.constant(wide, name), floating.constant(graph, name), rtol=1e-6, atol=0)


# Systems on chip.


def test_names_of_chips():
    soc = soc_of("SM8650")
    assert (soc.name, soc.soc_model, soc.htp_arch, soc.dsp_arch) == ("sm8650", 57, 75, "v75")
    assert soc_of("sm8750").soc_model == 69
    assert len({soc.soc_model for soc in HTP.socs.values()}) == len(HTP.socs)
    with pytest.raises(ValueError, match='soc "sm8560" is unknown; did you mean'):
        soc_of("sm8560")


def test_qualcomms_library_knows_the_names():
    qnn = pytest.importorskip("onnxruntime_qnn", reason="Qualcomm's library is not installed")
    from pathlib import Path

    held = Path(qnn.get_qnn_htp_path()).read_bytes()
    for name in HTP.socs:
        assert name.upper().encode() in held, name
    assert b"SM8651" not in held
