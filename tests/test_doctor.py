import json
from importlib import metadata
from pathlib import Path

import pytest

from optimum_mobilequant import doctor
from optimum_mobilequant.kernels.registry import BACKENDS
from optimum_mobilequant.run.machine import cpu_flags, cpu_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(scope="module")
def found():
    return doctor.report()


def test_report_is_json_and_complete(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    versions = {row["name"]: row["version"] for row in found["requirements"]}
    import torch
    import transformers

    assert versions["torch"] == metadata.version("torch")  # torch.__version__ may add "+cu130"
    assert versions["transformers"] == transformers.__version__
    assert found["devices"]["cpu"]["usable_cores"] >= 1
    assert len(found["devices"]["cuda"]) == torch.cuda.device_count()
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["disk"]["free"] > 0
    assert [row["what"] for row in found["works"]] == ["quantize", "eval", "optimum-cli mobilequant"]
    assert found["works"][0]["ok"] == found["ok"]


def test_registered_says_what_transformers_knows(found):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert found["registered"] == ("mobilequant" in AUTO_QUANTIZER_MAPPING)


def test_table_shows_every_row(found):
    text = doctor.table(found)
    names = [*doctor.REQUIREMENTS, *doctor.EXTRAS, *BACKENDS, "python", "platform", "cpu", "memory", "disk"]
    names += ["backends", "registered", "hub"]
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert set(names) <= set(first_words)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_ranges_are_those_of_pyproject():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    declared = [Requirement(text) for text in project["dependencies"]]
    from packaging.specifiers import SpecifierSet

    assert {item.name: item.specifier for item in declared} == {
        name: SpecifierSet(needs) for name, needs in doctor.REQUIREMENTS.items()
    }
    assert project["requires-python"] == doctor.PYTHON
    optional = project["optional-dependencies"].items()
    extras = {
        name: tuple(Requirement(text).name for text in items)
        for name, items in optional
        if name not in ("dev", "test")
    }
    assert extras == doctor.EXTRAS


@pytest.mark.parametrize(
    ("number", "ok"),
    [
        ("5.11.9", False),
        ("5.12.0", True),
        ("5.99.0", True),
        ("5.24.0.dev0", True),
        ("5.23.0+local", True),
        ("6.0.0", False),
        (None, False),
    ],
)
def test_a_version_outside_the_range_is_named_with_its_fix(monkeypatch, number, ok):
    monkeypatch.setattr(doctor, "_version", lambda package: number)
    row = doctor._requirement("transformers", ">=5.12,<6")
    assert row["ok"] is ok
    assert row["fix"] == (None if ok else 'pip install "transformers>=5.12,<6"')


def test_a_bad_version_makes_quantize_not_work(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: "0.1" if package == "optimum-quanto" else real(package))
    found = doctor.report()
    assert not found["ok"]
    assert 'pip install "optimum-quanto>=0.2.7,<0.3"' in found["works"][0]["detail"]
    assert "NOT SUPPORTED" in doctor.table(found)


def test_a_broken_import_is_reported(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name in ("torch", "transformers.quantizers.auto"):
            raise OSError("libtorch.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = doctor.report()
    assert not found["ok"] and not found["registered"]
    assert "libtorch.so" in doctor.table(found)


def test_extras_give_the_install_command(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"onnx": "1.0"}.get)
    assert doctor._extra("onnx", ("onnx", "onnx-ir")) == {
        "extra": "onnx",
        "packages": {"onnx": "1.0", "onnx-ir": None},
        "install": 'pip install "optimum-mobilequant[onnx]"',
    }
    assert doctor._extra("onnx", ("onnx",))["install"] is None


def test_table_of_a_machine_with_a_gpu(found):
    card = {"index": 0, "name": "Some GPU", "memory_bytes": 24 * 2**30, "arch": "sm_90"}
    text = doctor.table({**found, "devices": {**found["devices"], "cuda": [card]}})
    assert any(line.split()[:3] == ["cuda:0", "Some", "GPU"] and "24.0 GiB" in line for line in text.splitlines())


def test_cpu_flags_of_both_families(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: X\nflags\t\t: fpu sse avx512_vnni avx2\n")
    assert cpu_flags(path) == ["avx2", "avx512_vnni"]
    assert cpu_name(path) == "X"
    path.write_text("processor\t: 0\nFeatures\t: fp asimd i8mm asimddp\n")
    assert cpu_flags(path) == ["asimd", "asimddp", "i8mm"]
    assert cpu_flags(tmp_path / "none") == []


def test_every_backend_is_usable_or_says_why_not(found):
    assert [row["name"] for row in found["backends"]] == list(BACKENDS)
    for row in found["backends"]:
        assert row["ok"] or len(row["detail"]) > 5, row
    assert {row["name"] for row in found["backends"] if row["ok"]} >= {"simulate", "reference"}


def test_the_doctor_compiles_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kernels"))
    (row,) = [row for row in doctor._backends() if row["name"] == "cpp"]
    assert "on first use" in row["detail"] if row["ok"] else row["detail"]
    assert not (tmp_path / "kernels").exists()


def test_caches_are_named_without_the_users_name(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.Path, "home", lambda: tmp_path)
    row = doctor._cache("kernel cache", tmp_path / ".cache" / "kernels")
    assert row["folder"] == "~/.cache/kernels" and row["free"] > 0 and row["writable"]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor._free(doctor._cache("kernel cache", tmp_path)) == "CANNOT BE WRITTEN"


def test_only_variables_without_secrets_are_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MOBILEQUANT_BACKEND", "simulate")
    found = doctor.report()
    assert found["environment"]["MOBILEQUANT_BACKEND"] == "simulate" and "hf_secret" not in json.dumps(found)
