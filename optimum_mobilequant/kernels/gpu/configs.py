"""Which tile a kernel works on: a table for each architecture, kind of product and number of rows.

The rows are estimates from the size of the memories and the number of bytes that must be under way to fill the memory
bus; none was measured on a GPU. :mod:`.autotune` measures and remembers better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

OLDEST = (8, 0)
# Each product and each sum is rounded, so that floats come out the same whatever the compiler could fuse.
EXACT = {"enable_fp_fusion": False}
# Bytes of shared memory that a program may use.
SHARED_MEMORY = {"sm80": 163 * 1024, "sm89": 99 * 1024, "sm90": 227 * 1024}
# Weights and activations; "w4" alone: 16-bit floating-point activations. "-groups": a scale or multiplier for each
# group of columns, whose sums need registers of their own.
KINDS = ("w8a8", "w4a8", "w4a8-groups", "w4", "w4-groups")


@dataclass(frozen=True)
class Config:
    """How a product is cut.

    Args:
        block_n, block_m: output channels and rows of a tile. warps, stages: of Triton; stages are for blocks of 128
            columns.
        parts: the columns are cut in up to this many parts (decode kernel); 0: the persistent kernel for many rows.
    """

    block_n: int
    block_m: int
    warps: int
    stages: int
    parts: int = 0

    def options(self, block: int) -> dict[str, int | bool]:
        """Triton's options; with blocks of another width fewer stages, in about the same memory."""
        stages = self.stages if block <= 128 else max(2, self.stages // 2)
        return {"num_warps": self.warps, "num_stages": stages, **EXACT}


@dataclass(frozen=True)
class Row:
    """A configuration for up to ``most_rows`` rows of activations (None: any number)."""

    most_rows: int | None
    config: Config


# Two warps on Hopper's decode tiles: four would make a warp group, whose instruction wants the activations, whose top
# bits are flipped on the way, in shared memory again.
_DECODE80 = (Row(16, Config(64, 16, 4, 6, 8)), Row(32, Config(64, 32, 4, 5, 8)), Row(64, Config(64, 64, 4, 4, 4)))
_DECODE90 = (Row(16, Config(32, 16, 2, 8, 8)), Row(32, Config(64, 32, 2, 6, 8)), Row(64, Config(64, 64, 2, 5, 4)))
_FLOAT = (Row(16, Config(64, 16, 4, 5, 8)), Row(32, Config(64, 32, 4, 4, 8)), Row(64, Config(64, 64, 4, 3, 4)))
# Two sets of sums, a group's and the total: smaller tiles where they would not fit the registers.
_GROUPS = (_FLOAT[0], Row(32, Config(32, 32, 2, 4, 8)), _FLOAT[2])
_GROUPS90 = (*_DECODE90[:2], Row(64, Config(32, 64, 2, 5, 4)))

TABLE: dict[str, dict[str, tuple[Row, ...]]] = {
    "sm80": {
        "w8a8": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 128, 8, 4))),
        "w4a8": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 128, 8, 4))),
        "w4a8-groups": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 64, 8, 4))),
        "w4": (*_FLOAT, Row(256, Config(64, 64, 4, 3)), Row(None, Config(128, 128, 8, 3))),
        "w4-groups": (*_GROUPS, Row(256, Config(64, 64, 4, 3)), Row(None, Config(128, 64, 8, 3))),
    },
    "sm89": {
        "w8a8": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 128, 8, 3))),
        "w4a8": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 128, 8, 3))),
        "w4a8-groups": (*_DECODE80, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 64, 8, 4))),
        "w4": (*_FLOAT, Row(256, Config(64, 64, 4, 3)), Row(None, Config(128, 128, 8, 2))),
        "w4-groups": (*_GROUPS, Row(256, Config(64, 64, 4, 3)), Row(None, Config(128, 64, 8, 3))),
    },
    "sm90": {
        "w8a8": (*_DECODE90, Row(256, Config(64, 64, 4, 5)), Row(None, Config(128, 128, 8, 5))),
        "w4a8": (*_DECODE90, Row(256, Config(64, 64, 4, 5)), Row(None, Config(128, 128, 8, 5))),
        "w4a8-groups": (*_GROUPS90, Row(256, Config(64, 64, 4, 5)), Row(None, Config(128, 64, 8, 4))),
        "w4": (*_FLOAT, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 128, 8, 4))),
        "w4-groups": (*_GROUPS, Row(256, Config(64, 64, 4, 4)), Row(None, Config(128, 64, 8, 4))),
    },
}


def architecture(capability: tuple[int, int]) -> str:
    """The rows of the table for a GPU: its own, or those of the nearest older one with as much shared memory.

    Args:
        capability: compute capability, at least :data:`OLDEST`.
    """
    if capability[0] == 9:
        return "sm90"
    # 8.6, 8.9 and 12.x have 99 KiB for a program; 10.x has more than 8.0.
    return "sm80" if capability in ((8, 0), (8, 7)) or capability[0] in (10, 11) else "sm89"


def bucket(arch: str, kind: str, rows: int) -> Row:
    """The row of the table for a number of rows of activations."""
    return next(row for row in TABLE[arch][kind] if row.most_rows is None or rows <= row.most_rows)


@dataclass(frozen=True)
class Cut:
    """How the columns of one call are cut: ``parts`` of ``blocks`` blocks each (the last may have fewer)."""

    parts: int
    blocks: int


# Programs that a multiprocessor should have to work on, and blocks that a part should have.
_WAVES, _LEAST_BLOCKS = 2, 4


def cut(config: Config, tiles: int, blocks: int, processors: int) -> Cut:
    """Parts of the columns: as many as give every multiprocessor work, none too short to be worth its start."""
    wanted = max(1, _WAVES * processors // tiles)
    parts = min(wanted, config.parts, max(1, blocks // _LEAST_BLOCKS))
    each = -(-blocks // parts)
    return Cut(-(-blocks // each), each)
