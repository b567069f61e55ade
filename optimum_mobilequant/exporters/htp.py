"""Qualcomm's Hexagon Tensor Processor (HTP) through onnxruntime-qnn: sessions on its x86 emulator, context binaries.

The wheel ``onnxruntime-qnn`` carries the compiler for all of its chips and an emulator of them. Nothing may fall back
to the CPU: what the NPU does not take is an error here. 8-bit results of the emulator are within 1 or 2 steps of exact
integers, 16-bit ones are approximate, so results are compared in dB, never for equality.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..graph import Encoding, Graph
from .options import ExportOptions, require
from .targets import QNN_HTP, Soc, check_graph, soc_of

if TYPE_CHECKING:
    from .source import Source

Session = Any
EXTRA, PACKAGES = "qnn", ("onnx", "onnxruntime", "onnxruntime_qnn")
_PROVIDER = "QNNExecutionProvider"
# The machine the wheel's emulator was run on; its other wheels (Windows, arm64) are for real devices.
_EMULATED_ON = ("linux", "x86_64")


@dataclass(frozen=True)
class ContextBinary:
    """A compiled graph.

    Args:
        binary: what a phone loads.
        wrapper: the ONNX model through which ONNX Runtime loads ``binary``, which must lie beside it.
    """

    binary: Path
    wrapper: Path


def htp_session(
    model: Path, soc: str = "sm8650", *, entries: Mapping[str, str] | None = None, **provider: str
) -> Session:
    """An ONNX Runtime session whose nodes all run on the HTP.

    Args:
        model: quantized ONNX graph, or the wrapper of a context binary.
        soc: name of the system on chip, e.g. ``"sm8650"``.
        entries: further entries of the session's configuration.
        provider: further options of the QNN execution provider.

    Raises:
        ImportError: onnxruntime-qnn is missing (names the pip command).
        RuntimeError: a machine without the emulator, or a graph with an operation that the HTP does not take.
        ValueError: unknown system on chip.
    """
    chip, library = soc_of(soc), require_emulator()
    import onnxruntime as ort

    devices = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    backend = {"backend_path": library, "offload_graph_io_quantization": "0"}
    options.add_provider_for_devices(devices, backend | chip_options(chip) | provider)
    try:
        with stdout_to_stderr():
            return ort.InferenceSession(str(model), options)
    except Exception as error:  # ONNX Runtime's own types, one for each status
        message = str(error)
        if "fallback to CPU EP has been explicitly disabled" in message:
            message = (
                "an operation of the graph does not run on this chip's HTP; graphs of the target genie hold the "
                "conversions that it needs, those of the target onnx do not"
            )
        raise RuntimeError(f"{model.name} for {chip.name}: {message}") from error


def chip_options(chip: Soc) -> dict[str, str]:
    """Provider options that name a chip."""
    return {"soc_model": str(chip.soc_model), "htp_arch": str(chip.htp_arch)}


@cache
def require_emulator() -> str:
    """Make the provider known to ONNX Runtime, which takes it once in a process; returns the HTP library's path.

    Raises:
        ImportError: onnxruntime-qnn is missing (names the pip command).
        RuntimeError: a machine without the emulator.
    """
    require(EXTRA, *PACKAGES)
    machine = (sys.platform, platform.machine())
    if machine != _EMULATED_ON:
        raise RuntimeError(
            f"the HTP emulator runs on Linux x86-64, not on {machine[0]} {machine[1]}: export there, or use the "
            "target qnn or ai-hub, which need no emulator"
        )
    import onnxruntime as ort
    import onnxruntime_qnn

    path = str(onnxruntime_qnn.get_qnn_htp_path())
    if not Path(path).is_file():
        raise RuntimeError(
            f"onnxruntime-qnn is installed without {path}: pip install --force-reinstall onnxruntime-qnn"
        )
    ort.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    return path


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Qualcomm's libraries write a line to file descriptor 1, where a command's JSON goes: send it to 2 instead."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def build_contexts(
    models: Mapping[str, Path], out: Path, soc: str, *, shared: bool = False
) -> dict[str, ContextBinary]:
    """Compile graphs for a chip.

    Args:
        models: name -> quantized ONNX graph.
        out: folder for ``<name>.onnx`` and ``<name>_qnn.bin``.
        shared: one binary for all graphs, which hold the same weights once; all results then name it. The emulator
            cannot load such a binary.

    Raises:
        RuntimeError: see :func:`htp_session`; no binary came out, or one for another chip.
    """
    chip, built, sessions = soc_of(soc), {}, []
    for index, (name, model) in enumerate(models.items()):
        wrapper = out / f"{name}.onnx"
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(wrapper),
        }
        options = {}
        if shared:
            options["enable_htp_weight_sharing"] = "1"
            entries["ep.share_ep_contexts"] = "1"
            if index == len(models) - 1:
                entries["ep.stop_share_ep_contexts"] = "1"
        # Kept until the last one: sharing needs all of them in memory.
        sessions.append(htp_session(model, soc, entries=entries, **options))
        if not shared:
            sessions.clear()
        built[name] = wrapper
    del sessions
    found = {name: ContextBinary(_binary_of(wrapper), wrapper) for name, wrapper in built.items()}
    for binary in {item.binary for item in found.values()}:
        _check_chip(binary, chip)
    return found


def _binary_of(wrapper: Path) -> Path:
    """The file an EPContext wrapper names."""
    import onnx

    nodes = [node for node in onnx.load(wrapper).graph.node if node.op_type == "EPContext"]
    named = {a.s.decode() for node in nodes for a in node.attribute if a.name == "ep_cache_context"}
    if len(nodes) != 1 or len(named) != 1:
        raise RuntimeError(f"{wrapper.name} holds {len(nodes)} compiled parts, not 1: the graph did not compile whole")
    binary = wrapper.parent / named.pop()
    if not binary.is_file() or not binary.stat().st_size:
        raise RuntimeError(f"the compiler left no {binary.name}")
    return binary


def _check_chip(binary: Path, chip: Soc) -> None:
    """The binary's own record of its target must be the chip asked for."""
    wanted = f"arch={chip.htp_arch};".encode()
    if wanted not in binary.read_bytes():
        raise RuntimeError(f"{binary.name} was not compiled for {chip.name} ({chip.dsp_arch})")


