"""Genie's configuration files, from a model's own facts.

The keys are those of the configuration schema of Genie 1.21. What Genie computes itself was compared with the model:
it puts the BOS of the configuration before a prompt and ignores the tokenizer's own post-processing; it quantizes its
rotary tables to the encoding of the graph's inputs, for each kind of :data:`ROPE_KINDS` to within one code of the
model's; it reads ``rope-theta`` as an integer, and needs a pad token where there is no end of text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from .targets import Soc

# Cores that a dialog may use on phones (Qualcomm's own setting), and threads for what the NPU does not do.
_CPU_MASK, _THREADS = "0xe0", 3
_LARGEST_THETA = 2**31 - 1


@dataclass(frozen=True)
class Vocabulary:
    """Special tokens as Genie wants them.

    Args:
        bos: put before every prompt; None if the tokenizer puts none.
        eos: any of these ends the text.
        pad: fills the prompt graph; never seen by another token.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int


def read_vocabulary(checkpoint: Path, model: PreTrainedModel) -> Vocabulary:
    """Special tokens of a checkpoint's tokenizer and generation config.

    Raises:
        ValueError: no ``tokenizer.json``, a token that the model does not have, or a tokenizer that adds more than one
            BOS, which Genie could not imitate.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"no tokenizer.json in {str(checkpoint)!r}, the only kind of tokenizer that Genie reads: save the model's "
            "fast tokenizer there with tokenizer.save_pretrained"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    added = tokenizer("a")["input_ids"]
    if added == plain:
        bos = None
    elif len(added) == len(plain) + 1 and added[1:] == plain:
        bos = int(added[0])
    else:
        raise ValueError(
            f"the tokenizer makes {added} of 'a' and {plain} without special tokens; Genie puts at most one token "
            "before a prompt and none after it: save a tokenizer that adds no other"
        )
    generation: Any = getattr(model, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    given = getattr(model.config, "eos_token_id", None) if given is None else given
    eos = () if given is None else tuple(int(t) for t in (given if isinstance(given, Sequence) else [given]))
    stated = getattr(model.config, "pad_token_id", None)
    # A pad token of -1 is how some configurations say that there is none.
    usable = [t for t in (stated, *eos, bos, 0) if t is not None and t >= 0]
    size = int(model.config.get_text_config().vocab_size)
    for token in (*eos, *(() if bos is None else (bos,)), usable[0]):
        if not 0 <= token < size:
            raise ValueError(f"special token {token} lies outside the model's vocabulary of {size}")
    return Vocabulary(bos, eos, usable[0])


def _default(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _linear(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope-type": "linear", "factor": rope["factor"]}


def _llama3(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope-type": "llama3",
        "factor": rope["factor"],
        "low-freq-factor": rope["low_freq_factor"],
        "high-freq-factor": rope["high_freq_factor"],
        "original-max-position-embeddings": rope["original_max_position_embeddings"],
    }


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    other = {"mscale", "mscale_all_dim"} & {key for key, value in rope.items() if value is not None}
    if other or not rope.get("truncate", True):
        raise ValueError(f"yarn with {', '.join(sorted(other)) or 'truncate=False'} is not among what Genie computes")
    factor = rope["factor"]
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rope-type": "yarnrope",
        "factor": factor,
        "original-max-position-embeddings": rope["original_max_position_embeddings"],
        "beta-fast": rope.get("beta_fast") or 32.0,
        "beta-slow": rope.get("beta_slow") or 1.0,
        "extrapolation-factor": 1.0,
        "attn-factor": (rope.get("attention_factor") or usual) / usual,  # Genie multiplies the usual one itself
    }


# transformers' rope_type -> Genie's rope-scaling; empty for none.
ROPE_KINDS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_settings(model: PreTrainedModel, facts: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys for the backend's QnnHtp block, and for the model's ``positional-encoding`` block; one of them is empty.

    Raises:
        ValueError: a kind of rotary embedding that Genie does not compute, or a base that is no 31-bit integer.
    """
    rope: Mapping[str, Any] = model.config.get_text_config().rope_parameters
    kind, theta, half = rope.get("rope_type", "default"), float(rope["rope_theta"]), facts["rotary_dims"] // 2
    if kind not in ROPE_KINDS:
        raise ValueError(f'Genie computes no rotary embedding of type "{kind}"; known: {", ".join(ROPE_KINDS)}')
    if theta != int(theta) or not 1 <= theta <= _LARGEST_THETA:
        raise ValueError(
            f"rope_theta {theta} is no whole number up to {_LARGEST_THETA}, which is all that Genie reads"
        )
    scaling = ROPE_KINDS[kind](rope)
    if not scaling:
        return {"pos-id-dim": half, "rope-theta": int(theta)}, {}
    if kind == "yarn":
        scaling["dim"] = 2 * half
    return {}, {"type": "rope", "rope-dim": half, "rope-theta": int(theta), "rope-scaling": scaling}


def genie_config(
    facts: Mapping[str, int],
    vocabulary: Vocabulary,
    rope: tuple[dict[str, Any], dict[str, Any]],
    *,
    context: int,
    binaries: Sequence[str],
    extensions: str,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """``genie_config.json`` for a phone.

    Args:
        facts: of the integer graph.
        rope: of :func:`rope_settings`.
        binaries: context binaries; extensions: backend extensions. File names, relative to the working directory.
        sampling: of :func:`sampler`.
    """
    backend, positions = rope
    htp = {
        "version": 1,
        "use-mmap": True,
        "spill-fill-bufsize": 0,
        "mmap-budget": 0,
        "poll": True,
        "cpu-mask": _CPU_MASK,
        "kv-dim": facts["head_dim"],
        "allow-async-init": False,
        **backend,
    }
    eos: int | list[int] = -1 if not vocabulary.eos else list(vocabulary.eos)
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": {
                "version": 1,
                "size": context,
                "n-vocab": facts["vocabulary"],
                "bos-token": -1 if vocabulary.bos is None else vocabulary.bos,
                "eos-token": eos[0] if isinstance(eos, list) and len(eos) == 1 else eos,
                "pad-token": vocabulary.pad,
            },
            "sampler": {"version": 1, **sampling},
            "tokenizer": {"version": 1, "path": "tokenizer.json"},
            "engine": {
                "version": 1,
                "n-threads": _THREADS,
                "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": htp, "extensions": extensions},
                "model": {
                    "version": 1,
                    "type": "binary",
                    "binary": {"version": 1, "ctx-bins": list(binaries)},
                    **({"positional-encoding": positions} if positions else {}),
                },
            },
        }
    }


def sampler(checkpoint: Path) -> dict[str, Any]:
    """The model's own way of sampling, from its ``generation_config.json``; greedy where that does not sample."""
    path = checkpoint / "generation_config.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not given.get("do_sample"):
        return {"seed": 42, "temp": 1.0, "top-k": 1, "top-p": 1.0, "greedy": True}
    chosen = {"temp": given.get("temperature"), "top-k": given.get("top_k"), "top-p": given.get("top_p")}
    known = {key: value for key, value in chosen.items() if value is not None}
    return {"seed": 42, "temp": 1.0, "top-k": 50, "top-p": 1.0, **known}  # transformers' own defaults


def backend_extensions(chip: Soc, *, shared: bool) -> dict[str, Any]:
    """``htp_backend_ext_config.json``: the device, and whether a binary's graphs share their weights."""
    cores = [{"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}]
    return {
        "devices": [{"soc_model": chip.soc_model, "dsp_arch": chip.dsp_arch, "cores": cores}],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": shared},
    }
