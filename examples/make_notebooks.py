"""Writes the notebooks of this folder and executes them, outputs included.

    python examples/make_notebooks.py     (needs nbformat, nbclient and ipykernel)

They are kept as text here because a notebook's own format hides what changed.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK_START = [
    "# Quick start\n\nFrom a float model to a 4-bit one that writes text, on the embedded model, on a CPU.",
    """from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from optimum_mobilequant import MobileQuantConfig, perplexity
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts

transformers_logging.disable_progress_bar()
MODEL = "demo_model"  # a folder or a name on the Hub""",
    "## Quantize\n\n`w4a8`: 4-bit weights, 8-bit activations. The text is the standard library of this Python;\n"
    "the parts for calibration and evaluation are disjoint.",
    """config = MobileQuantConfig("w4a8", dataset="python-stdlib", effort="light")
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
recorded = model.config.quantization_config.recorded
{name: round(value, 4) for name, value in recorded["validation_perplexity"].items()}""",
    "## Compare on text that calibration has not seen",
    """tokenizer = AutoTokenizer.from_pretrained(MODEL)
text = "\\n".join(stdlib_texts("test"))[:20_000]
float_model = AutoModelForCausalLM.from_pretrained(MODEL)
before, after = (perplexity(m, tokenizer, text, progress=False).perplexity for m in (float_model, model))
print(f"float {before:.3f}, w4a8 {after:.3f}: {after / before - 1:+.2%}")
print(f"{float_model.get_memory_footprint() / 1e6:.1f} MB -> {model.get_memory_footprint() / 1e6:.1f} MB")""",
    "## Save, load, write",
    """model.save_pretrained("model-w4a8")
tokenizer.save_pretrained("model-w4a8")
model = AutoModelForCausalLM.from_pretrained("model-w4a8")
ids = tokenizer("    def __init__(self, name, value=None):\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0]))""",
]
TO_PHONE = [
    "# From checkpoint to phone\n\nA W8A8 checkpoint becomes ONNX graphs with static integers and QNN encodings.\n"
    "Compiling for a chip is a command (`mobilequant export --to genie`); it needs Qualcomm's packages.",
    """from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from optimum_mobilequant import MobileQuantConfig, compare, export, inspect_checkpoint
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts

transformers_logging.disable_progress_bar()
MODEL = "demo_model\"""",
    "## A checkpoint for the chip\n\n`target` checks the plan against the chip's rules before anything is computed.",
    """settings = {"recipe": "smoothquant-edge", "effort": "none", "target": "qnn_htp"}
config = MobileQuantConfig("w8a8", dataset="python-stdlib", **settings)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
model.save_pretrained("model-w8a8")
AutoTokenizer.from_pretrained(MODEL).save_pretrained("model-w8a8")
listing = inspect_checkpoint("model-w8a8")
print(len(listing.rows), "tensors with an encoding;", listing.totals["file_bytes"], "bytes")""",
    "## ONNX, and QNN's form of it",
    """for target in ("onnx", "qnn"):
    result = export("model-w8a8", target, f"exported/{target}", context=128, prompt_length=32)
    print(target, sorted(result.files)[:4], f"{sum(result.files.values()) / 1e6:.1f} MB")""",
    "## Is it the same model?\n\nThe exported graph in float64 against the executor that uses integers alone:",
    """text = "\\n".join(stdlib_texts("test"))[:20_000]
found = compare("model-w8a8", text, onnx="exported/onnx", onnx_float64=True, seq_len=64, tokens=256, progress=False)
for name in ("integer/simulate", "onnx/integer", "onnx_float64/integer"):
    pair = found.pairs[name]
    print(f"{name:<22} equal codes {pair.equal:8.3%}   same most likely token {pair.argmax:8.2%}")""",
]
NOTEBOOKS = {"quick_start": QUICK_START, "to_phone": TO_PHONE}


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    for name, cells in NOTEBOOKS.items():
        book = nbformat.v4.new_notebook()
        for index, text in enumerate(cells):
            make = nbformat.v4.new_markdown_cell if index % 2 == 0 else nbformat.v4.new_code_cell
            cell = make(text)
            cell["id"] = f"{name}-{index}"
            book.cells.append(cell)
        NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(HERE)}}).execute()
        for cell in book.cells:  # times of execution and warnings of this machine say nothing to a reader
            cell.metadata.clear()
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(book, HERE / f"{name}.ipynb")
        print(HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
