"""The folder that lets an interrupted run resume: one file for each finished stage, and what they were computed from.

    fingerprint.json                 inputs and settings; another run must not continue here
    04_prefix.safetensors ...        finished stages, tensors plus JSON metadata in the header
    30_learn.progress.safetensors    the latest snapshot inside a stage; gone when the stage is finished

Every file is written under a temporary name in the same folder, synced, then renamed: a file that has its final name
is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..lookup import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGES = {
    "write": 2,
    "write_more": 3,
    "prefix": 4,
    "allocate": 5,
    "calibrate": 10,
    "smooth": 15,
    "transform": 20,
    "ranges": 25,
    "learn": 30,
    "compensate": 33,
    "round": 35,
    "bias": 36,
    "features": 37,
    "finetune": 38,
    "pack": 40,
}
FINGERPRINT = "fingerprint.json"
_FORMAT_VERSION = "1"
# Settings that say where things are, or what came out, and not what is computed. The data has a hash of its own.
_NOT_COMPUTED_FROM = {
    "run_dir",
    "device",
    "gradient_checkpointing",  # the same result bit for bit; what a run that was out of memory is repeated with
    "recorded",
    "dataset",
    "dataset_split",
    "finetune_dataset",
    "finetune_split",
    "teachers",  # have hashes of their own
    "text_column",
    "tokenizer",
    "target",  # refuses a run, changes none
}
# Entries of a model's config that change with loading and saving; its class and the dtype of its weights count anyway.
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}
_HASH_BLOCK = 2**26  # bytes


def fingerprint_of(
    model: PreTrainedModel,
    data_sha256: str,
    config_dict: Mapping[str, Any],
    teachers: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What a run's stages depend on, as JSON.

    The weights enter in full, not as a sample, see :func:`weights_digest`. So do the model's class and config, without
    what loading and saving change there.

    Args:
        model: the float model, not on the meta device.
        data_sha256: hash of the calibration tokens.
        config_dict: settings of the run; entries that only name places (``run_dir``, ``device``, ``dataset``, ...) and
            measurements are left out.
        teachers: weight by digest of the models other than this one that fine-tuning imitates.

    Raises:
        ValueError: a parameter without data.
    """
    settings = {name: value for name, value in config_dict.items() if name not in _NOT_COMPUTED_FROM}
    return {
        "package": _package_version(),
        "weights": weights_digest(model),
        "architecture": architecture_digest(model),
        "data": data_sha256,
        "settings": json.loads(json.dumps(settings)),
        **({"teachers": dict(teachers)} if teachers else {}),
    }


