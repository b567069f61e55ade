"""Export of a saved checkpoint to what runtimes and converters read."""

from __future__ import annotations

from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from .. import __version__
from .folder import RECORD, check_destination, resumed, staging, write_json
from .options import (
    DEFAULT_CONTEXT,
    DEFAULT_PROMPT_LENGTH,
    ENCODINGS_VERSIONS,
    EXPORTERS,
    Exporter,
    ExportOptions,
    ExportResult,
)

__all__ = [
    "DEFAULT_CONTEXT",
    "DEFAULT_PROMPT_LENGTH",
    "ENCODINGS_VERSIONS",
    "EXPORTERS",
    "ExportOptions",
    "ExportResult",
    "Exporter",
    "export",
]


def export(
    checkpoint: str | PathLike[str],
    target: str,
    out: str | PathLike[str],
    *,
    context: int | None = None,
    prompt_length: int | None = None,
    dynamic: bool = False,
    encodings_version: str = "1.0.0",
    soc: str = "sm8650",
    device: str | None = None,
    wait: bool = False,
    all_inputs: bool = False,
    overwrite: bool = False,
) -> ExportResult:
    """Write a checkpoint in the form of ``target``.

    Nothing but the saved folder is read, and ``out`` appears only when all of it is written: the exporter fills a
    hidden folder beside it, which is renamed at the end and removed after an error.

    Args:
        checkpoint: folder that :func:`~optimum_mobilequant.quantize` and ``save_pretrained`` wrote.
        target: a key of :data:`EXPORTERS`.
        out: folder for the result; new or empty.
        context: tokens the graphs attend to, cached and new ones together; 2048, or the model's positions if it has
            fewer.
        prompt_length: new tokens of the prompt graph; 128, or half the context if that is less.
        dynamic, encodings_version, soc, device, wait, all_inputs: see :class:`ExportOptions`.
        overwrite: replace an earlier export in ``out``.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: unknown target; a checkpoint of another method or a damaged one; a context the model does not
            have; a prompt length that does not fit; ``out`` in use.
        ImportError: a package that the target needs is missing (names the pip command).
    """
    if target not in EXPORTERS:
        raise ValueError(f'export target "{target}" is unknown; known: {", ".join(EXPORTERS)}')
    exporter = EXPORTERS[target]
    source, destination = Path(checkpoint).expanduser().resolve(), Path(out).expanduser().resolve()
    marker = exporter.resumes or RECORD
    goes_on = exporter.resumes is not None and (destination / marker).is_file() and not overwrite
    if not goes_on:
        check_destination(destination, source, overwrite, marker=marker)
    from .source import resolve_options  # builds on transformers, which help texts do without

    options = replace(
        resolve_options(source, context=context, prompt_length=prompt_length),
        dynamic=dynamic,
        encodings_version=encodings_version,
        soc=soc,
        device=device,
        wait=wait,
        all_inputs=all_inputs,
    )
    run = exporter.load()
    if exporter.resumes is not None:
        with resumed(destination, marker, overwrite):
            result = run(source, destination, options)
            if result.summary.get("finished") is True:
                _record(result, source, options)
        return ExportResult.of(target, destination, result.summary)
    with staging(destination, source, overwrite) as staged:
        result = run(source, staged, options)
        _record(result, source, options)
        result = ExportResult.of(target, staged, result.summary)
    return replace(result, path=destination)


def _record(result: ExportResult, source: Path, options: ExportOptions) -> None:
    """The file that marks a folder as a finished export, and says of what."""
    about = {"target": result.target, "optimum_mobilequant": __version__, "checkpoint": source.name}
    write_json(result.path / RECORD, about | {"options": asdict(options), "summary": dict(result.summary)})
