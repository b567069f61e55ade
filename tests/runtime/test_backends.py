"""The choice of a backend for a model: config, argument, environment; what is said where a faster one cannot run."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, quantize, set_backend
from optimum_mobilequant.cli import main
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.kernels import cpp, registry
from optimum_mobilequant.kernels.cpp.library import ISA_VARIABLE
from optimum_mobilequant.runtime import backend, backend_of, served, survey
from optimum_mobilequant.runtime.survey import survey_table
from tests.kernels.test_build import no_compiler, read_only_cache
from tests.tiny import build, config, logits_of


@pytest.fixture(scope="module")
def model():
    return quantize(build("llama-gqa"), None, config("w4a8"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.fixture
def messages():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for logger in (registry.logger, backend.logger):
        logger.addHandler(handler)
    yield found
    for logger in (registry.logger, backend.logger):
        logger.removeHandler(handler)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A machine on which the kernels were never compiled."""
    asked = (cpp.library, cpp.available, registry.unavailable)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    for function in asked:
        function.cache_clear()
    yield
    for function in asked:
        function.cache_clear()


def backends(model):
    return {layer.backend for layer in served(model)}


@pytest.mark.parametrize("name", ["onednn", "reference", "cpp"])
def test_backends_by_name_agree(model, name, monkeypatch):
    if reason := registry.unavailable(name):
        pytest.skip(reason)
    other = copy.deepcopy(model)
    set_backend(other, name)
    assert backend_of(other) == name and {layer.backend for layer in served(other)} == {name}
    expected, found = logits_of(model), logits_of(other)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert (found != expected).float().mean() < 0.2
    assert other.get_memory_footprint() < 2.5 * model.get_memory_footprint()
    set_backend(other, "simulate")
    assert served(other) == [] and backend_of(other) == "simulate"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_names_are_checked(model):
    with pytest.raises(ValueError, match='backend "cppp" is unknown.*cpp'):
        set_backend(model, "cppp")
    with pytest.raises(ValueError, match='backend "onedn" is unknown'):
        MobileQuantConfig(backend="onedn")
    with pytest.raises(ValueError, match="that optimum_mobilequant quantized or loaded"):
        set_backend(build("llama"), "auto")


def test_the_config_decides_what_a_loaded_model_computes_with(model, folder, tmp_path):
    assert MobileQuantConfig.from_dict(MobileQuantConfig(backend="onednn").to_dict()).backend == "onednn"
    asked = AutoConfig.from_pretrained(folder)
    asked.quantization_config["backend"] = "reference"
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=asked)
    assert backends(loaded) == {"reference"}
    loaded.save_pretrained(tmp_path)
    assert backend_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == "reference"


def test_a_variable_decides_where_nobody_else_does(folder, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "reference")
    assert backends(AutoModelForCausalLM.from_pretrained(folder)) == {"reference"}


@pytest.mark.parametrize("fault", [no_compiler, read_only_cache])
def test_without_compiled_kernels_the_next_backend_and_one_message(
    folder, fault, elsewhere, messages, monkeypatch, tmp_path
):
    fault(monkeypatch, tmp_path)
    loaded, _ = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    assert backends(loaded) <= {"onednn", "simulate"}
    assert len([message for message in messages if message.startswith("kernel backend 'cpp' is not used")]) == 1
    assert torch.isfinite(logits_of(loaded)).all()


def test_a_processor_without_vector_instructions(folder, model, elsewhere, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    if reason := registry.unavailable("cpp"):
        pytest.skip(reason)
    expected = logits_of(model)
    for function in (cpp.library, cpp.available, registry.unavailable):
        function.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, "generic")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), expected) and cpp.library().isa == "generic"


def test_an_instruction_set_that_is_not_there(folder, elsewhere, messages, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv(ISA_VARIABLE, "avx1024")
    assert "cpp" not in backends(AutoModelForCausalLM.from_pretrained(folder))
    about = [message for message in messages if message.startswith("kernel backend 'cpp' is not used")]
    assert len(about) == 1 and "MOBILEQUANT_ISA=avx1024 is not one of" in about[0]


def test_a_named_backend_that_cannot_is_replaced_and_said(model, messages):
    other = copy.deepcopy(model)
    if registry.unavailable("triton") is None:
        pytest.skip("there is a GPU")
    set_backend(other, "triton")
    assert "triton" not in backends(other)
    assert len([message for message in messages if "linear layers" in message and "triton:" in message]) == 1


def test_a_model_on_two_devices_is_not_fused_and_said(model, messages):
    plan = plan_of(model, model.config.quantization_config)
    state = backend.Runtime("auto")
    assert not backend.fuse_layers(model, plan, state, {"cuda", "cpu"}) and not state.served
    if backend.layer_backend("auto"):
        assert len([message for message in messages if "the model lies on cpu and cuda" in message]) == 1
    other = copy.deepcopy(model)
    set_backend(other, "reference")
    with pytest.raises(RuntimeError, match="packed for cpu and gets an input on meta: call .*set_backend"):
        other.lm_head.kernel(torch.zeros(1, other.config.hidden_size, device="meta"))


def test_wide_weights_are_left_to_the_simulation(messages):
    overrides = {"*layers.1.mlp.down_proj": {"weight_bits": 16}}
    model = quantize(build("llama-gqa"), None, config("w4a8", overrides=overrides))
    assert "simulate" in backends(model) and torch.isfinite(logits_of(model)).all()
    assert any("has 16-bit weights, and kernels take up to 8" in message for message in messages)
    assert any("1 of 15 linear layers" in message for message in messages)


def test_doctor_lists_the_kernels_of_a_checkpoint(model, folder, capsys, monkeypatch):
    layers = survey(folder)
    assert [(layer.name, layer.backend) for layer in layers] == [
        (other.name, other.backend) for other in served(model)
    ]
    main(["doctor", str(folder)])
    printed = capsys.readouterr().out
    assert "linear_w4a8" in printed and "lm_head" in printed
    if not cpp.available():
        assert f"instruction set of cpp: {cpp.library().isa}" in printed
        assert all(name in printed for name in cpp.library().instruction_sets)
        monkeypatch.setattr(cpp.library(), "wrong", ("amx",))
        assert "not amx: it computes wrong results here" in survey_table(layers)
    with pytest.raises(ValueError, match="no checkpoint that optimum_mobilequant saved"):
        build("llama").save_pretrained(folder / "float")
        survey(folder / "float")