def weights_digest(model: PreTrainedModel) -> str:
    """BLAKE2b over name, dtype, shape and bytes of every parameter in name order (about a second per GB).

    Raises:
        ValueError: a parameter without data.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(f"parameter {name} has no data (meta device); load the model before quantizing it")
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, data.nbytes, _HASH_BLOCK):
            digest.update(data[start : start + _HASH_BLOCK])
    return digest.hexdigest()


def architecture_digest(model: PreTrainedModel) -> str:
    """BLAKE2b over class and config."""
    architecture = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_ARCHITECTURE}
    architecture["class"] = type(model).__name__
    described = json.dumps(architecture, sort_keys=True, default=str).encode()
    return hashlib.blake2b(described, digest_size=32).hexdigest()


def _package_version() -> str:
    try:
        return version("optimum-mobilequant")
    except PackageNotFoundError:
        return "source tree"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = _flat(old), _flat(new)
    missing = object()

    def short(value: Any) -> str:
        text = "absent" if value is missing else json.dumps(value)
        return text if len(text) <= 24 else text[:20] + "..."

    pairs = [(name, before.get(name, missing), after.get(name, missing)) for name in sorted({*before, *after})]
    return [f"{name} ({short(was)} there, {short(now)} now)" for name, was, now in pairs if was != now]


class RunDirectory:
    """Finished stages of one run. Use [`RunDirectory.open`].

    Args:
        path: an existing folder that belongs to this run, or None: nothing is kept, every ``load`` finds nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, fingerprint: Mapping[str, Any]) -> RunDirectory:
        """Open a run folder, creating it if need be.

        Args:
            path: the folder; None keeps nothing and writes nothing.
            fingerprint: see [`fingerprint_of`]; compared with the one in the folder, or stored there.

        Raises:
            ValueError: the folder belongs to another run, or its fingerprint cannot be read.
            OSError: no folder there and none can be made, or it cannot be written to.
        """
        if path is None:
            return cls(None)
        folder = Path(path).expanduser()
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"run_dir {folder} is a file; name a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"run_dir {folder} cannot be created ({error.strerror}); name another folder") from error
        new = json.loads(json.dumps(fingerprint))
        file = folder / FINGERPRINT
        if file.exists():
            try:
                old = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} cannot be read ({error}); delete {folder} to start over") from error
            if old != new:
                raise ValueError(
                    f"run_dir {folder} holds another run, which differs in: {', '.join(_differences(old, new))}. "
                    "Use another run_dir, or delete this one to start over"
                )
        elif stray := next(folder.glob("[0-9][0-9]_*.safetensors"), None):
            raise ValueError(f"{stray} has no {FINGERPRINT} beside it, so its origin is unknown; use another run_dir")
        for stale in folder.glob(".*.tmp"):
            writer = stale.name.split(".")[-2]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):  # killed while it wrote
                stale.unlink()
        # Rewritten even if unchanged: it proves, before any long work, that the folder can be written to.
        _write(file, lambda target: target.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", "utf-8"))
        return cls(folder)

    def _file(self, stage: str, suffix: str = "") -> Path:
        assert self.path is not None
        return self.path / f"{lookup('stage', STAGES, stage):02d}_{stage}{suffix}.safetensors"

    def save(self, stage: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Store a finished stage and drop its progress snapshot.

        Args:
            stage: a key of ``STAGES``.
            tensors: by name; any device, shape and dtype that safetensors holds.
            meta: anything JSON.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier stages are untouched.
        """
        if self.path is not None:
            _write_tensors(self._file(stage), stage, tensors, meta)
            self._file(stage, ".progress").unlink(missing_ok=True)

    def finished(self, stage: str) -> bool:
        """Whether :meth:`load` would find something."""
        return self.path is not None and self._file(stage).is_file()

    def load(self, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and metadata of a finished stage; None if it is not finished.

        Raises:
            ValueError: the file is damaged.
        """
        return None if self.path is None else _read_tensors(self._file(stage), stage)

    def save_progress(self, stage: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the snapshot inside an unfinished stage; arguments and errors as in [`save`]."""
        if self.path is not None:
            _write_tensors(self._file(stage, ".progress"), stage, tensors, meta)

    def load_progress(self, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The latest snapshot of an unfinished stage, or None; errors as in [`load`]."""
        return None if self.path is None else _read_tensors(self._file(stage, ".progress"), stage)


def _write(file: Path, fill: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports I/O errors as its own exception, with the number in the text
        full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        if isinstance(error, (OSError, SafetensorError)):
            reason = "the disk is full; free some space" if full else f"{error}; check that the folder can be written"
            raise OSError(
                errno.ENOSPC if full else errno.EIO,
                f"{file} was not written: {reason}, or use another run_dir. Finished stages are kept: run again",
            ) from error
        raise


def _write_tensors(file: Path, stage: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        storage = plain[name].untyped_storage().data_ptr()
        if storage in seen:  # safetensors refuses tensors that share memory
            plain[name] = plain[name].clone()
        seen.add(storage)
    header = {"stage": stage, "format_version": _FORMAT_VERSION, "meta": json.dumps(dict(meta))}
    _write(file, lambda target: save_file(plain, target, metadata=header))


def _read_tensors(file: Path, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if header.get("stage") != stage or header.get("format_version") != _FORMAT_VERSION:
            raise ValueError(f"its header says {header or 'nothing'}")
        return tensors, json.loads(header["meta"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged or not a stage file of this version ({error}); delete it to redo that stage"
        ) from error
