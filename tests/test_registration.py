"""Importing the package is cheap and still registers the method, whichever of the two is imported first."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers.modeling_utils", "transformers.quantizers")
IS_THERE = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
import transformers.modeling_utils
assert configs["mobilequant"].__name__ == "MobileQuantConfig", configs
config = configs["mobilequant"](dataset="calib.txt")
assert type(quantizers["mobilequant"](config)).__name__ == "MobileQuantHfQuantizer", quantizers
assert not any(type(finder).__module__.startswith("optimum_mobilequant") for finder in sys.meta_path)
import transformers.quantizers.auto as module
assert module.__spec__.loader is module.__loader__
assert "mobilequant" not in type(module.__loader__).__module__
"""


def run(code):
    return subprocess.run([sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True)


@pytest.mark.parametrize("first", ["optimum_mobilequant", "optimum_mobilequant.cli"])
def test_the_import_loads_nothing_heavy(first):
    done = run(f"import {first}\nfound = [name for name in {HEAVY} if name in sys.modules]\nassert not found, found")
    assert done.returncode == 0, done.stderr


def test_the_check_of_heavy_modules_can_fail():
    done = run(f"import torch\nfound = [name for name in {HEAVY} if name in sys.modules]\nassert not found, found")
    assert done.returncode == 1 and "['torch']" in done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import optimum_mobilequant",
        "import optimum_mobilequant\nfrom optimum_mobilequant import MobileQuantConfig",
        "import transformers.modeling_utils\nimport optimum_mobilequant",
        "import optimum_mobilequant, importlib.util\nassert importlib.util.find_spec('transformers.quantizers.auto')",
        "import transformers.quantizers.auto\nimport optimum_mobilequant",
        "import optimum_mobilequant.registration as r\nr.register_when_loaded()",
        # modules of this package that load transformers' model code themselves, and are half imported then
        "import optimum_mobilequant.hf_quantizer",
        "import optimum_mobilequant.checkpoint.pack",
        "from optimum_mobilequant import quantize\nassert callable(sys.modules['optimum_mobilequant.nn'].swap)",
    ],
    ids=["before", "config", "after", "looked for", "between", "twice", "quantizer", "pack", "quantize"],
)
def test_the_method_is_known_in_any_order(imports):
    done = run(imports + IS_THERE)
    assert done.returncode == 0, done.stderr


def test_without_the_import_it_is_not_known():
    assert "KeyError: 'mobilequant'" in run(IS_THERE).stderr
