"""The rounding error of every activation of a checkpoint, measured while it reads a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..evaluate.perplexity import token_ids
from ..hf_quantizer import plan_of
from ..log import progress_bar
from ..lookup import lookup
from ..nn.quantizer import Quantizer
from ..runtime import simulated

BINS = 48


@dataclass
class SiteErrors:
    """Attributes:
    sites: activation -> role, layer (None outside the layers), bits, SQNR in dB of its own rounding (None if it rounds
        nothing), share of values clipped, smallest and largest value seen, and the ends of its range.
    histograms: activation -> ``low`` and ``high``, the ends of the bins, and counts ``before`` and ``after`` rounding.
    chosen: the activation whose distribution is shown first; None without any.
    tokens: how many were read.
    """

    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: str | None = None
    tokens: int = 0

    def worst(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The sites with the lowest SQNR."""
        found = [(name, site) for name, site in self.sites.items() if site["sqnr_db"] is not None]
        return sorted(found, key=lambda item: item[1]["sqnr_db"])[:count]


class _Site:
    def __init__(self, quantizer: Quantizer):
        self.quantizer = quantizer
        self.signal = self.noise = 0.0
        self.clipped = self.count = 0
        self.low, self.high = math.inf, -math.inf
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        grid = quantizer.spec.grid
        self.ends = ((grid.qmin - zero) * scale, (grid.qmax - zero) * scale)

    def __call__(self, module: Any, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].detach().double()
        seen = torch.isfinite(x)  # masked scores are minus infinity
        values, rounded = x[seen], output.detach().double()[seen]
        if not values.numel():
            return
        self.signal += float(values.square().sum())
        self.noise += float((values - rounded).square().sum())
        slack = (self.ends[1] - self.ends[0]) * 1e-6
        self.clipped += int(((values < self.ends[0] - slack) | (values > self.ends[1] + slack)).sum())
        self.count += values.numel()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def result(self) -> dict[str, Any]:
        sqnr = 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None
        name = self.quantizer.spec.name.split(".layers.")
        layer = int(name[1].partition(".")[0]) if len(name) > 1 else None
        return {
            "role": self.quantizer.spec.role,
            "layer": layer,
            "bits": self.quantizer.spec.bits,
            "sqnr_db": sqnr,
            "clipped": self.clipped / max(self.count, 1),
            "seen": [self.low, self.high] if self.count else None,
            "range": list(self.ends),
        }


def measure_sites(
    checkpoint: Path, text: str, *, seq_len: int = 128, tokens: int = 1024, histogram: str | None = None
) -> SiteErrors:
    """Run the simulation on the first ``tokens`` tokens of a text, in windows of ``seq_len``.

    Raises:
        ValueError: a text shorter than one window, or an unknown name for ``histogram`` (names the nearest).
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = token_ids(model, tokenizer, text)
    if len(ids) < seq_len:
        raise ValueError(f"the text has {len(ids)} tokens, one window {seq_len}: give more text or lower seq_len")
    windows = ids[: max(seq_len, min(len(ids), tokens) // seq_len * seq_len)].view(-1, seq_len)
    names = set(plan_of(model, model.config.quantization_config).activations)
    with simulated(model):
        quantizers = {m.spec.name: m for m in model.modules() if isinstance(m, Quantizer) and m.spec.name in names}
        if histogram is not None:
            lookup("activation", quantizers, histogram)
        sites = {name: _Site(quantizer) for name, quantizer in quantizers.items()}
        handles = [quantizers[name].register_forward_hook(site) for name, site in sites.items()]
        _read(model, windows, "read sites")
        for handle in handles:
            handle.remove()
        found = {name: site.result() for name, site in sites.items()}
        counts = {name: _Histogram(found[name]) for name in quantizers}
        handles = [quantizers[name].register_forward_hook(count) for name, count in counts.items()]
        _read(model, windows[:2], "distributions")
        for handle in handles:
            handle.remove()
    result = SiteErrors(found, {name: count.result() for name, count in counts.items()}, histogram, windows.numel())
    if histogram is None and (worst := result.worst(1)):
        result.chosen = worst[0][0]
    return result


@torch.no_grad()
def _read(model: Any, windows: Tensor, description: str) -> None:
    for window in progress_bar(windows.split(1), description, unit="window"):
        model(input_ids=window, use_cache=False)


class _Histogram:
    """Counts in bins that cover what was seen and the range."""

    def __init__(self, site: dict[str, Any]):
        low, high = site["seen"] or site["range"]
        self.low, self.high = min(low, site["range"][0]), max(high, site["range"][1])
        self.before, self.after = torch.zeros(BINS), torch.zeros(BINS)

    def __call__(self, module: Any, args: tuple[Tensor], output: Tensor) -> None:
        for counts, x in ((self.before, args[0]), (self.after, output)):
            values = x.detach().float().flatten()
            # what was rounded to an end of the range may lie beyond it by a rounding of float32
            seen = values[torch.isfinite(values)].clamp(self.low, self.high)
            counts += torch.histc(seen, BINS, self.low, self.high)

    def result(self) -> dict[str, Any]:
        before, after = (counts.int().tolist() for counts in (self.before, self.after))
        return {"low": self.low, "high": self.high, "before": before, "after": after}
