"""Calibrate on chats of your own, written with the model's chat template.

    python examples/custom_dataset.py --model org/model --chats chats.jsonl --out model-w8a8

A line of the file is a list of messages: [{"role": "user", "content": "..."}, ...].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import MobileQuantConfig

SIMPLE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # for a model without one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "demo_model"))
parser.add_argument("--chats", type=Path, help="a .jsonl file (default: a made-up one)")
parser.add_argument("--out", default="model-chat")
parser.add_argument("--seq-len", type=int, default=64)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
if tokenizer.chat_template is None:
    tokenizer.chat_template = SIMPLE
if args.chats:
    chats = [json.loads(line) for line in args.chats.read_text(encoding="utf-8").splitlines() if line.strip()]
else:
    chats = [
        [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"{i} + {i} = {2 * i}."}]
        for i in range(400)
    ]
texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
config = MobileQuantConfig("w8a8", dataset=texts, recipe="smoothquant-edge", effort="none", seq_len=args.seq_len)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
print(f"{len(texts)} chats; {model.config.quantization_config.recorded['data']}; saved in {args.out}")
