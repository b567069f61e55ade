"""``mobilequant eval``."""

from __future__ import annotations

import argparse

from .common import AddCommand, check_model, load, positive, print_json, read_text


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("eval", "Measure the perplexity of a float model or of a quantized checkpoint.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("model", metavar="MODEL_OR_CHECKPOINT", help="folder of a saved model, or a Hub id")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens in a window (256)")
    parser.add_argument("--bos", action="store_true", help="begin each window with the tokenizer's BOS token")
    parser.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")


def run_command(args: argparse.Namespace) -> int:
    model_name = check_model(args.model)
    text = read_text(args.text)

    from optimum_mobilequant.evaluate.perplexity import perplexity  # the package import registers the method

    model, tokenizer = load(model_name, dtype="auto")
    result = perplexity(model, tokenizer, text, seq_len=args.seq_len, bos=args.bos)
    values = {key: getattr(result, key) for key in ("perplexity", "word_perplexity", "tokens", "seconds")}
    if args.json:
        print_json(values)
    else:
        for key, value in values.items():
            print(f"{key.replace('_', ' '):<18}{value if isinstance(value, int) else format(value, '.6g')}")
    return 0
