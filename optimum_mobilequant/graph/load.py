"""From a saved folder to its graph, whichever method quantized it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..hf_quantizer import METHOD, plan_of
from ..plan import Plan
from ..runtime import set_backend
from .build import build_graph
from .ir import Graph
from .quanto import QMAP, load_quanto

QUANTO = "quanto"


@dataclass(frozen=True)
class LoadedGraph:
    """A quantized model with its graph.

    Args:
        folder: where it lies; tokenizer and generation config are in it.
        method: ``"mobilequant"`` or ``"quanto"``.
        model: computes what the graph computes, in float32, in eval mode: the simulation of a checkpoint of this
            package, or the plain model with the dequantized weights.
        plan: names and roles of the tensors. Their encodings are the graph's.
        graph: the operations.
    """

    folder: Path
    method: str
    model: PreTrainedModel
    plan: Plan
    graph: Graph


def load_graph(checkpoint: Path) -> LoadedGraph:
    """Load a quantized model and lay out its graph.

    Args:
        checkpoint: a folder that this package saved, or ``QuantizedModelForCausalLM`` of optimum-quanto.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: a float model, or one of another method (names it); damaged files; a quanto model with quantized
            activations or with weights that are neither ``qint8`` nor ``qint4``.
    """
    method = method_of(checkpoint)
    if method == QUANTO:
        model, plan, source = load_quanto(checkpoint)
        return LoadedGraph(checkpoint, method, model, plan, build_graph(model, plan, source))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    set_backend(model, "simulate")  # who wants integers has the graph
    plan = plan_of(model, model.config.quantization_config)
    return LoadedGraph(checkpoint, method, model, plan, build_graph(model, plan))


def method_of(checkpoint: Path) -> str:
    """The method that quantized a folder, ``"mobilequant"`` or ``"quanto"``, from its small files alone.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: a float model or another method.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {str(checkpoint)!r}: give a folder that mobilequant saved")
    try:
        stored: Any = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        found = None if stored is None else stored["quant_method"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); download or save the checkpoint again") from error
    if found == METHOD:
        return METHOD
    if found in (None, QUANTO) and (checkpoint / QMAP).is_file():
        return QUANTO
    kind = "a float model" if found is None else f"quantized by {found!r}"
    hint = f"; a quanto model needs the {QMAP} that QuantizedModelForCausalLM saves" if found == QUANTO else ""
    raise ValueError(
        f"{str(checkpoint)!r} is {kind}: give a checkpoint that `mobilequant quantize` saved, or a weight-only "
        f"optimum-quanto model{hint}"
    )
