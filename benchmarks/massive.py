"""Give a small model what large ones grow by themselves: a massive activation at the first token that the rest needs.

Large language models turn the first token of a text into a constant vector hundreds of times larger than any other,
written by a unit of an early MLP, and use it as a place to park attention (Sun et al. 2024, "Massive activations in
large language models"). No static 8-bit range holds both that token and the others. Here one MLP unit is trained to
fire at position 0 alone, its output is made massive in one dimension of the residual stream, and all weights are
trained on while later layers attend to the token, so that the model depends on it.

    python benchmarks/massive.py examples/demo_model OUT --seed 0
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_mobilequant.data.sequences import token_stream
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.families import family_of, geometry_of

# What the unit's gate should be at position 0 and (negative) elsewhere before it is sharpened, and how much it is.
_MARGIN, _SHARPEN = 4.0, 4.0
_UP = 2.0
# Share of the steps that teach the unit to find the first token; the rest teach the model to live with the result.
_FINDING = 0.5


class _Plant:
    """The places in one model that carry the massive activation."""

    def __init__(self, model: PreTrainedModel, layer: int):
        self.model = model
        self.family = family_of(model)
        self.geometry = geometry_of(model, self.family)
        f = self.family
        if f.norm_kind != "rms":
            raise ValueError(f"a massive dimension becomes a constant vector under RMSNorm, {f.name} has LayerNorm")
        self.gate, self.up, self.down = (self._linear(f.layer(layer, p)) for p in (f.gate, f.up, f.down))
        self.later = range(layer + 1, self.geometry.layers)
        # The unit and the dimension that the model misses least.
        self.unit = int((self.down.weight.norm(dim=0) * self.up.weight.norm(dim=1)).argmin())
        self.dim = int(model.get_submodule(f.embedding).weight.norm(dim=0).argmin())
        self.planted, self.height = False, 0.0

    def _linear(self, path: str) -> Any:
        return self.model.get_submodule(path)

    @contextmanager
    def watched(self) -> Any:
        """Collect gate and up of the unit, ``[batch, length]`` each."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _, args, output: seen.__setitem__(name, output[..., self.unit])

        hooks = [m.register_forward_hook(keep(n)) for n, m in (("gate", self.gate), ("up", self.up))]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def finding_loss(self, seen: dict[str, Tensor]) -> Tensor:
        """0 where the unit fires at position 0 alone, with the margin."""
        gate, up = seen["gate"], seen["up"]
        first = F.relu(_MARGIN - gate[:, 0]).mean() + F.relu(_UP - up[:, 0]).mean()
        rest = F.relu(gate[:, 1:] + _MARGIN)
        # The mean alone would leave the few tokens that look like a first one.
        return first + rest.square().mean() + rest.amax(1).mean()

    @torch.no_grad()
    def guess(self, ids: Tensor) -> None:
        """Start gate and up where least squares tells the first tokens from the others, both kinds counting alike."""
        seen: list[Tensor] = []
        hook = self.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        self.model(input_ids=ids, use_cache=False)
        hook.remove()
        first, rest = seen[0][:, 0], seen[0][:, 1:].flatten(0, 1)
        x = torch.cat([first, rest])
        weight = torch.cat([torch.full((len(part), 1), 1 / len(part)) for part in (first, rest)]).double()
        sign = torch.cat([torch.ones(len(first)), -torch.ones(len(rest))]).double()[:, None]
        square = x.T @ (x * weight)
        square += 1e-4 * square.trace() / len(square) * torch.eye(len(square), dtype=torch.double)
        for module, wanted in ((self.gate, sign * _MARGIN), (self.up, torch.full_like(sign, _UP))):
            solved = torch.linalg.solve(square, x.T @ (wanted * weight))
            module.weight[self.unit] = solved[:, 0].to(module.weight.dtype)

    @torch.no_grad()
    def silence(self) -> None:
        """Nothing but the unit may write the dimension, and the unit writes nothing else."""
        f, d = self.family, self.dim
        self.model.get_submodule(f.embedding).weight[:, d] = 0.0
        for i in range(self.geometry.layers):
            self._linear(f.layer(i, f.out)).weight[d] = 0.0
            self._linear(f.layer(i, f.down)).weight[d] = 0.0
        self.down.weight[:, self.unit] = 0.0
        if self.planted:
            self.down.weight[d, self.unit] = self.height
        for i in self.later:
            for part in (f.gate, f.up, f.value):
                self._linear(f.layer(i, part)).weight[:, d] = 0.0

    def behind(self) -> list[nn.Parameter]:
        """Parameters of everything behind the layer of the unit."""
        f = self.family
        paths = [*(f.layer(i) for i in self.later), f.final_norm, f.head]
        return [p for path in paths for p in self.model.get_submodule(path).parameters()]

    @torch.no_grad()
    def plant(self, ids: Tensor, product: float, residual: float) -> None:
        """Make the found unit massive and point the later layers' keys for it at their mean query."""
        self.gate.weight[self.unit] *= _SHARPEN
        queries: dict[int, Tensor] = {}

        def keep(i: int) -> Any:
            return lambda _, args, output: queries.__setitem__(i, output.flatten(0, 1).mean(0))

        f, g = self.family, self.geometry
        hooks = [self._linear(f.layer(i, f.query)).register_forward_hook(keep(i)) for i in self.later]
        with self.watched() as seen:
            self.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        before = float((F.silu(seen["gate"]) * seen["up"])[:, 0].mean())
        self.up.weight[self.unit] *= product / before
        self.height = residual / product
        self.planted = True
        for i in self.later:
            mean = queries[i].view(g.kv_heads, g.groups, g.head_dim).mean(1)
            gain = self.model.get_submodule(f.layer(i, f.input_norm)).weight[self.dim] + f.gain_offset
            mean = mean / mean.norm(dim=1, keepdim=True) * g.head_dim**0.5
            self._linear(f.layer(i, f.key)).weight[:, self.dim] = mean.flatten() / (gain * g.hidden**0.5)
        self.silence()


