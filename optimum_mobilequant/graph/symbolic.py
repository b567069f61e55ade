"""Sizes as polynomials in the symbols of the graph, with whole-number coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from .ir import BATCH, PAST, SEQUENCE, TOTAL, Dim

SYMBOLS = (BATCH, SEQUENCE, PAST)


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of symbols; ``terms`` maps the sorted factors of a product to its coefficient, never 0."""

    terms: Mapping[tuple[str, ...], int]

    @classmethod
    def of(cls, dim: Dim) -> Polynomial:
        """A number or a symbol; ``total`` is ``past + sequence``."""
        if isinstance(dim, int):
            return cls({(): dim} if dim else {})
        if dim == TOTAL:
            return cls({(PAST,): 1, (SEQUENCE,): 1})
        if dim not in SYMBOLS:
            raise ValueError(f"{dim!r} is no symbol of the graph; known: {', '.join((*SYMBOLS, TOTAL))}")
        return cls({(dim,): 1})

    @classmethod
    def size(cls, shape: Iterable[Dim], scale: int = 1) -> Polynomial:
        """``scale`` times the number of elements of a shape."""
        out = cls.of(scale)
        for dim in shape:
            out = out * cls.of(dim)
        return out

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for factors, coefficient in other.terms.items():
            terms[factors] = terms.get(factors, 0) + coefficient
        return Polynomial({f: c for f, c in terms.items() if c})

    def __mul__(self, other: Polynomial) -> Polynomial:
        out = Polynomial({})
        for left, a in self.terms.items():
            out = out + Polynomial({tuple(sorted(left + right)): a * b for right, b in other.terms.items()})
        return out

    def __call__(self, **symbols: int) -> int:
        """The value, e.g. ``size(batch=1, sequence=16, past=48)``."""
        return sum(c * prod(symbols[name] for name in factors) for factors, c in self.terms.items())

    def within(self, other: Polynomial) -> bool:
        """Whether no term exceeds the other's, so that no sizes (which are never negative) make this one larger."""
        return all(c <= other.terms.get(factors, 0) for factors, c in self.terms.items()) and all(
            c >= 0 for factors, c in other.terms.items() if factors not in self.terms
        )

    def __str__(self) -> str:
        def term(factors: tuple[str, ...], coefficient: int) -> str:
            parts = [] if coefficient == 1 and factors else [str(coefficient)]
            return "*".join(parts + list(factors))

        ordered = sorted(self.terms.items(), key=lambda item: (-len(item[0]), item[0]))
        return " + ".join(term(*item) for item in ordered) or "0"


@dataclass(frozen=True)
class Maximum:
    """The largest of several polynomials."""

    options: tuple[Polynomial, ...]

    @classmethod
    def of(cls, options: Iterable[Polynomial]) -> Maximum:
        """Without those that another one always reaches."""
        kept: list[Polynomial] = []
        for option in options:
            if not any(option.within(other) for other in kept):
                kept = [other for other in kept if not other.within(option)] + [option]
        return cls(tuple(kept))

    def __call__(self, **symbols: int) -> int:
        return max((option(**symbols) for option in self.options), default=0)

    def __str__(self) -> str:
        texts = [str(option) for option in self.options]
        return texts[0] if len(texts) == 1 else f"max({', '.join(texts)})"
