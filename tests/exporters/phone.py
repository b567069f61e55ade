"""Checkpoints for the tests on Qualcomm's software, and how their results are compared."""

import functools
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_mobilequant import quantize
from tests import tiny

_FOLDER = tempfile.TemporaryDirectory(prefix="phone-tests-")
_SPECIAL = ["<pad>", "<s>", "</s>"]


def require_emulator() -> None:
    """Skip the calling module where the HTP emulator cannot run."""
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, which holds the HTP emulator, is not installed")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the HTP emulator runs on Linux x86-64 only", allow_module_level=True)


def byte_tokenizer(*, adds_bos: bool = False, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special tokens of the tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*_SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
    ids = [(token, _SPECIAL.index(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def checkpoint(
    variant: str = "llama-gqa",
    preset: str = "w8a8",
    *,
    adds_bos: bool = False,
    seed: int = 0,
    key_shift: bool = False,
) -> Path:
    """Folder of a tiny quantized model of two layers with a byte tokenizer."""
    model = tiny.build(variant, seed=seed, vocab_size=len(byte_tokenizer()))
    return save(model, preset, key_shift=key_shift, adds_bos=adds_bos)


def save(model, preset: str = "w8a8", *, key_shift: bool = False, **tokenizer: bool) -> Path:
    path = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    quantize(model, None, tiny.config(preset, key_shift=key_shift)).save_pretrained(path)
    byte_tokenizer(**tokenizer).save_pretrained(path)
    return path


@functools.cache
def demo_checkpoint(preset: str, *, key_shift: bool = False) -> Path:
    """The embedded trained model, rounded to nearest after a look at some of its own text."""
    source = tiny.ROOT / "examples" / "demo_model"
    path = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    config = tiny.config(preset, dataset="python-stdlib", samples=16, seq_len=128, key_shift=key_shift)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    quantize(AutoModelForCausalLM.from_pretrained(source), tokenizer, config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to quantization noise ratio."""
    expected, noise = expected.astype(float), found.astype(float) - expected.astype(float)
    return float(10 * np.log10((expected**2).sum() / max((noise**2).sum(), 1e-30)))
