"""Export a checkpoint to ONNX and to QNN's form, and check the ONNX files against the integers.

python examples/export.py --checkpoint model-w8a8 --text eval.txt --out exported
"""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum_mobilequant import compare, export

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--out", type=Path, default=Path("exported"))
parser.add_argument("--context", type=int, default=128)
args = parser.parse_args()

for target in ("onnx", "qnn"):
    result = export(args.checkpoint, target, args.out / target, context=args.context, prompt_length=args.context // 4)
    print(f"{target}: {len(result.files)} files, {sum(result.files.values()) / 1e6:.2f} MB in {result.path}")

text = args.text.read_text(encoding="utf-8")
options = {"seq_len": args.context // 2, "tokens": 4 * args.context}
found = compare(args.checkpoint, text, onnx=args.out / "onnx", onnx_float64=True, **options)
for name in ("onnx/integer", "onnx_float64/integer"):
    print(f"{name:<22} equal codes {found.pairs[name].equal:.4%}, same token {found.pairs[name].argmax:.2%}")
