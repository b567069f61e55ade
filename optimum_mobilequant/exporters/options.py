"""What an exporter is asked for, what it returns, and the table of exporters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENCODINGS_VERSIONS = ("1.0.0", "0.6.1", "2.0.0")
DEFAULT_CONTEXT = 2048
DEFAULT_PROMPT_LENGTH = 128


@dataclass(frozen=True)
class ExportOptions:
    """Resolved options of one export; an exporter ignores those it has no use for.

    Args:
        context: cached and new tokens together, C. Never above the model's positions.
        prompt_length: new tokens of the prompt graph, S (the token graph has 1). Below ``context``.
        qdq: quantize-dequantize pairs in the graph; off gives the float graph that an encodings file describes.
        integer_io: integers at the graph's inputs and outputs where their encoding is known (needs ``qdq``).
        dynamic: also write the graph with symbolic batch, sequence and past.
        encodings_version: layout of an encodings file, one of :data:`ENCODINGS_VERSIONS`.
        soc: the system on chip that binaries are made for, e.g. ``"sm8650"``.
        device: name of a device of a hub, or None.
        wait: wait for jobs sent to a hub.
        all_inputs: compressed-tensors: also write static inputs that vLLM has no kernel for.
    """

    context: int
    prompt_length: int
    qdq: bool = True
    integer_io: bool = True
    dynamic: bool = False
    encodings_version: str = "1.0.0"
    soc: str = "sm8650"
    device: str | None = None
    wait: bool = False
    all_inputs: bool = False

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context {self.context} is too short: give at least 2")
        if not 1 <= self.prompt_length < self.context:
            raise ValueError(
                f"prompt length {self.prompt_length} must be at least 1 and below the context of {self.context}: "
                "lower the prompt length or raise the context"
            )
        if self.integer_io and not self.qdq:
            raise ValueError("integer inputs and outputs need the quantized form: set integer_io=False for floats")
        if self.encodings_version not in ENCODINGS_VERSIONS:
            raise ValueError(
                f"encodings version {self.encodings_version!r} is unknown; known: {', '.join(ENCODINGS_VERSIONS)}"
            )


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        target: key of :data:`EXPORTERS`.
        path: the folder.
        files: every file, relative to ``path``, with its size in bytes.
        summary: counts and sizes for people and scripts; JSON types only.
    """

    target: str
    path: Path
    files: Mapping[str, int]
    summary: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: str, path: Path, summary: Mapping[str, Any]) -> ExportResult:
        """The result for what lies in ``path`` now."""
        found = sorted(p for p in path.rglob("*") if p.is_file())
        return cls(target, path, {p.relative_to(path).as_posix(): p.stat().st_size for p in found}, dict(summary))


# (checkpoint folder, empty folder to fill, options) -> result. The caller renames the folder once all is written.
ExportFunction = Callable[[Path, Path, ExportOptions], ExportResult]


@dataclass(frozen=True)
class Exporter:
    """One target.

    Args:
        module: relative to this package; imported when the target is asked for.
        function: its :data:`ExportFunction`.
        extra: the optional dependencies of the project that it needs, or None.
        packages: top-level modules that the extra installs.
        summary: one line of help.
        resumes: file by which an unfinished export is recognised. Such an exporter works in the final folder, goes on
            from what it finds there, and says ``finished`` in its summary.
    """

    module: str
    function: str
    extra: str | None
    packages: tuple[str, ...]
    summary: str
    resumes: str | None = None

    def load(self) -> ExportFunction:
        """The function.

        Raises:
            ImportError: a package is missing; names the pip command.
        """
        require(self.extra, *self.packages)
        function: ExportFunction = getattr(import_module(f".{self.module}", __package__), self.function)
        return function


def require(extra: str | None, *packages: str) -> None:
    """Raise ImportError, naming the pip command, if a top-level module is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f'{", ".join(missing)} missing: pip install "optimum-mobilequant[{extra}]"')


# Adding a target is adding a row.
EXPORTERS: dict[str, Exporter] = {
    "onnx": Exporter(
        "onnx", "export_onnx", "onnx", ("onnx",), "prompt and token graphs with static integers, and a memory plan"
    ),
    "qnn": Exporter("qnn", "export_qnn", "onnx", ("onnx",), "float ONNX and AIMET encodings, as .aimet folders"),
    "genie": Exporter(
        "genie",
        "export_genie",
        "qnn",
        ("onnx", "onnxruntime", "onnxruntime_qnn"),
        "context binaries and the configuration of Qualcomm's Genie",
    ),
    "ai-hub": Exporter(
        "ai_hub",
        "export_ai_hub",
        "ai-hub",
        ("onnx", "qai_hub"),
        "compile and link jobs on Qualcomm AI Hub",
        resumes="ai_hub_jobs.json",
    ),
    "compressed-tensors": Exporter(
        "compressed_tensors",
        "export_compressed_tensors",
        None,
        (),
        "a checkpoint that vLLM and transformers read through compressed-tensors",
    ),
}
