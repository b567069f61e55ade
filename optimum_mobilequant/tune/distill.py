"""Losses of quantization-aware distillation: several teachers, features first, Squat's regularisers.

With p_k the distribution of teacher k, q the student's, T the temperature, and weights w_k that sum to 1:

    L = (1 - c) T^2 sum_k w_k KL(p_k^(1/T) || q^(1/T)) + c CE + a L_alignment + e L_entropy

Sources: knowledge distillation (Hinton et al. 2015); the mixture with the cross-entropy and both regularisers from
Squat / EdgeQAT (Shen et al. 2024, arXiv 2402.10787, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.settings import Settings
from ..nn import Mode, set_mode
from ..nn.prefix import logits_behind, prefix_states, prepend
from ..numerics.recompute import recomputing
from ..plan import Plan
from .objective import kl_top_k, normalised_mse
from .student import build_student

DistillationLoss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Terms:
    """Weights of the loss.

    Attributes:
        cross_entropy: share c of the cross-entropy with the text, in [0, 1].
        temperature: T of the divergence.
        alignment: weight a of :func:`alignment_loss`.
        entropy: weight e of :func:`entropy_loss`.
        token_share: share of the positions, the most important ones, at which the divergence is taken.
    """

    cross_entropy: float = 0.0
    temperature: float = 1.0
    alignment: float = 0.0
    entropy: float = 0.0
    token_share: float = 1.0

    @property
    def attention(self) -> bool:
        """Whether the loss looks into the attention."""
        return self.alignment > 0 or self.entropy > 0 or self.token_share < 1


def entropy_loss(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Negative entropy of queries and keys, ``-1/2 log(mean over layers of (E log(1 + Var q) + E log(1 + Var k)))``.

    The variance is taken over the channels of a head. A Gaussian of variance v has entropy 1/2 log(2 pi e v), so the
    loss falls as queries and keys spread over their grid. Means stand where the paper has sums, which only adds a
    constant. An epsilon keeps the outer logarithm finite where nothing varies.

    Args:
        pairs: by layer, rounded queries ``[batch, heads, length, head_dim]`` and keys ``[batch, kv_heads, ...]``.
    """
    spread = [torch.stack([x.float().var(-1, unbiased=False).log1p().mean() for x in pair]).sum() for pair in pairs]
    return -0.5 * torch.log(torch.stack(spread).mean() + 1e-6)


