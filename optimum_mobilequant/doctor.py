"""What an installation has and what works in it. Asks nothing of the network and changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .run.machine import cpu_flags, cpu_name, usable_cores

# The ranges of pyproject.toml, which a package run from its source folder cannot read; a test compares the two.
PYTHON = ">=3.11"
REQUIREMENTS = {
    "torch": ">=2.6",
    "transformers": ">=5.12,<6",
    "accelerate": "",
    "optimum": ">=2.3,<3",
    "optimum-quanto": ">=0.2.7,<0.3",
    "huggingface_hub": "",
    "safetensors": "",
    "tqdm": "",
    "numpy": "",
    "packaging": "",
    "psutil": "",
}
EXTRAS = {
    "data": ("datasets",),
    "eval": ("lm-eval",),
    "onnx": ("onnx", "onnxruntime"),
    "qnn": ("onnx", "onnxruntime", "onnxruntime-qnn"),
    "gpu": ("triton",),
    "bench": ("torchao", "onnx", "onnxruntime"),
    "ai-hub": ("onnx", "qai-hub"),
    "plots": ("matplotlib",),
    "docs": ("mkdocs", "mkdocs-material", "mkdocstrings"),
    "crosscheck": (
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx-ir",
        "bokeh",
        "jinja2",
        "jsonschema",
        "pandas",
        "pyyaml",
        "scikit-learn",
        "scipy",
    ),
}
# Variables that change what the package does; none of them holds a secret.
_VARIABLES = (
    "MOBILEQUANT_BACKEND",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "TRANSFORMERS_VERBOSITY",
    "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
)
_GIB = 2**30


def report() -> dict[str, Any]:
    """Examines this installation.

    Returns:
        Plain JSON data. ``requirements`` and ``extras`` compare installed versions with the supported ranges,
        ``devices``, ``threads``, ``memory`` (bytes) and ``disk`` (bytes) describe the machine, ``caches`` the folders
        that fill up, ``backends`` which kernels can be used here and why others cannot, ``environment`` the variables
        that change what is done; ``works`` says for each use whether it will work and, if not, what to do.
        ``ok`` is true if quantizing and evaluating work. A package that fails to import is reported, not raised.
    """
    python_version = platform.python_version()
    requirements = [_requirement(name, needs) for name, needs in REQUIREMENTS.items()]
    registration_error = _registration_error()
    python_ok = _in_range(python_version, PYTHON)
    faults = [] if python_ok else [f"Python {PYTHON} is needed"]
    faults += [row["fix"] for row in requirements if not row["ok"]]
    faults += [] if registration_error is None else [registration_error]
    core = {"ok": not faults, "detail": "; ".join(faults)}
    alias = _optimum_cli_file()
    alias_detail = str(alias or "not registered: install the package with pip; `mobilequant` needs no registration")
    return {
        "ok": not faults,
        "package": {"version": _version("optimum-mobilequant"), "location": str(Path(__file__).parent)},
        "python": {"version": python_version, "needs": PYTHON, "ok": python_ok, "executable": sys.executable},
        "platform": platform.platform(),
        "requirements": requirements,
        "extras": [_extra(name, packages) for name, packages in EXTRAS.items()],
        **_machine(),
        "caches": [_cache(what, folder) for what, folder in _caches().items()],
        "backends": _backends(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "registered": registration_error is None,
        "works": [
            {"what": "quantize", **core},
            {"what": "eval", **core},
            {"what": "optimum-cli mobilequant", "ok": alias is not None, "detail": alias_detail},
        ],
        "hub": "not tested: no network is used here",
    }


def table(found: dict[str, Any]) -> str:
    """The result of :func:`report` as text for a terminal or a bug report."""
    cpu, memory, disk, backends = found["devices"]["cpu"], found["memory"], found["disk"], found["backends"]
    lines = [
        _row("optimum-mobilequant", found["package"]["version"] or "not installed with pip", None),
        _row("", found["package"]["location"], None),
        _row("python", found["python"]["version"], found["python"]["ok"], found["python"]["needs"]),
        _row("platform", found["platform"], None),
        "",
        *(_row(r["name"], r["version"] or "missing", r["ok"], r["needs"]) for r in found["requirements"]),
        "",
        "extras",
    ]
    for extra in found["extras"]:
        versions = ", ".join(f"{name} {number or 'missing'}" for name, number in extra["packages"].items())
        lines.append(_row(f"  {extra['extra']}", versions, None, extra["install"] or ""))
    lines += [
        "",
        _row("cpu", f"{cpu['cores']} cores, {cpu['usable_cores']} usable", None, cpu["name"]),
        _row("", " ".join(cpu["flags"]) or "no flags known", None),
        *(
            _row(f"cuda:{gpu['index']}", gpu["name"], None, f"{gpu['memory_bytes'] / _GIB:.1f} GiB, {gpu['arch']}")
            for gpu in found["devices"]["cuda"]
        ),
        *([] if found["devices"]["cuda"] else [_row("cuda", "none", None)]),
        _row("mps", "yes" if found["devices"]["mps"] else "none", None),
        _row("threads", f"torch {found['threads']['torch']}", None, f"OMP_NUM_THREADS={found['threads']['omp']}"),
        _row("memory", f"{memory['available'] / _GIB:.1f} of {memory['total'] / _GIB:.1f} GiB free", None),
        _row("disk", f"{disk['free'] / _GIB:.1f} GiB free", None, disk["folder"]),
        *(_row(f"  {row['what']}", _free(row), None, row["folder"]) for row in found["caches"]),
        "",
        "backends",
        *(_row(f"  {row['name']}", "usable" if row["ok"] else "not here", None, row["detail"]) for row in backends),
        "",
        *(_row(name, value, None) for name, value in found["environment"].items()),
        *([""] if found["environment"] else []),
        _row("registered", "with transformers" if found["registered"] else "not with transformers", None),
        *(_row(row["what"], "works" if row["ok"] else "does not work", None, row["detail"]) for row in found["works"]),
        _row("hub", found["hub"], None),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, value: Any, ok: bool | None, note: str = "") -> str:
    mark = {None: "", True: "ok", False: "NOT SUPPORTED"}[ok]
    return f"{name:<24}{value!s:<24} {'  '.join(part for part in (mark, note) if part)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _in_range(number: str, needs: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needs).contains(number, prereleases=True)  # nightly builds are judged by their number


def _requirement(name: str, needs: str) -> dict[str, Any]:
    number = _version(name)
    ok = number is not None and _in_range(number, needs)
    return {
        "name": name,
        "version": number,
        "needs": needs,
        "ok": ok,
        "fix": None if ok else f'pip install "{name}{needs}"',
    }


def _extra(extra: str, packages: tuple[str, ...]) -> dict[str, Any]:
    versions = {package: _version(package) for package in packages}
    install = f'pip install "optimum-mobilequant[{extra}]"' if None in versions.values() else None
    return {"extra": extra, "packages": versions, "install": install}


def _registration_error() -> str | None:
    """Why transformers does not know the method after the package's import; None if it does."""
    try:
        importlib.import_module("optimum_mobilequant")
        auto = importlib.import_module("transformers.quantizers.auto")
    except Exception as error:  # a broken installation is what this command is for
        return f"the import fails ({type(error).__name__}: {error})"
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    if all("mobilequant" in known for known in tables):
        return None
    return "transformers does not know the method: reinstall optimum-mobilequant"


