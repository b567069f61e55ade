"""The text of a model card, section by section. Nothing appears in it that was not recorded or read from the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from ..config.settings import Settings
from .base import Base
from .facts import Export, Facts
from .scores import Evaluation

_ARTICLE = "https://arxiv.org/abs/2408.13933"


def card_text(facts: Facts, repo_id: str, *, base: Base | None, license: str | None, exports: Sequence[Export]) -> str:
    """Markdown without metadata."""
    sections = [
        _title(facts, repo_id, base),
        _load(facts, repo_id),
        _method(facts),
        _bits(facts),
        _scores(facts),
        _size(facts, base),
        _exports(exports),
        _limits(facts, base, license),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(facts: Facts, repo_id: str, base: Base | None) -> str:
    origin = f"[{base.id}](https://huggingface.co/{base.id})" if base else "a float model"
    return (
        f"# {repo_id.rpartition('/')[2]}\n\n{origin} quantized to integers with [MobileQuant]({_ARTICLE}) by "
        f"optimum-mobilequant: {facts.config.resolve_scheme().summary}. Every activation has one static encoding for "
        "the whole tensor, residual sums and logits included, so that an NPU can compute the network in integers only."
    )


def _load(facts: Facts, repo_id: str) -> str:
    lines = [
        "import optimum_mobilequant  # before from_pretrained: it registers the method with transformers",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if facts.has_tokenizer else ''}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")',
    ]
    if facts.has_tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))",
        ]
    code = "\n".join(lines)
    return (
        f"## How to load it\n\n```bash\npip install optimum-mobilequant\n```\n\n```python\n{code}\n```\n\n"
        "Without the import, `from_pretrained` stops with an error about the size of a tensor."
    )


def _method(facts: Facts) -> str:
    config, recorded = facts.config, facts.config.recorded
    rows = [("preset", f"`{config.preset}`"), ("recipe", f"`{config.recipe}`"), ("effort", f"`{config.effort}`")]
    # What was set by hand on top of recipe and effort, which stand for the rest.
    names = [f.name for f in fields(Settings) if f.name not in ("recipe", "effort", "seed")]
    default = {f.name: f.default for f in fields(config)}
    chosen = {n: getattr(config, n) for n in names if getattr(config, n, None) not in (None, default.get(n))}
    chosen |= {"overrides": config.overrides} if config.overrides else {}
    rows += [(name, f"`{json.dumps(value)}`") for name, value in chosen.items()]
    rows.append(("seed", str(config.seed)))
    if facts.calibration:
        rows.append(("calibration text", facts.calibration))
    if (history := recorded.get("history")) and history[-1][0]:  # some recipes learn nothing
        rows.append(("learning", f"{history[-1][0]} steps, of which step {recorded.get('best_step')} was kept"))
    if versions := recorded.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return "## How it was made\n\n" + _table(("", ""), rows)


def _bits(facts: Facts) -> str:
    """Read from the stored tensors, so that overrides show."""
    found: dict[tuple[str, int], list[str]] = {}
    for row in facts.inspection.rows:
        roles = found.setdefault((row["kind"], row["bits"]), [])
        if row["role"] not in roles:
            roles.append(row["role"])
    kinds = {"weight": "weights", "bias": "biases", "activation": "activations", "prefix": "prefix", "shift": "shifts"}
    order = sorted(found, key=lambda key: (list(kinds).index(key[0]), key[1]))
    rows = [(f"{kinds[kind]}, {bits} bits", ", ".join(found[kind, bits])) for kind, bits in order]
    return _table(("integers", "tensors"), [(name, roles.replace("_", " ")) for name, roles in rows])


def _scores(facts: Facts) -> str:
    parts = [part for part in (_validation(facts), *map(_evaluation, facts.evaluations)) if part]
    if not parts:
        parts = ["None were recorded."]
    elif not any(evaluation.name.startswith("tasks:") for evaluation in facts.evaluations):
        parts.append("No downstream task was measured.")
    return "\n\n".join(["## Scores", *parts])


def _validation(facts: Facts) -> str:
    """Perplexity that the run itself measured."""
    values = facts.perplexity
    if "quantized" not in values:
        return ""
    learned = bool(facts.config.recorded.get("best_step"))
    names = {
        "float": "float model",
        "float_prefix": "float model behind the prefix",
        "start": "quantized, before learning",
        "quantized": "this checkpoint",
    }
    rows = []
    if not learned:
        names.pop("start")
    for key in [name for name in names if name in values]:
        gap = f"{values[key] / values['float'] - 1:+.2%}" if "float" in values and key != "float" else "-"
        rows.append((names[key], f"{values[key]:.4f}", gap))
    chosen = ", which also chose among the steps of learning" if learned else ""
    return (
        _table(("", "perplexity", "against float"), rows) + "\n\n"
        f"Measured on the validation sequences of the calibration text{chosen}, with the integers simulated in floats "
        "that hold them exactly."
    )


def _evaluation(evaluation: Evaluation) -> str:
    """One recorded call of ``mobilequant eval``."""
    rows = []
    for score in evaluation.scores:
        error = "" if score.error is None else f" ± {score.error:.4g}"
        row = [score.what, score.metric, f"{score.value:.6g}{error}"]
        if evaluation.against:
            other = score.other
            row += ["-", "-"] if other is None else [f"{other:.6g}", f"{score.value - other:+.4g}"]
        rows.append(tuple(row))
    kind = "task" if evaluation.name.startswith("tasks:") else "text"
    head = [kind, "metric", "this checkpoint"] + ([evaluation.against, "difference"] if evaluation.against else [])
    return f"{_table(head, rows)}\n\nMeasured on {evaluation.protocol}."


def _size(facts: Facts, base: Base | None) -> str:
    totals = facts.inspection.totals
    rows = [
        ("this checkpoint, safetensors files", _bytes(totals["file_bytes"])),
        ("bits for each parameter, scales included", f"{totals['bits_per_parameter']:.2f}"),
        ("parameters", f"{totals['parameters']:,}"),
    ]
    if base and base.weight_bytes:
        rows.insert(1, (f"{base.id}, safetensors files", _bytes(base.weight_bytes)))
    else:
        rows.insert(1, ("the same parameters as 16-bit floats (computed)", _bytes(2 * totals["parameters"])))
    return "## Size\n\n" + _table(("", ""), rows)


def _exports(exports: Sequence[Export]) -> str:
    if not exports:
        return ""
    rows = [(f"`{e.name}/`", e.record["target"], _bytes(e.size), e.checked or "not checked") for e in exports]
    return "## Exports\n\n" + _table(("folder", "target", "size", "how it was checked"), rows)


def _limits(facts: Facts, base: Base | None, license: str | None) -> str:
    context = f" The longest context is {facts.positions:,} tokens." if facts.positions else ""
    if license:
        terms = f"Licence: `{license}`."
    elif base and base.described:
        terms = "The float model's card names no licence, so none is stated here: ask its authors before you use it."
    else:
        terms = "The licence is not stated here: see the float model's."
    origin = f"[{base.id}](https://huggingface.co/{base.id})" if base else "the float model"
    return (
        "## Use and limits\n\n"
        "For text generation on integer hardware, after an export, and in transformers, which computes the same "
        "integers. It cannot be trained as it is: `model.dequantize()` gives a float model to fine-tune.\n\n"
        "- The ranges of the activations come from the calibration text and are fixed. Values beyond them are "
        f"clipped, so text of another kind or language may lose more than the scores show.{context}\n"
        f"- {terms} The terms, uses, biases and limits of {origin} apply to this model too."
    )


def _table(head: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(list(head)), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bytes(count: int) -> str:
    return f"{count:,} bytes" if count < 10**6 else f"{count / 10**6:,.1f} MB"
