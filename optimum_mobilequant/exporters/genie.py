"""A bundle for Genie, Qualcomm's runtime for language models on phones: compiled graphs and their configuration."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..log import get_logger
from ..run.resources import peak_memory
from .folder import write_json
from .genie_config import (
    Vocabulary,
    backend_extensions,
    genie_config,
    read_vocabulary,
    rope_settings,
    sampler,
)
from .genie_prefix import write_state
from .genie_readme import readme
from .genie_runner import CONFIG, EXTENSIONS
from .htp import ContextBinary, build_contexts, check_reload, open_for_htp, require_emulator, write_htp_graphs
from .options import ExportOptions, ExportResult
from .targets import Soc, soc_of

logger = get_logger(__name__)

SHARED_CONFIG, SHARED_EXTENSIONS = "genie_config_shared.json", "htp_backend_ext_config_shared.json"
PROMPT_BINARY, TOKEN_BINARY, SHARED_BINARY = "prompt.bin", "token.bin", "shared.bin"
METADATA, README = "metadata.json", "README.md"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Older ones cannot share weights between the graphs of a binary.
_SHARES_FROM_ARCH = 73


def export_genie(checkpoint: Path, out: Path, options: ExportOptions) -> ExportResult:
    """Compile the prompt and the token graph for ``options.soc`` and write what Genie needs to run them.

    Two forms of the same graphs are written: one binary for each, which this computer's emulator can load and run, and
    (from Hexagon v73 on) one binary that holds the weights once, which only a phone can load. The README in the folder
    says which file is for what.

    Args:
        checkpoint: a folder that ``save_pretrained`` wrote, with its tokenizer.
        out: an empty folder.

    Raises:
        ValueError: unknown system on chip; operations that the HTP does not take; tensors without integers; a
            tokenizer or rotary embedding that Genie cannot imitate; see :func:`~.source.open_checkpoint`.
        ImportError: onnxruntime-qnn is missing (names the pip command).
        RuntimeError: no emulator on this machine, or its compiler refused a graph.
    """
    chip, started = soc_of(options.soc), time.monotonic()
    require_emulator()
    source = open_for_htp(checkpoint)
    vocabulary, rope = read_vocabulary(checkpoint, source.model), rope_settings(source.model, source.graph.facts)
    facts = source.graph.facts
    with tempfile.TemporaryDirectory(prefix="graphs-", dir=out) as folder:
        graphs = write_htp_graphs(source, Path(folder), options)
        write_state(source.graph, prefix := source.plan.prefix, out)
        del source  # the compiler needs the memory
        binaries, sdk = compile_graphs(Path(folder), graphs, out, chip)
    for name in _TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    configs = {CONFIG: (EXTENSIONS, [PROMPT_BINARY, TOKEN_BINARY])}
    if SHARED_BINARY in binaries:
        configs[SHARED_CONFIG] = (SHARED_EXTENSIONS, [SHARED_BINARY])
    for name, (extensions, files) in configs.items():
        config = genie_config(
            facts,
            vocabulary,
            rope,
            context=options.context,
            binaries=files,
            extensions=extensions,
            sampling=sampler(checkpoint),
        )
        write_json(out / name, config)
        write_json(out / extensions, backend_extensions(chip, shared=name == SHARED_CONFIG))
    sizes = {name: (out / name).stat().st_size for name in binaries}
    write_json(out / METADATA, metadata(checkpoint, out, facts, vocabulary, chip, options, sdk, binaries, prefix))
    text = readme(chip, options, sdk, sizes, vocabulary, checkpoint.name, len(prefix))
    (out / README).write_text(text, encoding="utf-8")
    summary = {
        "soc": chip.name,
        "qairt": sdk,
        "binaries": sizes,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": peak_memory(),
    }
    return ExportResult.of("genie", out, summary)


def compile_graphs(
    folder: Path, graphs: Mapping[str, Mapping[str, Any]], out: Path, chip: Soc
) -> tuple[list[str], str]:
    """Compile the prompt and the token graph in ``folder`` into the binaries of a bundle in ``out``.

    Args:
        graphs: of :func:`~.htp.write_htp_graphs`.

    Returns:
        file names, and the version of Qualcomm's SDK that compiled them.
    """
    models = {name: folder / graphs[name]["file"] for name in ("prompt", "token")}
    logger.info(f"compiling {len(models)} graphs for {chip.name} (Hexagon {chip.dsp_arch})")
    (single := folder / "single").mkdir()
    built = build_contexts(models, single, chip.name)
    for name, binary in built.items():
        check_reload(binary, chip.name, graphs[name])
    binaries = {PROMPT_BINARY: built["prompt"].binary, TOKEN_BINARY: built["token"].binary}
    if chip.htp_arch >= _SHARES_FROM_ARCH:
        (shared := folder / "shared").mkdir()
        binaries[SHARED_BINARY] = build_contexts(models, shared, chip.name, shared=True)["prompt"].binary
    for name, path in binaries.items():
        path.rename(out / name)
    return list(binaries), sdk_version(built["prompt"])


def sdk_version(built: ContextBinary) -> str:
    """Version of Qualcomm's SDK that compiled a binary, e.g. ``"2.51.0"``; a phone's libraries must not be older."""
    import onnx

    (node,) = onnx.load(built.wrapper).graph.node
    (stated,) = (a.s.decode() for a in node.attribute if a.name == "ep_sdk_version")
    return ".".join(stated.lstrip("v").split(".")[:3])


def metadata(
    checkpoint: Path,
    out: Path,
    facts: Mapping[str, int],
    vocabulary: Vocabulary,
    chip: Soc,
    options: ExportOptions,
    sdk: str,
    binaries: list[str],
    prefix: Sequence[int] = (),
) -> dict[str, Any]:
    """What a later reader has to know of the bundle: origin, sizes, digests of the binaries, and what was checked."""
    versions = {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn", "transformers", "torch")}
    return {
        "format_version": 1,
        "checkpoint": checkpoint.name,
        "optimum_mobilequant": __version__,
        "versions": versions,
        "qairt": sdk,
        "soc": {"name": chip.name, "soc_model": chip.soc_model, "dsp_arch": chip.dsp_arch},
        "context": options.context,
        "prompt_length": options.prompt_length,
        "facts": dict(facts),
        "tokens": {"bos": vocabulary.bos, "eos": list(vocabulary.eos), "pad": vocabulary.pad},
        **({"prefix": list(prefix)} if prefix else {}),
        "binaries": {name: _binary(out / name) for name in binaries},
    }


def _binary(path: Path) -> Mapping[str, Any]:
    checked = (
        "compiled; only a phone can load it" if path.name == SHARED_BINARY else "compiled; loaded in the emulator"
    )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest, "checked": checked}