def check_reload(built: ContextBinary, soc: str, ports: Mapping[str, Mapping[str, Any]]) -> None:
    """Load a context binary into the emulator and compare its inputs and outputs with those of the graph it is of.

    Args:
        ports: ``"inputs"`` and ``"outputs"``: name -> ``{"type", "shape"}``, as in an export's ``graphs.json``.

    Raises:
        RuntimeError: it does not load, or has other inputs or outputs.
    """
    session = htp_session(built.wrapper, soc)
    for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        got = {port.name: (port.type.removeprefix("tensor(").rstrip(")"), list(port.shape)) for port in found}
        wanted = {name: (port["type"], list(port["shape"])) for name, port in ports[kind].items()}
        if got != wanted:
            wrong = sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
            raise RuntimeError(f"{built.binary.name} came back with other {kind} than its graph: {', '.join(wrong)}")


class HtpRunner:
    """Logits of a checkpoint from the emulator, for :func:`optimum_mobilequant.evaluate.compare`.

    Called with token ids, int64 ``[batch, length]``, it returns codes of the logits, int32 ``[batch, length,
    vocabulary]``. Each sequence is read as a phone would read it: prompt graph in chunks, cache in static buffers.

    Args:
        checkpoint: folder that ``save_pretrained`` wrote.
        context: tokens a sequence may have.
        prompt_length: tokens of a chunk.
        soc: the chip to emulate.

    Raises:
        ValueError: a checkpoint that the HTP does not take; also a call with more than ``context`` tokens.
        ImportError, RuntimeError: see :func:`htp_session`.
    """

    def __init__(self, checkpoint: Path, *, context: int, prompt_length: int, soc: str = "sm8650"):
        require_emulator()
        from .onnx.runtime import OnnxModel
        from .source import resolve_options

        sizes = resolve_options(checkpoint, context=context, prompt_length=prompt_length)
        with tempfile.TemporaryDirectory(prefix="mobilequant-") as folder:
            write_htp_graphs(open_for_htp(checkpoint), Path(folder), sizes)
            self._model = OnnxModel(Path(folder), session=lambda path: htp_session(path, soc))
        encoding = self._model.logits_encoding
        assert encoding is not None
        self.encoding: Encoding = encoding

    def __call__(self, ids: Tensor) -> Tensor:
        rows = []
        for row in ids.numpy():
            self._model.reset()
            rows.append(torch.from_numpy(self._model.step(row).astype("int32")))
        return torch.stack(rows)


def open_for_htp(checkpoint: Path) -> Source:
    """Open a checkpoint that is to run on the HTP.

    Raises:
        ValueError: operations that the HTP does not take, or tensors without static integers, as of a weight-only
            model; see :func:`~.source.open_checkpoint`.
    """
    from .source import open_checkpoint

    source = open_checkpoint(checkpoint)
    check_graph(source.graph, QNN_HTP)
    refuse_floats(source.graph)
    return source


def refuse_floats(graph: Graph) -> None:
    """Raise ValueError if a tensor has no static integers, as in the graph of a weight-only model."""
    free = [name for name, value in graph.values.items() if value.encoding is None]
    if left := [name for name in free if name not in ("input_ids", "attention_mask")]:
        raise ValueError(
            f"{len(left)} tensors have no static encoding, e.g. {left[0]}: graphs for the HTP hold integers only; "
            'quantize the float model with a preset such as "w4a8" or "w8a8"'
        )


def write_htp_graphs(source: Source, out: Path, options: ExportOptions) -> dict[str, dict[str, Any]]:
    """Prompt and token graph in the form that the HTP takes, into ``out``, with the ``onnx`` target's other files.

    Returns:
        graph name -> ``{"file", "inputs", "outputs"}``, as in ``graphs.json``.
    """
    from .onnx.form import COVERED
    from .onnx.write import GRAPHS, write_callers_files, write_graphs

    write_callers_files(source, out, options, write_graphs(source, out, options, COVERED))
    graphs: dict[str, dict[str, Any]] = json.loads((out / GRAPHS).read_text(encoding="utf-8"))["graphs"]
    return graphs
