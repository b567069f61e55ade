"""Saved tiny checkpoints and their exports, made once in a test run."""

import functools
import tempfile
from pathlib import Path

import torch

from optimum_mobilequant import quantize as quantize_model
from optimum_mobilequant.exporters import export
from optimum_mobilequant.exporters.source import Source, open_checkpoint
from optimum_mobilequant.numerics import quantize
from tests import tiny

CONTEXT, PROMPT = 32, 8
_FOLDER = tempfile.TemporaryDirectory(prefix="onnx-tests-")


def checkpoint(variant: str = "llama-gqa", preset: str = "w8a8") -> Path:
    """Folder of a tiny quantized model; ``"w8a8+shift"`` is the preset ``"w8a8"`` with shifted keys."""
    path = Path(_FOLDER.name) / f"{variant}-{preset}"
    if not path.exists():
        name, _, shift = preset.partition("+")
        config = tiny.config(name, key_shift=bool(shift))
        quantize_model(tiny.build(variant), None, config).save_pretrained(path)
    return path


@functools.cache
def source(variant: str = "llama-gqa", preset: str = "w8a8") -> Source:
    return open_checkpoint(checkpoint(variant, preset))


def exported(variant: str = "llama-gqa", preset: str = "w8a8") -> Path:
    """The same, exported to ONNX with all graphs."""
    path = Path(_FOLDER.name) / f"{variant}-{preset}-onnx"
    if not path.exists():
        export(checkpoint(variant, preset), "onnx", path, context=CONTEXT, prompt_length=PROMPT, dynamic=True)
    return path


@torch.no_grad()
def simulated_codes(variant: str, preset: str, ids: torch.Tensor) -> torch.Tensor:
    """Codes of the logits that the float simulation rounds to, int32."""
    model = source(variant, preset).model
    head = model.lm_head.output
    logits = model(input_ids=ids, use_cache=False).logits
    return quantize(logits, head.scale, head.zero_point, head.spec.grid).int()
