"""Give some layers more bits, by hand or under a budget, and see what it costs.

python examples/mixed_precision.py --model org/model --dataset calib.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "demo_model"))
parser.add_argument("--dataset", default="python-stdlib")
parser.add_argument("--samples", type=int, default=32)
args = parser.parse_args()

shared = {"dataset": args.dataset, "recipe": "rtn", "effort": "none", "samples": args.samples}
variants = {
    "w4a8": MobileQuantConfig("w4a8", **shared),
    "down projections at 8 bits": MobileQuantConfig("w4a8", overrides={"*.down_proj": {"weight_bits": 8}}, **shared),
    "5 bits on average": MobileQuantConfig("w4a8", bits="auto:5", **shared),
}
for name, config in variants.items():
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    values = model.config.quantization_config.recorded["validation_perplexity"]
    size = model.get_memory_footprint() / 1e6
    print(f"{name:<28}{size:8.2f} MB   float {values['float']:.4f}   quantized {values['quantized']:.4f}")