def plant_massive(
    model: PreTrainedModel,
    stream: Tensor,
    *,
    layer: int = 1,
    product: float = 4000.0,
    residual: float = 1000.0,
    steps: int = 160,
    batch: tuple[int, int] = (8, 128),
    rate: float = 2e-3,
    bos: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Train a massive activation at the first token into a float model, in place.

    Args:
        model: a float causal LM of a known family with RMSNorm.
        stream: int64 ``[tokens]``; the model learns from random pieces of it.
        layer: whose MLP writes the massive activation.
        product: value of the unit (what the down projection reads) at position 0.
        residual: value that it writes into one dimension of the residual stream.
        steps: optimiser steps in all. batch: sequences and tokens in each. rate: highest learning rate.
        bos: token that begins half of the pieces, so that the model knows it as a first token.
        seed: of the pieces.

    Returns:
        ``unit``, ``dimension``, ``layer`` and the last training ``loss``.

    Raises:
        ValueError: LayerNorm instead of RMSNorm. RuntimeError: the unit did not find the first token.
    """
    count, length = batch
    plant = _Plant(model, layer)
    generator = torch.Generator().manual_seed(seed)
    finding = round(_FINDING * steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = torch.zeros(())
    model.train()
    with torch.enable_grad():
        for step in tqdm(range(steps), desc="massive", disable=not progress, leave=False):
            if step == 0:
                plant.guess(_pieces(stream, 64 * count, 16, generator))
            if step == finding:
                plant.plant(_pieces(stream, count, length, generator), product, residual)
                trained = plant.behind()  # what finds the first token stays as it is
            if step in (0, finding):
                optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
            done = (step - finding) / (steps - finding) if step >= finding else step / finding
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done * 10 + 0.1) * (1.0 - 0.95 * done)
            # The first tokens of many short pieces teach more than those of a few long ones.
            shape = (count, length) if plant.planted else (4 * count, max(8, length // 4))
            ids = _pieces(stream, *shape, generator)
            if bos is not None:
                ids[::2, 0] = bos
            with plant.watched() as seen:
                logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (loss if plant.planted else loss + plant.finding_loss(seen)).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            model.zero_grad()
            plant.silence()
    model.eval()
    with torch.no_grad(), plant.watched() as seen:
        model(input_ids=_pieces(stream, 8 * count, 32, generator), use_cache=False)
    fired = F.silu(seen["gate"]) * seen["up"]
    # A text that begins with one token twice looks the same at both places, so the very largest value says nothing.
    first, rest = float(fired[:, 0].median()), float(fired[:, 1:].abs().flatten().quantile(0.99))
    if not first > 64 * rest:
        raise RuntimeError(
            f"the unit is {first:.3g} at first tokens and {rest:.3g} at others: it did not find the first token; "
            "give more steps"
        )
    found = {"layer": layer, "unit": plant.unit, "dimension": plant.dim, "first": first, "elsewhere": rest}
    return found | {"loss": loss.item()}


def _pieces(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a float model")
    parser.add_argument("out", help="folder for the changed model")
    parser.add_argument(
        "--dataset", help="text to train on; the part of the Python library kept for training if unset"
    )
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of it that are read")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--product", type=float, default=4000.0)
    parser.add_argument("--residual", type=float, default=1000.0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = args.dataset or stdlib_texts("train")
    stream = token_stream(texts, tokenizer, limit=args.tokens, bos=False).ids
    found = plant_massive(
        model, stream, layer=args.layer, product=args.product, residual=args.residual, steps=args.steps,
        rate=args.rate, bos=tokenizer.bos_token_id, seed=args.seed,
    )  # fmt: skip
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print({name: round(value, 3) for name, value in found.items()}, args.out)


if __name__ == "__main__":
    main()
