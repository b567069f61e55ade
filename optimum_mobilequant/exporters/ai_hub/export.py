"""The ``ai-hub`` target: the qnn target's folders, sent to Qualcomm AI Hub."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from pathlib import Path
from typing import Any

from ...graph.load import method_of
from ...hf_quantizer import METHOD
from ...log import get_logger
from ..options import EXPORTERS, ExportOptions, ExportResult, require
from .access import connect, read_config
from .folders import GraphFolder, read_folders
from .records import RECORDS, Records, only_one
from .reference import Reference
from .run import HubRun, run_jobs

logger = get_logger(__name__)

# The part of the folder that the qnn target writes.
QNN = "qnn"
_BLOCK = 2**22  # bytes


def export_ai_hub(checkpoint: Path, out: Path, options: ExportOptions) -> ExportResult:
    """Compile a checkpoint on AI Hub, link its graphs into one context binary, and measure it on a device.

    Account, device and records are checked first; then the qnn target writes ``out/qnn`` and the jobs are sent.
    Without ``options.wait`` that is all: the same call, later, fetches the results. With it, the call stays until all
    jobs have ended. A finished folder is returned as it is, without any request.

    Args:
        checkpoint: folder of a saved model.
        out: folder for ``qnn``, ``ai_hub_jobs.json`` and results; made if need be. What an earlier call with the same
            arguments left in it is continued.
        options: ``device`` is needed; ``context``, ``prompt_length`` and ``encodings_version`` shape the graphs.

    Returns:
        ``summary`` holds ``finished``, ``device``, ``jobs`` (state and page of each), and either ``continue``, the
        command that goes on, or what :class:`HubRun` says of the results.

    Raises:
        FileNotFoundError, ValueError: no checkpoint of this package, no configuration, no or an unfit device, a folder
            of other jobs.
        ConnectionError, PermissionError: no service, or it refuses the token.
        RuntimeError: a job failed.
        ImportError: ``qai_hub`` or a package of the qnn target is missing.
    """
    require("ai-hub", "qai_hub")
    if method_of(checkpoint) != METHOD:
        raise ValueError(
            f"{checkpoint} has float activations, but AI Hub gets graphs of integers: quantize the float model with "
            "`mobilequant quantize`, e.g. --preset w8a8"
        )
    sizes = {"context": options.context, "prompt_length": options.prompt_length}
    made_from = {
        "checkpoint": _digest(checkpoint),
        "qnn": {**sizes, "encodings_version": options.encodings_version},
        "asked_device": (options.device or "").strip().casefold(),
    }
    begun = (out / RECORDS).is_file()
    if begun:
        records = Records.open(out)
        records.bind(**made_from)
        if records.finished:
            return _result(checkpoint, out, options, HubRun.of(records))
    hub = connect(read_config())
    target = hub.find_device(options.device)
    out.mkdir(parents=True, exist_ok=True)
    reference = Reference(checkpoint, out)
    with only_one(out):
        if not begun:
            Records.open(out).bind(**made_from)
        try:
            folders = read_folders(_qnn_folder(checkpoint, out, options))
        except BaseException:
            if not begun:  # nothing was sent, so nothing is to be continued
                (out / RECORDS).unlink()
            raise
        samples = reference.samples(folders)

    def check(graph: GraphFolder, outputs: Path) -> dict[str, Any]:
        return {"against_executor": reference.compare(graph, samples[graph.name], outputs)}

    run = run_jobs(folders, out, hub, target, wait=options.wait, samples=samples, check=check)
    return _result(checkpoint, out, options, run)


def _qnn_folder(checkpoint: Path, out: Path, options: ExportOptions) -> Path:
    """The qnn target's result, made if it is not there. It appears as a whole, so a killed run leaves none."""
    folder = out / QNN
    if not folder.exists():
        staged = out / f".{QNN}.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        EXPORTERS["qnn"].load()(checkpoint, staged, options)
        staged.rename(folder)
    return folder


def _result(checkpoint: Path, out: Path, options: ExportOptions, run: HubRun) -> ExportResult:
    jobs = {title: {"state": job.state, "url": job.url} for title, job in run.jobs.items()}
    summary: dict[str, Any] = {"finished": run.finished, **run.summary, "jobs": jobs}
    if not run.finished:
        words = ["mobilequant", "export", str(checkpoint), "--to", "ai-hub", "--device", options.device or ""]
        words += ["--context", str(options.context), "--prompt-length", str(options.prompt_length)]
        words += ["--encodings-version", options.encodings_version, "--out", str(out), "--wait"]
        summary["continue"] = shlex.join(words)
        logger.warning("the jobs run on AI Hub; to fetch their results: %s", summary["continue"])
    elif checked := _checked(run):
        summary["checked"] = checked
    return ExportResult.of("ai-hub", out, summary)


def _checked(run: HubRun) -> str | None:
    """One sentence on the comparison with the executor, if it was made for every graph."""
    judged = {name: about.get("against_executor", {}) for name, about in run.summary.get("graphs", {}).items()}
    if not judged or not all(verdict.get("compared") for verdict in judged.values()):
        return None
    parts = []
    for name, verdict in judged.items():
        noise = verdict["sqnr_db"]
        agreement = "equal" if noise is None else f"{noise:.1f} dB"
        parts.append(f"{name} {agreement}, {verdict['same_choice']:.0%} of tokens with the same likeliest next one")
    return f"logits on {run.summary['device']['name']} against the integer executor: {'; '.join(parts)}"


def _digest(checkpoint: Path) -> str:
    """BLAKE2b, hexadecimal, of the config and the weights."""
    digest = hashlib.blake2b(digest_size=32)
    for file in sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("config.json")]):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