def _optimum_cli_file() -> Path | None:
    """The file through which ``optimum-cli`` finds the alias; None if there is none."""
    try:
        spec = importlib.util.find_spec("optimum.commands.register")
    except ImportError:  # optimum itself is missing
        return None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = (Path(folder) / "register_mobilequant.py" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _machine() -> dict[str, Any]:
    cuda: list[dict[str, Any]] = []
    mps = False
    torch_threads: int | None = None
    try:
        torch = importlib.import_module("torch")
    except Exception:  # reported by _registration_error, which imports torch too
        pass
    else:
        torch_threads = torch.get_num_threads()
        mps = torch.backends.mps.is_available()
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            arch = f"sm_{card.major}{card.minor}"
            cuda.append({"index": index, "name": card.name, "memory_bytes": card.total_memory, "arch": arch})
    return {
        "devices": {
            "cpu": {
                "name": cpu_name(),
                "cores": os.cpu_count(),
                "usable_cores": usable_cores(),
                "flags": cpu_flags(),
            },
            "cuda": cuda,
            "mps": mps,
        },
        "threads": {"torch": torch_threads, "omp": os.environ.get("OMP_NUM_THREADS")},
        "memory": _memory(),
        "disk": {"folder": os.getcwd(), "free": shutil.disk_usage(os.getcwd()).free},
    }


def _backends() -> list[dict[str, Any]]:
    """Which kernels can be used here; nothing is compiled for the answer."""
    try:
        registry = importlib.import_module("optimum_mobilequant.kernels.registry")
        build = importlib.import_module("optimum_mobilequant.kernels.cpp.build")
    except Exception as error:  # reported as that, beside the reason in _registration_error
        return [{"name": "all", "ok": False, "detail": f"{type(error).__name__}: {error}"}]
    found = []
    for name in registry.BACKENDS:
        detail = ""
        if name == "cpp" and sys.platform != "win32" and build.compiled_library() is None:
            try:
                reason, detail = None, f"not compiled yet; {build.find_compiler()} will, on first use"
            except build.BuildError as error:
                reason = str(error)
        else:
            reason = registry.BACKENDS[name].available()
        found.append({"name": name, "ok": reason is None, "detail": reason or detail})
    return found


def _caches() -> dict[str, Path]:
    """Folders that this package and the libraries below it fill."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"hub cache": Path(HF_HUB_CACHE)}
    with suppress(Exception):  # torch is broken, which is reported elsewhere
        folders["kernel cache"] = importlib.import_module("optimum_mobilequant.kernels.cpp.build").cache_folder()
    return folders


def _cache(what: str, folder: Path) -> dict[str, Any]:
    """Where it is (``~`` for the home folder), what is free on its disk, and whether it can be written."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    home = Path.home()
    shown = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
    free = shutil.disk_usage(there).free
    return {"what": what, "folder": shown, "free": free, "writable": os.access(there, os.W_OK)}


def _free(cache: dict[str, Any]) -> str:
    return f"{cache['free'] / _GIB:.1f} GiB free" if cache["writable"] else "CANNOT BE WRITTEN"


def _memory() -> dict[str, int]:
    import psutil

    found = psutil.virtual_memory()
    return {"total": found.total, "available": found.available}
