"""How the projections are written in the compressed-tensors format, and the config that says so.

Which schemes vLLM has kernels for was read in its source (``compressed_tensors.py``, 2026); nothing was run in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.pack import input_of
from ..plan import Plan


@dataclass(frozen=True)
class Scheme:
    """How one projection is written; every distinct one is a group of the config.

    Args:
        bits, symmetric: of the weight, which has one scale a row (a per-tensor one is repeated).
        input_bits: of the static input, or None for a float input.
    """

    bits: int
    symmetric: bool
    input_bits: int | None

    @property
    def served(self) -> bool:
        """Whether vLLM has a kernel for it."""
        return self.symmetric and self.input_bits in ((8, None) if self.bits == 8 else (None,))

    @property
    def packed(self) -> bool:
        """In int32 words (``pack-quantized``) rather than in bytes (``int-quantized``).

        vLLM takes static inputs with bytes and float inputs with words. Zero points in words are written by
        compressed-tensors 0.20 but not read back into transformers (the empty module gets them in another shape).
        """
        return self.symmetric and (self.bits == 4 or self.input_bits is None)

    def group(self, targets: list[str]) -> dict[str, Any]:
        """An entry of ``config_groups``."""
        activations = None
        if self.input_bits is not None:
            activations = _arguments(self.input_bits, symmetric=False, strategy="tensor")
        return {
            "targets": targets,
            "weights": _arguments(self.bits, symmetric=self.symmetric, strategy="channel"),
            "input_activations": activations,
            "output_activations": None,
            "format": self.format,
        }

    @property
    def format(self) -> str:
        return "pack-quantized" if self.packed else "int-quantized"


def _arguments(bits: int, *, symmetric: bool, strategy: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}


def choose_schemes(plan: Plan, *, all_inputs: bool) -> dict[str, Scheme]:
    """Projection -> scheme. The head is none of them: readers expect it as floats."""
    schemes = {}
    for path, spec in plan.weights.items():
        if spec.role in ("gain", "embedding", "head"):
            continue
        full = Scheme(spec.code_grid.bits, spec.rule.symmetric, plan.activations[input_of(plan, path)].bits)
        # Asymmetric weights have no kernel with or without the input, so nothing is gained by leaving it out.
        keep = all_inputs or full.served or not full.symmetric
        schemes[path] = full if keep else replace(full, input_bits=None)
    return schemes


def quantization_config(plan: Plan, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """The entry of ``config.json`` that readers go by."""
    distinct = list(dict.fromkeys(schemes.values()))
    formats = {scheme.format for scheme in distinct}
    groups = {}
    for i, scheme in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else _targets(plan, schemes, scheme)
        groups[f"group_{i}"] = scheme.group(targets)
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [plan.family.head],
        "kv_cache_scheme": None,
    }


def _targets(plan: Plan, schemes: dict[str, Scheme], scheme: Scheme) -> list[str]:
    """A pattern for each part of a layer that has this scheme throughout, names for the others."""
    f, targets = plan.family, []
    for part in (f.query, f.key, f.value, f.out, f.gate, f.up, f.down):
        paths = [f.layer(i, part) for i in range(plan.geometry.layers)]
        named = [path for path in paths if schemes[path] == scheme]
        targets += [f"re:.*\\.{re.escape(part)}$"] if named == paths else named
    return targets


def unserved(plan: Plan, schemes: dict[str, Scheme]) -> list[str]:
    """Projections that vLLM has no kernel for. It fuses q, k, v and gate, up: these must be written alike."""
    f, found = plan.family, [path for path, scheme in schemes.items() if not scheme.served]
    for i in range(plan.geometry.layers):
        for parts in ((f.query, f.key, f.value), (f.gate, f.up)):
            paths = [f.layer(i, part) for part in parts]
            if len({schemes[path] for path in paths}) > 1:
                found += [path for path in paths if path not in found]
    return found
