"""What the student should reproduce of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..numerics.fake import compiled_passes
from ..numerics.product import product
from ..numerics.recompute import recomputing
from ..plan import Plan
from .targets import Targets, entering, teacher_arithmetic

# Positions whose distributions are held at once: bounds memory for large vocabularies.
_BLOCK = 512

Objective = Callable[[nn.Module, nn.Module, Tensor], Tensor]  # student, teacher, ids -> loss


def kl_top_k(
    student: Tensor, teacher: Tensor, top_k: int, *, head: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean KL(teacher || student) over positions, on the teacher's ``top_k`` tokens plus one bucket for the tail.

    With ``top_k`` >= vocabulary this is the full divergence (KL-Top: OSTQuant, Hu et al. 2025, with the tail kept so
    that the student cannot move mass there for free).

    Args:
        student: logits ``[..., vocabulary]``.
        teacher: logits likewise; or, with ``head``, hidden states ``[..., hidden]`` that it maps to logits, a block of
            positions at a time, so that the teacher's logits are never in memory at once.

    Returns:
        0-dim float32, nats.
    """
    loss: Tensor = _KLTopK.apply(student.flatten(0, -2), teacher.flatten(0, -2), top_k, head)
    return loss


class _KLTopK(torch.autograd.Function):
    """The divergence and its gradient in one pass over blocks of positions: only the gradient is kept.

    With q the student's probabilities and r the bucket: ``d/d logit_j = q_j - p_j`` on the teacher's tokens and
    ``q_j (1 - p_r / q_r)`` in the tail.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, top_k: int, head: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        total = torch.zeros((), device=student.device)
        slope = torch.empty_like(student, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        compiled = compiled_passes(student, total) if top_k >= student.shape[-1] else None
        for start in range(0, len(student), _BLOCK):
            s, t = student[start : start + _BLOCK], teacher[start : start + _BLOCK]
            t = (t if head is None else head(t)).float()
            out = None if slope is None else slope[start : start + _BLOCK]
            if compiled is not None and s.is_contiguous():
                total += compiled.divergence(s, t.contiguous(), out)
                continue
            log_p, log_q = F.log_softmax(t, dim=-1), F.log_softmax(s.float(), dim=-1)
            if top_k >= log_p.shape[-1]:
                p = log_p.exp()
                if out is not None:
                    torch.exp(log_q, out=out)
                    out.sub_(p)
                total += p.mul_(log_p.sub_(log_q)).sum()  # kl_div, with the exponential at hand
            else:
                log_p, index = log_p.topk(top_k, dim=-1)
                heads_q = log_q.gather(-1, index)
                rest_p, rest_q = _log_rest(log_p), _log_rest(heads_q)
                if out is not None:
                    torch.exp(log_q, out=out)
                    out.mul_(1 - (rest_p - rest_q).exp()).scatter_(-1, index, heads_q.exp() - log_p.exp())
                log_p, log_q = torch.cat([log_p, rest_p], dim=-1), torch.cat([heads_q, rest_q], dim=-1)
                total += F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        ctx.save_for_backward(slope)
        ctx.dtype = student.dtype
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grads[0] / len(slope)).to(ctx.dtype), None, None, None


def _log_rest(log_p: Tensor) -> Tensor:
    rest = 1.0 - log_p.exp().sum(-1, keepdim=True)
    return rest.clamp(min=1e-7).log()


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error relative to the teacher's mean square (0-dim float32)."""
    teacher = teacher.float()
    return F.mse_loss(student.float(), teacher) / teacher.square().mean().clamp(min=1e-12)


def make_objective(
    name: str,
    plan: Plan,
    *,
    top_k: int,
    teacher_dtype: str = "float32",
    rows: Sequence[Tensor] = (),
    batch_size: int = 1,
    hidden_weight: float = 0.0,
) -> Objective:
    """The function (student, teacher, ids) -> loss.

    ``"logits_kl"``: :func:`kl_top_k`, on the whole vocabulary where selecting ``top_k`` would cost more than it saves.
    ``"hidden_mse"``: squared error after the last decoder layer, before the final
    norm, the objective of the published method (MobileQuant, section 3.3), here relative to the teacher's mean square.
    The teacher reads the plan's prefix tokens first; the student has them in its cache.

    Args:
        rows, batch_size: sequences on which the teacher is computed once; see :class:`.targets.Targets`.
        hidden_weight: of ``"logits_kl"``: weight of the relative squared error of what enters the head, added where
            gradients are taken; what is validated is the divergence alone. That looks at the directions that matter
            for the texts at hand; hidden states hold the others (hints of hidden layers: Romero et al. 2015).
    """
    family = plan.family
    if plan.geometry.vocabulary <= 4 * top_k:
        top_k = plan.geometry.vocabulary
    place = family.head if name == "logits_kl" else family.final_norm
    targets = Targets(place, rows, batch_size=batch_size, dtype=teacher_dtype, prefix=plan.prefix)

    def logits_kl(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
        target = targets(teacher, ids)

        def head(hidden: Tensor) -> Tensor:
            with teacher_arithmetic(ids.device, teacher_dtype):
                last = teacher.get_submodule(family.head)
                if isinstance(last, nn.Linear) and teacher_dtype == "float32":
                    return product(hidden, last.weight, last.bias)
                logits: Tensor = last(hidden)
            return logits

        with recomputing(), entering(student, family.head) as hidden:
            logits = student(input_ids=ids, use_cache=False).logits
            loss = kl_top_k(logits, target, top_k, head=head)
            if hidden_weight and torch.is_grad_enabled():
                loss = loss + hidden_weight * normalised_mse(hidden[0], target)
            return loss

    def hidden_mse(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
        target = targets(teacher, ids)
        with recomputing(), entering(student, family.final_norm) as hidden:
            student(input_ids=ids, use_cache=False)
            return normalised_mse(hidden[0], target)

    return {"logits_kl": logits_kl, "hidden_mse": hidden_mse}[name]
