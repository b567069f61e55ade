"""QWeight: integer weights in optimum-quanto's own state-dict layout. The only file that imports quanto.

A quanto tensor subclass cannot be cast, deep-copied or offloaded once it is a parameter; so the integers stay plain
tensors under quanto's key names, and :meth:`QWeight.as_quanto` builds the subclass on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..numerics import Grid, dequantize
from ..numerics.groups import groups_of, spread
from ..numerics.packing import pack_int4, pack_planes, unpack_int4, unpack_int4_rows, unpack_planes, unpack_planes_rows
from ..plan import WeightRule


class CodesHolder(Protocol):
    """Keeps the codes of a weight in a kernel's layout while :class:`QWeight` keeps none."""

    def codes(self) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor: ...


class _Packed(nn.Module):
    """Holds ``_data``, what :func:`~..numerics.packing.pack_int4` returns."""

    def __init__(self, data: Tensor):
        super().__init__()
        self._data = nn.Parameter(data, requires_grad=False)


class QWeight(nn.Module):
    """Integer weight of a linear, an embedding or a norm gain.

    State-dict keys (under ``<module>.weight.``):

    ========================  ==============================================================================
    8-bit symmetric           ``_data`` int8 [out, in], ``_scale`` float32 [out, 1]: quanto ``qint8``
    4-bit                     ``_data._data`` uint8 [ceil(out/2), in], ``_scale``, ``_shift`` uint8: quanto ``qint4``
    3-bit                     ``_planes`` uint8 [3, ceil(out/8), in], ``_scale``: no quanto type
    8-bit asymmetric          ``_codes`` int8 [out, in], ``_scale``, ``_zero_point`` int32 [out, 1]: no quanto type
    16-bit                    ``_codes`` int16 [out, in], ``_scale``: no quanto type
    4-bit with groups         ``_nibbles`` uint8 [ceil(out/2), in], ``_multiplier`` uint8 [out, groups], ``_scale``
    16-bit gain               ``_codes`` int16 [n], ``_scale`` float32 [1]
    ========================  ==============================================================================

    A per-tensor scale is repeated to [out, 1], as quanto's kernels expect. Asymmetric 3- and 16-bit weights have a
    ``_zero_point`` like 8-bit ones.

    Args:
        codes: signed codes, ``[out, in]`` or ``[n]``; values on ``Grid(rule.bits, signed=True)``.
        scale: float32 ``[out, 1]`` or ``[1]``. zero_point: int32, as scale.
        rule: bits, symmetry and groups.
        multiplier: uint8 ``[out, groups]`` of a weight with groups (``numerics.groups``).
    """

    _scale: Tensor
    _shift: Tensor
    _zero_point: Tensor
    _data: Any
    _codes: Tensor
    _planes: Tensor
    _nibbles: Tensor
    _multiplier: Tensor

    _holder: CodesHolder | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, rule: WeightRule, multiplier: Tensor | None = None
    ):
        super().__init__()
        self.rule = rule
        self.shape = torch.Size(codes.shape)
        if rule.group:
            assert multiplier is not None
            self._nibbles = nn.Parameter(pack_int4(codes), requires_grad=False)
            self.register_buffer("_multiplier", multiplier)
        elif codes.ndim == 2 and rule.bits == 4:
            self._data = _Packed(pack_int4(codes))
            self.register_buffer("_shift", (zero_point + 8).to(torch.uint8))
        else:
            name = "_data" if self.is_quanto else "_planes" if rule.bits == 3 else "_codes"
            stored = pack_planes(codes, 3) if rule.bits == 3 else codes.contiguous()
            setattr(self, name, nn.Parameter(stored, requires_grad=False))
            if not rule.symmetric:
                self.register_buffer("_zero_point", zero_point.to(torch.int32))
        self.register_buffer("_scale", scale.float())
        self._keep_by(None)
        self.generation = 0  # rises when the stored integers may have changed: what was packed from them is stale
        self._register_state_dict_hook(_insert_codes)
        self.register_load_state_dict_pre_hook(_take_back)

    @classmethod
    def empty(cls, shape: torch.Size, rule: WeightRule, device: Any) -> QWeight:
        """Placeholder with the right shapes and dtypes, to be filled by a checkpoint loader."""
        codes = torch.zeros(shape, dtype=Grid(rule.bits, signed=True).dtype, device=device)
        units = (shape[0], 1) if len(shape) == 2 else (1,)
        scale = torch.full(units, float("nan"), device=device)
        multiplier = None
        if rule.group:
            multiplier = torch.ones(shape[0], groups_of(shape[1], rule.group), dtype=torch.uint8, device=device)
        return cls(codes, scale, torch.zeros(units, dtype=torch.int32, device=device), rule, multiplier)

    @property
    def is_quanto(self) -> bool:
        """Whether the keys are a quanto tensor's own."""
        return (
            len(self.shape) == 2
            and not self.rule.group
            and (self.rule.bits == 4 or (self.rule.bits == 8 and self.rule.symmetric))
        )

    @property
    def scale(self) -> Tensor:
        """float32 ``[out, 1]`` or ``[1]``."""
        return self._scale

    @property
    def zero_point(self) -> Tensor:
        """int32, shape of :attr:`scale`, on the signed grid."""
        if self.rule.bits == 4 and len(self.shape) == 2 and not self.rule.group:
            return self._shift.to(torch.int32) - 8
        if self.rule.symmetric:
            return torch.zeros_like(self._scale, dtype=torch.int32)
        return self._zero_point

    @property
    def codes(self) -> Tensor:
        """Signed integer codes, ``shape`` of the float weight: what a row's scale multiplies. With groups they are
        8-bit, 4-bit code times multiplier."""
        if self._holder is not None:
            return self._holder.codes()
        if self.rule.group:
            return self.nibbles * spread(self._multiplier, self.rule.group, self.shape[1]).to(torch.int8)
        if self.rule.bits == 4 and len(self.shape) == 2:
            return unpack_int4(self._data._data, self.shape[0])
        if self.rule.bits == 3:
            return unpack_planes(self._planes, self.shape[0])
        return self._data if self.is_quanto else self._codes

    @property
    def nibbles(self) -> Tensor:
        """4-bit codes of a weight with groups, int8 ``[out, in]``."""
        if self._holder is not None:
            return self._divided(self._holder.codes())
        return unpack_int4(self._nibbles, self.shape[0])

    def _divided(self, codes: Tensor) -> Tensor:
        """4-bit codes of a weight with groups from its 8-bit ones."""
        return codes // spread(self._multiplier, self.rule.group or 0, self.shape[1]).to(torch.int8)

    @property
    def code_bits(self) -> int:
        """Bits of :attr:`codes`."""
        return 8 if self.rule.group else self.rule.bits

    @property
    def multiplier(self) -> Tensor:
        """Of a weight with groups, uint8 ``[out, groups]``."""
        return self._multiplier

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized weight (computed in float32)."""
        return dequantize(self.codes, self.scale, self.zero_point).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantized rows, float32 ``[*ids.shape, in]``, for an embedding, without touching the other rows."""
        if self._holder is not None:
            codes = self._holder.rows(ids)
        elif self.rule.bits == 4 and not self.rule.group:
            codes = unpack_int4_rows(self._data._data, ids, self.shape[0])
        elif self.rule.bits == 3:
            codes = unpack_planes_rows(self._planes, ids)
        else:
            codes = self.codes[ids]
        return dequantize(codes, self.scale[ids], self.zero_point[ids])

    @property
    def holder(self) -> CodesHolder | None:
        """What keeps the codes instead of this module, or None."""
        return self._holder

    def hand_over(self, holder: CodesHolder) -> None:
        """Give the codes away: from now on they are read from ``holder``, and kept nowhere else.

        The state dict keeps its keys and values.
        """
        self._keep_by(holder)
        owner, name = self._place
        setattr(owner, name, nn.Parameter(getattr(owner, name).new_empty(0), requires_grad=False))

    def _keep_by(self, holder: CodesHolder | None) -> None:
        # Past nn.Module: a holder may be a module, but it belongs to its linear, and the next one may be none.
        object.__setattr__(self, "_holder", holder)

    def take_back(self) -> None:
        """Keep the codes here again; nothing if they are."""
        if self._holder is not None:
            codes, (owner, name) = self._holder.codes(), self._place
            self._keep_by(None)
            setattr(owner, name, nn.Parameter(self._stored(codes), requires_grad=False))

    @property
    def _place(self) -> tuple[nn.Module, str]:
        """Module and name of the parameter that holds the codes."""
        if self.rule.group:
            return self, "_nibbles"
        if self.rule.bits == 4 and len(self.shape) == 2:
            return self._data, "_data"
        return self, "_data" if self.is_quanto else "_planes" if self.rule.bits == 3 else "_codes"

    def _stored(self, codes: Tensor) -> Tensor:
        """Codes in the layout of their parameter."""
        if self.rule.group:
            return pack_int4(self._divided(codes))
        if self.rule.bits == 4 and codes.ndim == 2:
            return pack_int4(codes)
        return pack_planes(codes, 3) if self.rule.bits == 3 else codes.contiguous()

    def as_quanto(self) -> Tensor:
        """This weight as an optimum-quanto tensor, sharing the integers.

        Raises:
            ValueError: 3-bit, 16-bit and asymmetric 8-bit weights, groups and norm gains have no quanto type.
        """
        from optimum.quanto import qint4, qint8
        from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

        state = {key: value.data for key, value in self.state_dict().items()}
        stride, missing = (self.shape[1] if len(self.shape) == 2 else 1, 1), []  # type: ignore[var-annotated]
        if not self.is_quanto:
            kind = self.rule.granularity if self.rule.group else f"symmetric={self.rule.symmetric}"
            raise ValueError(f"a {self.rule.bits}-bit weight with {kind} has no quanto type")
        if self.rule.bits == 4:
            tensor = WeightQBitsTensor.load_from_state_dict(state, "", qint4, 0, None, self.shape, stride, missing)
        else:
            tensor = WeightQBytesTensor.load_from_state_dict(
                state, "", qint8, 0, self.shape, stride, activation_qtype=None, missing_keys=missing
            )
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        return self._scale.dtype

    @property
    def device(self) -> torch.device:
        return self._scale.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QWeight:
        kept = self._scale
        if self._holder is not None and fn(kept.new_empty(0)).device != kept.device:
            self.generation += 1
            self.take_back()  # a kernel's layout belongs to one kind of device
        super()._apply(fn, recurse)
        if self._scale.dtype != torch.float32:  # a cast changes what the model computes in, never what is stored
            self._scale = kept.to(self._scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.rule.bits} bits, {'sym' if self.rule.symmetric else 'asym'}"


def _insert_codes(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook: the codes that a kernel holds, under the key they are stored by."""
    if module.holder is not None:
        owner, name = module._place
        key = prefix + ("_data._data" if isinstance(owner, _Packed) else name)
        state[key] = module._stored(module.codes)


def _take_back(module: Any, *args: Any) -> None:
    """Before a state dict is loaded: the tensors it is copied into."""
    module.generation += 1
    module.take_back()
