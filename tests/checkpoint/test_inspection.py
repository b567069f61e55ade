import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import inspect_checkpoint, quantize
from optimum_mobilequant.checkpoint import inspection
from optimum_mobilequant.nn import quantizers_of
from optimum_mobilequant.nn.shift import shift_scale
from tests import tiny

CASES = {
    "llama-gqa": "w4a8",
    "llama-tied": "w8a8",
    "llama-bias": "w4a8-asym",
    "stablelm": "w8a8-paper",
    "gemma": "w4a8",
    "qwen2": "w8a8",
}
SHIFTED = "qwen2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint folder by family, made once."""
    folders = {}

    def get(variant):
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp(variant)
            config = tiny.config(CASES[variant], key_shift=variant == SHIFTED)
            quantize(tiny.build(variant), None, config).save_pretrained(folders[variant])
        return folders[variant]

    return get


@pytest.fixture
def rewrite(saved, tmp_path):
    """Copies the llama checkpoint, changes its tensors, and returns the copy's folder."""

    def copy(change):
        folder = tmp_path / "copy"
        shutil.copytree(saved("llama-gqa"), folder)
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        change(tensors)
        save_file(tensors, path, metadata=header)
        return folder

    return copy


@pytest.mark.parametrize("variant", CASES)
def test_every_tensor_of_the_plan_is_listed_with_the_model_s_own_values(saved, variant):
    found = inspect_checkpoint(saved(variant))
    model = AutoModelForCausalLM.from_pretrained(saved(variant))
    rows = {row["tensor"]: row for row in found.rows}
    assert len(rows) == len(found.rows)

    activations = {name: row for name, row in rows.items() if row["kind"] == "activation"}
    quantizers = {quantizer.spec.name: quantizer for quantizer in quantizers_of(model)}
    assert activations.keys() == quantizers.keys()
    for name, quantizer in quantizers.items():
        row, grid = activations[name], quantizer.spec.grid
        assert (row["scale"], row["zero_point"]) == (quantizer.scale.item(), quantizer.zero_point.item())
        assert row["bits"] == quantizer.spec.bits
        assert row["min"] == pytest.approx((grid.qmin - row["zero_point"]) * row["scale"], rel=1e-6)
        assert row["max"] == pytest.approx((grid.qmax - row["zero_point"]) * row["scale"], rel=1e-6)

    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in found.moves) == tied
    for name, row in rows.items():
        owner = name.rpartition(".")[0]
        if row["kind"] == "weight":
            weight = model.get_submodule(owner).weight
            ends = [weight.scale.min().item(), weight.scale.max().item()]
            assert row["scale"] == (ends[0] if ends[0] == ends[1] else ends)
            values = weight(torch.float32)
            slack = 1e-6 * max(abs(row["min"]), abs(row["max"]))
            assert row["min"] - slack <= values.min() <= values.max() <= row["max"] + slack
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert {name for name, row in rows.items() if row["kind"] == "bias"} == biases
    assert all(rows[name]["scale"] for name in biases)

    stored = sum(row["bytes"] for row in found.rows)
    assert stored == sum(t.nbytes for name, t in model.state_dict().items() if not name.endswith("dtype_anchor"))
    assert found.totals["bytes"] == stored + 4  # the anchor
    assert found.totals["file_bytes"] == sum(f.stat().st_size for f in saved(variant).glob("*.safetensors"))


def test_shifts_of_keys_are_listed(saved):
    found, model = inspect_checkpoint(saved(SHIFTED)), AutoModelForCausalLM.from_pretrained(saved(SHIFTED))
    rows = [row for row in found.rows if row["kind"] == "shift"]
    assert [row["tensor"] for row in rows] == [f"model.layers.{i}.self_attn.key_shift" for i in range(2)]
    for i, row in enumerate(rows):
        attention = model.model.layers[i].self_attn
        assert (row["scale"], row["zero_point"]) == (shift_scale(attention.k_proj.output).item(), 0)
        assert (row["bits"], row["bytes"]) == (16, attention.key_shift.codes.nbytes)
        values = attention.key_shift.value(attention)
        assert row["min"] <= values.min() < -10 * row["scale"] and 10 * row["scale"] < values.max() <= row["max"]
    assert found.totals["shift_bytes"] == sum(row["bytes"] for row in rows)
    assert "shift_bytes" not in inspect_checkpoint(saved("llama-gqa")).totals


