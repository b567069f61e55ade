"""What ``import optimum_mobilequant`` gives and does."""

import importlib
import inspect
import json

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import optimum_mobilequant
from optimum_mobilequant import hf_quantizer, registration
from tests.tiny import run_python

NAMES = [
    "MobileQuantConfig",
    "__version__",
    "compare",
    "export",
    "inspect_checkpoint",
    "perplexity",
    "push",
    "quantize",
    "set_backend",
]


def test_public_names():
    assert sorted(optimum_mobilequant.__all__) == NAMES
    assert dir(optimum_mobilequant) == NAMES


# What callers may write. Parameters may be added with a default; one that goes or moves is a break: see "Deprecations"
# in CONTRIBUTING.md.
SIGNATURES = {
    "compare": ("checkpoint", "text_or_ids"),
    "export": ("checkpoint", "target", "out"),
    "inspect_checkpoint": ("path",),
    "perplexity": ("model", "tokenizer", "text_or_ids"),
    "push": ("checkpoint", "repo_id"),
    "quantize": ("model", "tokenizer", "config"),
    "set_backend": ("model", "name"),
}
KEYWORDS = {
    "compare": {"onnx", "float_model", "float32", "htp", "seq_len", "batch_size"},
    "perplexity": {"seq_len", "bos", "prefix", "batch_size", "progress"},
    "push": {"private"},
    "quantize": {"run_dir"},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name):
    parameters = inspect.signature(getattr(optimum_mobilequant, name)).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    assert positional[: len(SIGNATURES[name])] == SIGNATURES[name]
    assert all(p.default is not p.empty for p in parameters if p.name not in SIGNATURES[name])
    assert {p.name for p in parameters} >= KEYWORDS.get(name, set())
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def test_every_name_is_pinned():
    assert {*SIGNATURES, "MobileQuantConfig", "__version__"} == set(NAMES)
    options = inspect.signature(optimum_mobilequant.MobileQuantConfig).parameters
    assert list(options)[0] == "preset" and {"dataset", "recipe", "effort", "seed", "overrides", "bits"} <= set(
        options
    )


@pytest.mark.parametrize("name", NAMES)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(optimum_mobilequant, name)
    if name != "__version__":
        assert callable(value)
        assert value.__doc__
        assert value.__module__.startswith("optimum_mobilequant.")
        assert getattr(optimum_mobilequant, name) is value


def test_star_import():
    scope = {}
    exec("from optimum_mobilequant import *", scope)
    assert set(NAMES) <= scope.keys()


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'optimum_mobilequant' has no attribute 'quantise'"):
        optimum_mobilequant.quantise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'quantise'"):
        exec("from optimum_mobilequant import quantise")


def test_method_is_registered_with_transformers():
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["mobilequant"] is optimum_mobilequant.MobileQuantConfig
    made = AUTO_QUANTIZER_MAPPING["mobilequant"](optimum_mobilequant.MobileQuantConfig(dataset="calib.txt"))
    assert type(made) is hf_quantizer.MobileQuantHfQuantizer


def test_registering_again_changes_nothing():
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    registration.register_when_loaded()
    assert (dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)) == before


FRESH = """
import json, sys
import optimum_mobilequant
first = dict(sys.modules)
import importlib
importlib.reload(optimum_mobilequant)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
import transformers.modeling_utils
heavy = [name for name in ("datasets", "lm_eval", "onnx", "optimum.quanto") if name in first]
print(json.dumps({"registered": list(table).count("mobilequant"), "heavy": heavy}))
"""


def test_fresh_import_registers_once_even_if_reloaded_and_loads_nothing_optional():
    result = run_python(FRESH)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["registered"] == 1
    assert set(found["heavy"]) <= {"optimum.quanto"}


@pytest.mark.parametrize(
    "module", ["nn", "numerics", "plan", "families", "transform", "calibrate", "tune", "checkpoint", "evaluate"]
)
def test_names_of_the_subpackages_resolve(module):
    package = importlib.import_module(f"optimum_mobilequant.{module}")
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None
