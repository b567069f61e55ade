"""Speed and weight memory of W8A8 and W4A8 on a model shape, beside other ways to run it: random weights, one process.

    python benchmarks/speed.py --shape tinyllama
    python benchmarks/speed.py --shape tinyllama --layers 4 --threads 2 --against bf16,quanto,torchao --json
    python benchmarks/speed.py --shape tinyllama --presets w4a8 --against onnxruntime-int4 --out s.json --append

For each preset a quantized model with random integers is written to a temporary folder and given to
``optimum_mobilequant.bench.compare_speed``, which times it and its peers by turns; ratios are medians of the
repetitions' own ratios. Weights exceed the cache at the shapes offered; the peers run the same rounded weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from random_model import random_quantized, tinyllama
from table import cpu_name
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from optimum_mobilequant.bench import check_installed, compare_speed
from optimum_mobilequant.bench.peers import fast_dtype
from optimum_mobilequant.run.prepare import versions


def small(layers: int = 2) -> LlamaConfig:
    """Runs in no time; lies in the cache, so its speeds say nothing."""
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip


_CONDITIONS = ("shape", "layers", "backend", "threads", "prompt", "tokens")
SHAPES = {"tinyllama": tinyllama, "small": small}
# How a ratio to a peer is called in the result.
_CALLED = {"quanto": "quanto_int{bits}", "torchao": "torchao_int8_dynamic"}


def ratio_to(peer: str, bits: int) -> str:
    """How the ratio to a peer is called."""
    return "vs_" + _CALLED.get(peer, peer.replace("-", "_")).format(bits=bits)


def bfloat16_bytes(config: LlamaConfig) -> int:
    """What the weights of the float model take."""
    with torch.device("meta"):
        return sum(2 * parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def measure(args: argparse.Namespace, preset: str, known: dict[str, Any]) -> dict[str, Any]:
    """One preset: speeds, their ratios to each peer, and resident weights over those of bfloat16.

    Args:
        known: what was measured of it before; its peers are left out, and the others are added to it.
    """
    shape = SHAPES[args.shape]
    config = shape(args.layers) if args.layers else shape()
    peers = [name for name in args.against if name not in known.get("contenders", {})]
    if not peers:
        return known
    with tempfile.TemporaryDirectory(prefix="mobilequant-speed-") as folder:
        random_quantized(config, preset, backend=args.backend).save_pretrained(folder)
        sizes = {name: getattr(args, name) for name in ("prompt", "tokens", "repeat", "threads", "apart")}
        found = compare_speed(folder, peers, **sizes)
    own = found["contenders"]["mobilequant"]
    result: dict[str, Any] = {name: dict(known.get(name, {})) for name in ("prefill", "decode")}
    for phase in ("prefill", "decode"):
        result[phase].setdefault("tokens_per_s", own[f"{phase}_tokens_per_s"])
        for peer, ratios in found["ratios"].items():
            result[phase][ratio_to(peer, found["weight_bits"])] = ratios[phase]
    result["resident_weight_ratio"] = own["resident_weight_bytes"] / bfloat16_bytes(config)
    result["load_average"] = known.get("load_average", []) + [found["load_average"]]
    # The checkpoint's own row is that of the first run; ratios are of turns within one run.
    result["contenders"] = found["contenders"] | known.get("contenders", {})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tinyllama")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--presets", default="w8a8,w4a8", metavar="NAMES", help="separated by commas")
    parser.add_argument("--backend", default="auto", help="of the quantized model, as in set_backend")
    parser.add_argument("--against", default="bf16,quanto", metavar="NAMES", help="peers, separated by commas")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--apart", action="store_true", help="one peer at a time: at most two models in memory")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON here")
    parser.add_argument("--append", action="store_true", help="add the peers that the file of --out does not have yet")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.against = list(dict.fromkeys(name for name in args.against.split(",") if name))
    check_installed(args.against)
    result: dict[str, Any] = {}
    if args.out is not None and args.out.exists():
        if not args.append:
            raise SystemExit(f"{args.out} exists: give another --out, or --append to add peers")
        result = json.loads(args.out.read_text(encoding="utf-8"))
    conditions = {name: getattr(args, name) for name in _CONDITIONS}
    about = {"cpu": cpu_name(), "fast_dtype": str(fast_dtype()).removeprefix("torch."), **conditions}
    if "about" in result and {name: result["about"][name] for name in about} != about:
        raise SystemExit(f"{args.out} was measured with {result['about']}, not {about}: give another --out")
    for preset in args.presets.split(","):
        result[preset] = measure(args, preset, result.get(preset, {}))
    result["about"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "repeat": args.repeat,
        **about,
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