def alignment_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``1 - cosine`` of the attention maps before the softmax, averaged over heads and layers; 0 where they are equal.

    The published code adds ``log(sum of cosines)``, which falls as the maps grow apart; this is the sign that pulls
    them together. Hidden positions, of which no attention reads the scores, are left out.

    Args:
        student, teacher: by layer, scores ``[batch, heads, queries, keys]``.
    """
    losses = []
    for s, t in zip(student, teacher, strict=True):
        # Keys of a prefix stand before the first query and are visible to all.
        s, t = (x.float().tril(x.shape[-1] - x.shape[-2]).flatten(2) for x in (s, t))
        losses.append((1 - F.cosine_similarity(s, t, dim=-1)).mean())
    return torch.stack(losses).mean()


def important_tokens(scores: Sequence[Tensor], share: float) -> Tensor:
    """The ``share`` of positions of each sequence with the largest scores on the first key, over all heads and layers.

    Squat's token importance, which it averages over the batch and uses to choose bits; here it chooses the positions
    at which the student imitates the teacher.

    Args:
        scores: the teacher's, by layer, ``[batch, heads, length, length]``.

    Returns:
        bool ``[batch, length]``.
    """
    importance = sum(layer[:, :, :, 0].float().sum(1) for layer in scores)
    assert isinstance(importance, Tensor)
    count = max(1, round(share * importance.shape[1]))
    chosen = importance.topk(count, dim=1).indices
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, chosen, True)


def distillation_losses(
    model: nn.Module, plan: Plan, settings: Settings, teachers: Sequence[tuple[nn.Module, float]]
) -> dict[str, DistillationLoss]:
    """The losses (student, ids) -> 0-dim of the two phases of fine-tuning, by the name of their stage."""
    s = settings
    terms = Terms(s.cross_entropy, s.temperature, s.attention_alignment, s.attention_entropy, s.token_share)
    shared: Any = {"teacher_dtype": s.teacher_dtype}
    return {
        "features": make_feature_loss(model, plan, **shared),
        "finetune": make_distillation(model, plan, teachers, terms, top_k=s.top_k, **shared),
    }


def make_distillation(
    model: nn.Module,
    plan: Plan,
    teachers: Sequence[tuple[nn.Module, float]],
    terms: Terms,
    *,
    top_k: int,
    teacher_dtype: str = "float32",
) -> DistillationLoss:
    """The function (student, ids) -> loss.

    Args:
        model: the float model that the student was made of; its attention is what the regularisers compare with.
        teachers: modules with logits over the same vocabulary, and positive weights.
        top_k: see :func:`.objective.kl_top_k`; the whole vocabulary where selecting would cost more than it saves.
    """
    if plan.geometry.vocabulary <= 4 * top_k:
        top_k = plan.geometry.vocabulary
    total = sum(weight for _, weight in teachers)
    # The quantized attention, switched off, shows the float model's scores.
    reference = None
    if terms.alignment > 0 or terms.token_share < 1:
        reference = build_student(model, plan, prefix_states(model, plan.prefix) if plan.prefix else ())
    if reference is not None:
        set_mode(reference, Mode.OFF)

    @torch.no_grad()
    def targets(ids: Tensor) -> tuple[list[tuple[Tensor, float]], list[Tensor]]:
        scores: list[Tensor] = []
        if reference is not None:
            with _seen(reference, plan, ("scores",)) as seen:
                reference(input_ids=ids, use_cache=False)
            scores = seen["scores"]
        reduced = teacher_dtype != "float32"
        with torch.autocast(ids.device.type, getattr(torch, teacher_dtype), enabled=reduced):
            return [(logits_behind(t, plan.prefix, ids), weight / total) for t, weight in teachers], scores

    def loss_of(student: nn.Module, ids: Tensor) -> Tensor:
        logits_of_teachers, scores = targets(ids)
        with (
            recomputing(),
            _seen(student, plan, ("query_rotated", "key_rotated", "scores") if terms.attention else ()) as seen,
        ):
            logits = student(input_ids=ids, use_cache=False).logits
        where = important_tokens(scores, terms.token_share) if terms.token_share < 1 else None
        losses = []
        for target, weight in logits_of_teachers:
            pair = (logits, target) if where is None else (logits[where], target[where])
            if terms.temperature != 1:
                pair = (pair[0] / terms.temperature, pair[1] / terms.temperature)
            losses.append(weight * terms.temperature**2 * kl_top_k(*pair, top_k))
        loss = torch.stack(losses).sum() * (1 - terms.cross_entropy)
        if terms.cross_entropy > 0:
            text = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss = loss + terms.cross_entropy * text
        if terms.alignment > 0:
            loss = loss + terms.alignment * alignment_loss(seen["scores"], scores)
        if terms.entropy > 0:
            pairs = list(zip(seen["query_rotated"], seen["key_rotated"], strict=True))
            loss = loss + terms.entropy * entropy_loss(pairs)
        return loss

    return loss_of


def make_feature_loss(model: nn.Module, plan: Plan, *, teacher_dtype: str = "float32") -> DistillationLoss:
    """The function (student, ids) -> squared error of the hidden states behind every decoder layer, each relative to
    the float model's mean square, averaged over the layers."""

    def loss_of(student: nn.Module, ids: Tensor) -> Tensor:
        reduced = teacher_dtype != "float32"
        autocast = torch.autocast(ids.device.type, getattr(torch, teacher_dtype), enabled=reduced)
        with torch.no_grad(), autocast, _layers(model, plan) as target:
            model(input_ids=prepend(ids, plan.prefix), use_cache=False)
        target = [t[:, len(plan.prefix) :] for t in target]
        with _layers(student, plan) as hidden:
            student(input_ids=ids, use_cache=False)
        return torch.stack([normalised_mse(s, t) for s, t in zip(hidden, target, strict=True)]).mean()

    return loss_of


@contextmanager
def _layers(model: nn.Module, plan: Plan) -> Iterator[list[Tensor]]:
    """Collect what every decoder layer returns."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # The next norm of a student may round this tensor in place.
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    with ExitStack() as stack:
        for i in range(plan.geometry.layers):
            hook = model.get_submodule(plan.family.layer(i)).register_forward_hook(keep)
            stack.callback(hook.remove)
        yield seen


@contextmanager
def _seen(student: nn.Module, plan: Plan, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the quantizers ``names`` of every attention return, by name and in the order of the layers."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keeper(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, args, output: seen[name].append(output)

    with ExitStack() as stack:
        for i in range(plan.geometry.layers):
            attention = student.get_submodule(plan.family.layer(i, plan.family.attention))
            for name in names:
                hook = attention.get_submodule(name).register_forward_hook(keeper(name))
                stack.callback(hook.remove)
        yield seen
