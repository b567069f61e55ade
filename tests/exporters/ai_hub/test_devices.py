"""Names of devices and what they can run."""

from dataclasses import dataclass

import pytest

from optimum_mobilequant.exporters.ai_hub.devices import Target, find_device

HTP = ["framework:qnn", "hexagon:v75", "soc-model:57"]


@dataclass
class Device:
    name: str
    attributes: list[str] | str


DEVICES = [
    Device("Samsung Galaxy S24", [*HTP, "htp-supports-weight-sharing:true"]),
    Device("Samsung Galaxy S24 Ultra", HTP),
    Device("Samsung Galaxy S23", [*HTP, "hexagon:v73"]),
    Device("Google Pixel 7", ["framework:tflite", "framework:onnx"]),
    Device("iPhone 15", "framework:coreml"),
    Device("QCS8550 (Proxy)", ["framework:qnn", "hexagon:v73"]),
    Device("Half Listed", ["hexagon:v73"]),
    Device("Half Listed", ["framework:qnn"]),  # one name, two system versions
]


def test_a_device_is_found_in_any_case():
    assert find_device(DEVICES, "samsung galaxy s24 ") == Target("Samsung Galaxy S24", "v75", 57, True, True)
    assert not find_device(DEVICES, "Samsung Galaxy S24 Ultra").weight_sharing
    assert find_device(DEVICES, "QCS8550 (Proxy)") == Target("QCS8550 (Proxy)", "v73", None, False, False)
    assert find_device(DEVICES, "Half Listed").hexagon == "v73"


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("Samsung Galxy S24", '"Samsung Galaxy S24"'),
        ("s24", '"Samsung Galaxy S24 Ultra"'),
        ("Nokia", "known are 5, e.g."),
    ],
)
def test_an_unknown_name_brings_hints(wanted, hint):
    with pytest.raises(ValueError, match=f"no device {wanted!r}") as bad:
        find_device(DEVICES, wanted)
    assert hint in str(bad.value)
    assert "iPhone" not in str(bad.value)  # what could not run it is no hint


@pytest.mark.parametrize("name", ["Google Pixel 7", "iPhone 15"])
def test_a_device_without_the_npu_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' has no Hexagon NPU.*Samsung Galaxy S24"):
        find_device(DEVICES, name)


def test_none_is_no_device():
    with pytest.raises(ValueError, match="needs a device.*Samsung Galaxy S24"):
        find_device(DEVICES, None)
    with pytest.raises(ValueError, match="e.g. none"):
        find_device([], None)
