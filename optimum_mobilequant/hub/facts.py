"""What a saved checkpoint says about itself: all a card may state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..checkpoint.inspection import Inspection, inspect_checkpoint
from ..config import MobileQuantConfig
from ..data.sources import FILE_TYPES, dataset_kind
from ..exporters.folder import RECORD
from ..log import get_logger
from .names import is_hub_id
from .scores import Evaluation, read_evaluations

logger = get_logger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Export:
    """A finished export that is published with the checkpoint.

    Args:
        folder: where it is now. name: its folder in the repository, such as ``onnx``.
        record: its ``export.json``. size: bytes of all its files.
    """

    folder: Path
    name: str
    record: Mapping[str, Any]
    size: int

    @property
    def checked(self) -> str | None:
        """How the exporter checked the result, in its own words; None if it recorded no check."""
        words = self.record.get("summary", {}).get("checked")
        return words if isinstance(words, str) and words.strip() else None


@dataclass(frozen=True)
class Facts:
    """A checked checkpoint.

    Args:
        folder: of the checkpoint. config: its quantization config. inspection: every tensor with its encoding.
        positions: longest context, or None. has_tokenizer: whether a tokenizer is saved beside the model.
    """

    folder: Path
    config: MobileQuantConfig
    inspection: Inspection
    positions: int | None
    has_tokenizer: bool

    @property
    def base_model(self) -> str | None:
        """Hub id of the float model, if the run recorded one."""
        name = self.config.recorded.get("base_model")
        return name if isinstance(name, str) and name else None

    @property
    def perplexity(self) -> dict[str, float]:
        """Validation perplexity by ``float``, ``start`` and ``quantized``; values that are not finite are left out."""
        found = self.config.recorded.get("validation_perplexity")
        values = found if isinstance(found, Mapping) else {}
        return {k: v for k, v in values.items() if isinstance(v, float | int) and math.isfinite(v)}

    @property
    def evaluations(self) -> list[Evaluation]:
        """What ``mobilequant eval`` recorded in the checkpoint."""
        return read_evaluations(self.config.recorded)

    @property
    def hub_dataset(self) -> str | None:
        """Hub id of the calibration data; None for files, texts and the built-in text."""
        data = self.config.dataset
        if dataset_kind(data) != "name" or Path(data).suffix in FILE_TYPES:
            return None
        name = str(data).partition(":")[0]
        return name if is_hub_id(name) else None

    @property
    def calibration(self) -> str | None:
        """The recorded description of the calibration data, without the folders of a file on somebody's disk."""
        text = self.config.recorded.get("data")
        if not isinstance(text, str):
            return None
        data = self.config.dataset
        return text.replace(data, Path(data).name) if isinstance(data, str) and self.hub_dataset is None else text


def read_facts(checkpoint: Path) -> Facts:
    """Read and check a checkpoint; see :func:`~optimum_mobilequant.inspect_checkpoint` for what is refused.

    Raises:
        FileNotFoundError: no such checkpoint, or one with files missing.
        ValueError: a checkpoint of another method, or a damaged one.
    """
    inspection = inspect_checkpoint(checkpoint)
    architecture = AutoConfig.from_pretrained(checkpoint)
    stored: Any = architecture.quantization_config
    config = MobileQuantConfig.from_dict(stored if isinstance(stored, Mapping) else stored.to_dict())
    tokenizer = any((checkpoint / name).is_file() for name in TOKENIZER_FILES)
    positions = getattr(architecture, "max_position_embeddings", None)
    return Facts(checkpoint, config, inspection, positions, tokenizer)


def read_exports(checkpoint: Path, exports: Iterable[Path]) -> list[Export]:
    """The exports inside ``checkpoint``, then ``exports``, each with a name of its own in the repository.

    Raises:
        ValueError: a folder that holds no finished export.
    """
    found = [_export(file.parent, file.parent.relative_to(checkpoint).as_posix()) for file in _records(checkpoint)]
    taken = {path.name for path in checkpoint.iterdir()}
    for folder in exports:
        if not (folder / RECORD).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no finished export: give a folder that `mobilequant export` wrote"
            )
        export = _export(folder, "")
        name = str(export.record["target"])
        if name in taken:
            name = f"{name}-{folder.name}"
        if name in taken:
            raise ValueError(f"two exports would be stored as {name!r}: rename one of the folders")
        if (made_of := export.record.get("checkpoint")) not in (None, checkpoint.resolve().name):
            logger.warning(
                f"the export {folder} was made of {made_of!r}, not {checkpoint.name!r}: is it the right one?"
            )
        taken.add(name)
        found.append(Export(folder, name, export.record, export.size))
    return found


def _records(checkpoint: Path) -> list[Path]:
    return [file for file in visible_files(checkpoint) if file.name == RECORD and file.parent != checkpoint]


def _export(folder: Path, name: str) -> Export:
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["target"], str) or not isinstance(record.get("summary", {}), dict):
            raise TypeError("unexpected types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): export again") from error
    return Export(folder, name, record, sum(path.stat().st_size for path in visible_files(folder)))


def visible_files(folder: Path) -> list[Path]:
    """Every file below ``folder`` in a fixed order, but none that is hidden or lies in a hidden folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
