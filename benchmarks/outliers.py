"""Give a small model the activation outliers of a large one, without changing what it computes.

Models of billions of parameters have a few channels whose activations are tens of times larger than the rest, which
is what makes static 8-bit activations hard; models of a few million do not. Here a few norm gains and a few rows of
the up projection are multiplied, and the columns that read them divided: the float function stays, the ranges do not.

    python benchmarks/outliers.py MODEL OUT --factor 30 --share 0.03 --seed 0
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_mobilequant.families import family_of, geometry_of
from optimum_mobilequant.transform import edges_of

# Norm outputs and the product of gate and up: the activations that are 8-bit and read by several large matrices.
SITES = ("norm_qkv", "norm_mlp", "up_down")


@torch.no_grad()
def inject_outliers(
    model: PreTrainedModel, *, factor: float = 30.0, share: float = 0.03, least: int = 2, seed: int = 0
) -> dict[str, list[int]]:
    """Multiply a few channels of each site of a float model, in place, and divide their readers.

    Args:
        model: a float causal LM of a known family.
        factor: how much larger the channels become.
        share: part of each site's channels that grow; at least ``least`` do.
        seed: of the choice.

    Returns:
        edge name -> the channels that grew.
    """
    family = family_of(model)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[int]] = {}
    for edge in edges_of(family, geometry_of(model, family), SITES):
        channels = torch.randperm(edge.size, generator=generator)[: max(least, round(share * edge.size))]
        chosen[edge.name] = sorted(channels.tolist())
        for effect in edge.effects:
            module = model.get_submodule(effect.module)
            # An edge divides its producers (sign -1) by the scale; here the producers grow.
            scale = torch.ones(edge.size, dtype=torch.float64)
            scale[channels] = factor ** -float(effect.sign)
            if effect.index is not None:
                scale = scale[effect.index]
            if effect.dim == "columns":
                _multiply(module.weight, scale)
                continue
            is_gain = module.weight.ndim == 1
            _multiply(module.weight, scale if is_gain else scale[:, None], family.gain_offset if is_gain else 0.0)
            if getattr(module, "bias", None) is not None:
                _multiply(module.bias, scale)
    return chosen


def _multiply(parameter: Any, scale: torch.Tensor, offset: float = 0.0) -> None:
    """``parameter + offset`` is what the model multiplies with (Gemma's gains are stored minus 1)."""
    parameter.copy_((parameter.double() + offset) * scale.to(parameter.device) - offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a float model")
    parser.add_argument("out", help="folder for the changed model")
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    chosen = inject_outliers(model, factor=args.factor, share=args.share, seed=args.seed)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{sum(map(len, chosen.values()))} channels at {len(chosen)} sites multiplied by {args.factor}: {args.out}")


if __name__ == "__main__":
    main()
