"""Was this model calibrated on the text it is measured on? A checkpoint keeps hashes of passages, which answer that.

A passage is a few dozen consecutive tokens. Those of the calibration data are kept as hashes, never as text; they are
looked for at every offset of a text that is to be scored, so cutting, prepending and BOS tokens do not hide them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..log import get_logger

logger = get_logger(__name__)

LENGTH = 32  # tokens in a passage: longer than what two texts share by chance, licence headers aside
COUNT = 64  # passages kept of a data set
# Of these, so many may be found before it counts: texts of one kind share a header or a table.
SHARED = 0.03
_FACTOR = (
    6364136223846793005  # of Knuth's MMIX generator; odd, so that int64 products lose nothing of the lowest token
)
_KEY = "passages"


def passages_of(rows: Iterable[Tensor]) -> dict[str, Any] | None:
    """A sample of the passages of token sequences, as JSON for ``MobileQuantConfig.recorded``.

    Args:
        rows: int64 ``[length]`` each, or ``[n, length]`` in all.

    Returns:
        ``{"length", "hashes"}`` with at most ``COUNT`` hashes in hexadecimal, evenly from all sequences; None if every
        sequence is shorter than a passage.
    """
    hashes = torch.cat([torch.empty(0, dtype=torch.int64), *(_hashes(row)[::LENGTH] for row in rows)])
    if not len(hashes):
        return None
    chosen = hashes[torch.linspace(0, len(hashes) - 1, min(COUNT, len(hashes))).long()].unique()
    return {"length": LENGTH, "hashes": [f"{value & (2**64 - 1):016x}" for value in chosen.tolist()]}


def overlap(recorded: Any, ids: Tensor) -> float:
    """Share of the recorded passages that occur in ``ids``, int64 ``[tokens]``; 0 where none are recorded."""
    kept = recorded.get(_KEY) if isinstance(recorded, dict) else None
    try:
        wanted = {int(value, 16) for value in kept["hashes"]} if kept and kept["length"] == LENGTH else set()
    except (KeyError, TypeError, ValueError):  # a record is for information: a damaged one must not stop a measurement
        return 0.0
    if not wanted:
        return 0.0
    values = torch.tensor(sorted(v - 2**64 if v >= 2**63 else v for v in wanted))
    return float(torch.isin(values, _hashes(ids)).float().mean())


def warn_if_calibrated_on(model: Any, ids: Tensor) -> None:
    """Warn where a quantized model's calibration text occurs in the text it is about to be scored on.

    Args:
        model: anything; without a config of this package nothing happens.
        ids: int64 ``[tokens]``.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    recorded = config.get("recorded") if isinstance(config, dict) else getattr(config, "recorded", None)
    share = overlap(recorded, ids)
    if share > SHARED:
        logger.warning(
            f"this model was calibrated on text that it is scored on ({100 * share:.0f} % of the sampled passages "
            "occur in it): the result flatters it; score another text"
        )


def _hashes(ids: Tensor) -> Tensor:
    """Polynomial hash, modulo 2^64, of the passage at each offset."""
    ids = ids.detach().cpu().long()
    count = ids.numel() - LENGTH + 1
    if count < 1:
        return torch.empty(0, dtype=torch.int64)
    total = torch.zeros(count, dtype=torch.int64)
    for offset in range(LENGTH):
        total = total * _FACTOR + ids[offset : offset + count] + 1
    # The low bits of such a sum depend on the low bits of the tokens alone: mix the high ones in.
    return (total ^ (total >> 29)) * _FACTOR
