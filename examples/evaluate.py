"""Float and quantized model side by side: perplexity, agreement of the most likely token, a greedy sample of each.

python examples/evaluate.py --float org/model --checkpoint model-w4a8 --text eval.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import compare

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--float", dest="float_model", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--seq-len", type=int, default=128)
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--prompt", default="Once there was")
args = parser.parse_args()

text = args.text.read_text(encoding="utf-8")
found = compare(args.checkpoint, text, float_model=args.float_model, seq_len=args.seq_len, tokens=args.tokens)
for name, runner in found.runners.items():
    print(f"{name:<10} perplexity {runner.perplexity:.4f}")
for name, pair in found.pairs.items():
    print(f"{name:<20} same most likely token {pair.argmax:.2%}, SQNR {pair.sqnr_db:.1f} dB")

tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
ids = tokenizer(args.prompt, return_tensors="pt")
for name in (args.float_model, args.checkpoint):
    model = AutoModelForCausalLM.from_pretrained(name)
    print(f"{name}: {tokenizer.decode(model.generate(**ids, max_new_tokens=16, do_sample=False)[0])!r}")
