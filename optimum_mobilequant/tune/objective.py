"""What the student should reproduce of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plan import Plan

# Positions whose distributions are held at once: bounds memory for large vocabularies.
_BLOCK = 512


def kl_top_k(student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
    """Mean KL(teacher || student) over positions, on the teacher's ``top_k`` tokens plus one bucket for the tail.

    With ``top_k`` >= vocabulary this is the full divergence (KL-Top: OSTQuant, Hu et al. 2025, with the tail kept so
    that the student cannot move mass there for free).

    Args:
        student, teacher: logits ``[..., vocabulary]``.

    Returns:
        0-dim float32, nats.
    """
    loss: Tensor = _KLTopK.apply(student.flatten(0, -2), teacher.flatten(0, -2), top_k)
    return loss


class _KLTopK(torch.autograd.Function):
    """The divergence and its gradient in one pass over blocks of positions: only the gradient is kept.

    With q the student's probabilities and r the bucket: ``d/d logit_j = q_j - p_j`` on the teacher's tokens and
    ``q_j (1 - p_r / q_r)`` in the tail.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        total = torch.zeros((), device=student.device)
        slope = torch.empty_like(student, dtype=torch.float32)
        for s, t, out in zip(student.split(_BLOCK), teacher.split(_BLOCK), slope.split(_BLOCK), strict=True):
            log_p, log_q = F.log_softmax(t.float(), dim=-1), F.log_softmax(s.float(), dim=-1)
            if top_k >= t.shape[-1]:
                out.copy_(log_q.exp() - log_p.exp())
            else:
                log_p, index = log_p.topk(top_k, dim=-1)
                out.copy_(log_q.exp())
                log_q = log_q.gather(-1, index)
                rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
                heads = log_q.exp() - log_p.exp()
                out.mul_(1 - (rest_p - rest_q).exp()).scatter_(-1, index, heads)
                log_p, log_q = torch.cat([log_p, rest_p], dim=-1), torch.cat([log_q, rest_q], dim=-1)
            total += F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        ctx.save_for_backward(slope)
        ctx.dtype = student.dtype
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * (grads[0] / len(slope))).to(ctx.dtype), None, None


def _log_rest(log_p: Tensor) -> Tensor:
    rest = 1.0 - log_p.exp().sum(-1, keepdim=True)
    return rest.clamp(min=1e-7).log()


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error relative to the teacher's mean square (0-dim float32)."""
    teacher = teacher.float()
    return F.mse_loss(student.float(), teacher) / teacher.square().mean().clamp(min=1e-12)


@contextmanager
def _last_hidden(model: nn.Module, plan: Plan) -> Any:
    """Collect what enters the final norm: the hidden states after the last decoder layer."""
    seen: list[Tensor] = []
    hook = model.get_submodule(plan.family.final_norm).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def make_objective(
    name: str, plan: Plan, *, top_k: int, teacher_dtype: str = "float32"
) -> Callable[[nn.Module, nn.Module, Tensor], Tensor]:
    """The function (student, teacher, ids) -> loss.

    ``"logits_kl"``: :func:`kl_top_k`, on the whole vocabulary where selecting ``top_k`` would cost more than it saves.
    ``"hidden_mse"``: squared error after the last decoder layer, before the final
    norm, the objective of the published method (MobileQuant, section 3.3), here relative to the teacher's mean square.
    """

    if plan.geometry.vocabulary <= 4 * top_k:
        top_k = plan.geometry.vocabulary

    @contextmanager
    def float_teacher(ids: Tensor) -> Any:
        # Targets are computed batch by batch and dropped: nothing is cached.
        reduced = teacher_dtype != "float32"
        with torch.no_grad(), torch.autocast(ids.device.type, getattr(torch, teacher_dtype), enabled=reduced):
            yield

    def logits_kl(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
        with float_teacher(ids):
            target = teacher(input_ids=ids, use_cache=False).logits
        return kl_top_k(student(input_ids=ids, use_cache=False).logits, target, top_k)

    def hidden_mse(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
        with float_teacher(ids), _last_hidden(teacher, plan) as target:
            teacher(input_ids=ids, use_cache=False)
        with _last_hidden(student, plan) as hidden:
            student(input_ids=ids, use_cache=False)
        return normalised_mse(hidden[0], target[0])

    return {"logits_kl": logits_kl, "hidden_mse": hidden_mse}[name]
