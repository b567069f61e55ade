"""Quantize a model, save it, and compare its perplexity with the float model's.

    python examples/quantize.py --model org/model --dataset calib.txt --text eval.txt --out model-w4a8

Without arguments: the embedded demo model, with the standard library of this Python as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import MobileQuantConfig, perplexity
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "demo_model"))
parser.add_argument("--preset", default="w4a8")
parser.add_argument("--recipe", help="by default the one of the effort")
parser.add_argument("--effort", default="light")
parser.add_argument("--dataset", default="python-stdlib")
parser.add_argument("--text", type=Path, help="held-out text (default: held-out part of the standard library)")
parser.add_argument("--out", default="model-quantized")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
config = MobileQuantConfig(args.preset, recipe=args.recipe, effort=args.effort, dataset=args.dataset)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(stdlib_texts("test"))[:20_000]
float_model = AutoModelForCausalLM.from_pretrained(args.model)
before = perplexity(float_model, tokenizer, text).perplexity
after = perplexity(model, tokenizer, text).perplexity
print(f"float {before:.4f}, {args.preset} {after:.4f} ({after / before - 1:+.2%}), saved in {args.out}")
