"""Tiny models with a prefix, and one in which the first token is massive."""

import functools
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.massive import plant_massive
from optimum_mobilequant import quantize
from tests import tiny

PREFIX = [5, 7]
_FOLDER = tempfile.TemporaryDirectory(prefix="prefix-tests-")


def quantized(variant: str = "llama-gqa", preset: str = "w8a8", **options: object) -> PreTrainedModel:
    options = {"prefix": PREFIX} | options
    return quantize(tiny.build(variant), None, tiny.config(preset, **options))


def saved(variant: str = "llama-gqa", preset: str = "w8a8") -> Path:
    """Folder of a tiny quantized model with a prefix."""
    path = Path(_FOLDER.name) / f"{variant}-{preset}"
    if not path.exists():
        quantized(variant, preset).save_pretrained(path)
    return path


@functools.cache
def texts() -> list[list[int]]:
    """Texts in which the next token mostly follows from the last one."""
    generator = torch.Generator().manual_seed(1)
    jumps = torch.randint(3, tiny.VOCAB, (60 * 16,), generator=generator).tolist()
    keeps = (torch.rand(60 * 16, generator=generator) < 0.8).tolist()
    stream = [3]
    for jump, keep in zip(jumps, keeps, strict=True):
        stream.append((5 * stream[-1] + 7) % (tiny.VOCAB - 3) + 3 if keep else jump)
    return [stream[i : i + 16] for i in range(0, 60 * 16, 16)]


@functools.cache
def _massive_state() -> dict[str, torch.Tensor]:
    model = tiny.build("llama-gqa")
    stream = torch.tensor(sum(texts(), []))
    plant_massive(model, stream, layer=0, steps=600, batch=(8, 16), rate=1e-2, bos=1, progress=False)
    return model.state_dict()


def massive() -> PreTrainedModel:
    """The first token of every text is massive, and the second layer has learned to attend to it."""
    model = tiny.build("llama-gqa")
    model.load_state_dict(_massive_state())
    return model.eval()
