"""Speed and weight memory of W8A8 and W4A8 on a model shape, beside other ways to run it: random weights, one process.

    python benchmarks/speed.py --shape tinyllama
    python benchmarks/speed.py --shape tinyllama --layers 4 --threads 2 --against bf16,quanto,torchao --json

For each preset a quantized model with random integers is written to a temporary folder and given to
``optimum_mobilequant.bench.compare_speed``, which times it and its peers by turns; ratios are medians of the
repetitions' own ratios. Weights exceed the cache at the shapes offered; the peers run the same rounded weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from random_model import random_quantized, tinyllama
from table import cpu_name
from transformers import LlamaConfig
from transformers.utils import logging

from optimum_mobilequant.bench import check_installed, compare_speed
from optimum_mobilequant.prepare import versions


def small(layers: int = 2) -> LlamaConfig:
    """Runs in no time; lies in the cache, so its speeds say nothing."""
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip


SHAPES = {"tinyllama": tinyllama, "small": small}
# How a ratio to a peer is called in the result.
_CALLED = {"bf16": "bf16", "bf16-compile": "bf16_compile", "quanto": "quanto_int{bits}", "torchao": "torchao_int8",
           "onnxruntime": "onnxruntime"}  # fmt: skip


def measure(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """One preset: speeds, their ratios to each peer, and resident weights over those of bfloat16."""
    shape = SHAPES[args.shape]
    config = shape(args.layers) if args.layers else shape()
    with tempfile.TemporaryDirectory(prefix="mobilequant-speed-") as folder:
        random_quantized(config, preset).save_pretrained(folder)
        sizes = {name: getattr(args, name) for name in ("prompt", "tokens", "repeat", "threads")}
        found = compare_speed(folder, args.against, **sizes)
    own = found["contenders"]["mobilequant"]
    result: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        result[phase] = {"tokens_per_s": own[f"{phase}_tokens_per_s"]}
        for peer, ratios in found["ratios"].items():
            result[phase]["vs_" + _CALLED[peer].format(bits=found["weight_bits"])] = ratios[phase]
    result["resident_weight_ratio"] = found["ratios"]["bf16"]["resident_weights"]
    result["load_average"] = found["load_average"]
    result["contenders"] = found["contenders"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tinyllama")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--presets", default="w8a8,w4a8", metavar="NAMES", help="separated by commas")
    parser.add_argument("--against", default="bf16,quanto", metavar="NAMES", help="peers; bf16 is always among them")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.against = list(dict.fromkeys(["bf16", *(name for name in args.against.split(",") if name)]))
    check_installed(args.against)
    result: dict[str, Any] = {preset: measure(args, preset) for preset in args.presets.split(",")}
    result["about"] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "versions": versions(),
        **{name: getattr(args, name) for name in ("shape", "layers", "threads", "prompt", "tokens", "repeat")},
    }
    text = json.dumps(result, indent=2)
    if args.json:
        print(text)
    else:
        for preset in args.presets.split(","):
            for phase in ("prefill", "decode"):
                cells = ", ".join(f"{name} {value:.2f}" for name, value in result[preset][phase].items())
                print(f"{preset:<6}{phase:<8} {cells}")
            print(f"{preset:<6}resident weights over bf16: {result[preset]['resident_weight_ratio']:.3f}")
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