def test_data_movement_ends_at_a_listed_tensor(saved):
    found = inspect_checkpoint(saved("llama-gqa"))
    names = {row["tensor"] for row in found.rows}
    for source in found.moves.values():
        assert source in names or source.startswith("int32 accumulator")
    assert not names & found.moves.keys()


def test_the_dict_is_json_and_the_table_has_every_name(saved):
    found = inspect_checkpoint(saved("stablelm"))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    table = found.table()
    assert all(row["tensor"] in table for row in found.rows)
    assert all(name in table for name in found.moves)
    assert "w8a8-paper" in table
    assert "nan" not in table


def test_bits_per_parameter(saved):
    totals = inspect_checkpoint(saved("llama-gqa")).totals
    expected = sum(p.numel() for p in tiny.build("llama-gqa").parameters())
    assert totals["parameters"] == expected
    assert 4 < totals["bits_per_parameter"] < 12  # tiny rows: the scales weigh as much as the codes


def test_shards_are_read_together(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved("llama-gqa"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert inspect_checkpoint(tmp_path / "shards").rows == inspect_checkpoint(saved("llama-gqa")).rows
    next((tmp_path / "shards").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        inspect_checkpoint(tmp_path / "shards")


NAME = "model.layers.1.mlp.up_proj.output"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_an_activation_without_encoding_is_named(rewrite, value):
    folder = rewrite(lambda tensors: tensors[f"{NAME}.scale"].fill_(value))
    with pytest.raises(ValueError, match=f"activation {NAME} has no encoding"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (f"{NAME}.zero_point", 256, f"{NAME} has a zero point outside its 8-bit grid"),
        ("model.layers.0.self_attn.probabilities.scale", 0.5, "probabilities has the fixed encoding"),
        ("model.layers.0.self_attn.q_proj.weight._scale", math.nan, "q_proj.weight has no encoding"),
        ("model.layers.0.self_attn.q_proj.weight._shift", 16, "q_proj.weight has a zero point outside its 4-bit grid"),
    ],
)
def test_an_impossible_encoding_is_named(rewrite, key, value, words):
    folder = rewrite(lambda tensors: tensors[key].fill_(value))
    with pytest.raises(ValueError, match=words):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("key", [f"{NAME}.scale", "model.norm.weight._codes"])
def test_a_missing_tensor_is_named(rewrite, key):
    folder = rewrite(lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"lacks 1 tensors, among them {key}"):
        inspect_checkpoint(folder)


def test_a_tensor_outside_the_plan_is_named(rewrite):
    folder = rewrite(lambda tensors: tensors.update({"model.layers.0.extra.scale": torch.ones(())}))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra\.scale"):
        inspect_checkpoint(folder)


def test_a_stored_tensor_the_plan_forgot_is_named(saved, monkeypatch):
    """The model expects the final norm and the plan does not know it: the headers alone would pass."""
    complete, swap = inspection.plan_of, inspection.skeleton

    def forgetful(model, config):
        plan = complete(model, config)
        weights = {name: spec for name, spec in plan.weights.items() if name != plan.family.final_norm}
        return replace(plan, weights=weights)

    monkeypatch.setattr(inspection, "plan_of", forgetful)
    monkeypatch.setattr(inspection, "skeleton", lambda model, plan: swap(model, tiny.plan_of(model, "w4a8")))
    with pytest.raises(ValueError, match=r"2 stored tensors have no place in the plan, e\.g\. model\.norm\.weight\._"):
        inspect_checkpoint(saved("llama-gqa"))


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_file_is_named(rewrite, keep):
    folder = rewrite(lambda tensors: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        inspect_checkpoint(folder)


def test_an_edited_scheme_is_refused(rewrite):
    folder = rewrite(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["scheme"]["activations"]["up"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization scheme in config.json"):
        inspect_checkpoint(folder)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path / "nothing")
    tiny.build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model, not a mobilequant checkpoint"):
        inspect_checkpoint(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="quantized by 'awq'"):
        inspect_checkpoint(tmp_path / "float")


def test_only_encodings_are_read(saved, monkeypatch):
    read, tensor = [], inspection._Reader.tensor
    monkeypatch.setattr(inspection._Reader, "tensor", lambda self, key: (read.append(key), tensor(self, key))[1])
    inspect_checkpoint(saved("llama-gqa"))
    assert {key.rpartition(".")[2] for key in read} == {"_scale", "_shift", "scale", "zero_point"}
