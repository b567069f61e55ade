"""Orthogonal matrices to start rotations from."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix, entries +1 and -1, float64 ``[n, n]``, or None where these constructions reach no such size.

    Sylvester's doubling of the smallest core that fits: 1, Paley's first (q + 1, q = 3 mod 4) and second construction
    (2 (q + 1), q = 1 mod 4), q prime. That covers the widths that models have, e.g. 576 = 36 * 16, 896 = 28 * 32,
    1536 = 12 * 128, 2560 = 20 * 128.
    """
    for doublings in range(n.bit_length(), -1, -1):
        core, rest = divmod(n, 2**doublings)
        if rest or (base := _core(core)) is None:
            continue
        for _ in range(doublings):
            base = torch.cat([torch.cat([base, base], 1), torch.cat([base, -base], 1)])
        return base
    return None


def _core(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n - 1):  # n - 1 = 3 mod 4
        jacobsthal, one = _jacobsthal(n - 1), torch.ones(n - 1, dtype=torch.float64)
        out = torch.eye(n, dtype=torch.float64)
        out[0, 1:] += one
        out[1:, 0] -= one
        out[1:, 1:] += jacobsthal
        return out
    if n % 4 == 0 and (q := n // 2 - 1) % 4 == 1 and _is_prime(q):
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1.0
        conference[1:, 1:] = _jacobsthal(q)
        plus, minus = (torch.tensor(t, dtype=torch.float64) for t in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Quadratic character of i - j modulo the prime ``q``."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(q) ** 2 % q] = 1.0
    character[0] = 0.0
    i = torch.arange(q)
    return character[(i[:, None] - i[None, :]) % q]


def rotation(n: int, seed: int, *, keeps_mean: bool = False) -> Tensor:
    """A seeded orthogonal matrix that spreads every coordinate over all others, float64 ``[n, n]``.

    A Hadamard matrix times random signs, divided by sqrt(n) (QuaRot, Ashkboos et al. 2024); a random orthogonal matrix
    where there is none of that size.

    Args:
        keeps_mean: map the vector of ones to itself, so that subtracting the mean commutes with the rotation (as
            LayerNorm needs).
    """
    generator = torch.Generator().manual_seed(seed)
    if keeps_mean:
        # A reflection takes the first axis to the ones; around it, the other n - 1 axes turn freely.
        ones = torch.full((n,), n**-0.5, dtype=torch.float64)
        normal = ones.clone()
        normal[0] -= 1.0
        square = normal.dot(normal).clamp(min=1e-30)
        frame = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(normal, normal) / square
        inner = torch.eye(n, dtype=torch.float64)
        inner[1:, 1:] = _random_orthogonal(n - 1, generator)
        return frame @ inner @ frame.T
    if (base := hadamard(n)) is not None:
        signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return base * signs * n**-0.5
    return _random_orthogonal(n, generator)


def _random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # the sign makes the distribution uniform and the result unique
