"""The two ``.aimet`` folders that the qnn target writes, checked before anything is sent.

    prompt_ar128_cl2048.aimet/   one .onnx, at most one .data, one .encodings, nothing else
    token_ar1_cl2048.aimet/
    io_spec.json                 inputs and outputs of each graph as integers

A folder's name is its graph's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IO_SPEC = "io_spec.json"
# Integer types of graph inputs and outputs that AI Hub's data sets can hold.
DTYPES = ("int8", "uint8", "int16", "uint16", "int32")
_BLOCK = 2**22  # bytes


@dataclass(frozen=True)
class IOTensor:
    """An input or output of a compiled graph: ``real = (code - zero_point) * scale``.

    Args:
        name, shape: as in the ONNX file.
        dtype: numpy's name of the integer type, one of :data:`DTYPES`.
        scale, zero_point: None for plain integers such as token ids.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class GraphFolder:
    """One graph that can be sent.

    Args:
        name: of the graph, and of the folder without ``.aimet``.
        path: the folder.
        inputs, outputs: in the order of the ONNX graph.
        digest: BLAKE2b, hexadecimal, of the folder's files and of inputs and outputs.
    """

    name: str
    path: Path
    inputs: tuple[IOTensor, ...]
    outputs: tuple[IOTensor, ...]
    digest: str

    def archive(self, folder: Path) -> Path:
        """A zip with the folder as its one top entry, in ``folder``; deflated at the quickest level.

        Raises:
            OSError: no space, or a file cannot be read.
        """
        path = folder / f"{self.path.name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in _files(self.path):
                archive.write(file, f"{self.path.name}/{file.name}")
        return path


def read_folders(folder: Path) -> tuple[GraphFolder, ...]:
    """Every graph in ``folder``, in the order of its ``io_spec.json``.

    Raises:
        FileNotFoundError: no ``io_spec.json``, or a graph in it without a folder.
        ValueError: a folder that AI Hub would refuse, a folder that ``io_spec.json`` does not know, or a damaged
            ``io_spec.json``.
    """
    spec = folder / IO_SPEC
    if not spec.is_file():
        raise FileNotFoundError(f"no {IO_SPEC} in {folder}: give a folder written by the qnn target")
    try:
        listed = json.loads(spec.read_text(encoding="utf-8"))["graphs"]
        described = {name: (_tensors(io["inputs"]), _tensors(io["outputs"]), io) for name, io in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{spec} is damaged ({type(error).__name__}: {error}): export with the qnn target again"
        ) from error
    if not described:
        raise ValueError(f"{spec} lists no graph: export with the qnn target again")
    if unknown := sorted({p.stem for p in folder.glob("*.aimet")} - described.keys()):
        raise ValueError(f"{folder} holds {', '.join(unknown)}.aimet, which {IO_SPEC} does not list: take it out")
    return tuple(_graph(folder / f"{name}.aimet", *parts) for name, parts in described.items())


def _graph(path: Path, inputs: tuple[IOTensor, ...], outputs: tuple[IOTensor, ...], io: Any) -> GraphFolder:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing, though {IO_SPEC} lists it: export with the qnn target again")
    counts = {suffix: len(list(path.glob(f"*{suffix}"))) for suffix in (".onnx", ".data", ".encodings")}
    wrong = counts[".onnx"] != 1 or counts[".encodings"] != 1 or counts[".data"] > 1
    if wrong or sum(counts.values()) != len(list(path.iterdir())):
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise ValueError(
            f"AI Hub takes one .onnx, one .encodings, at most one .data and nothing else, but {path} holds {found}"
        )
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(io, sort_keys=True).encode())
    for file in _files(path):
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            digest.update(block)
    return GraphFolder(path.stem, path, inputs, outputs, digest.hexdigest())


def _tensors(rows: list[Mapping[str, Any]]) -> tuple[IOTensor, ...]:
    tensors = []
    for row in rows:
        name, shape, dtype = str(row["name"]), tuple(row["shape"]), row["dtype"]
        scale, zero_point = row.get("scale"), row.get("zero_point")
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"{name} has the shape {list(shape)}")
        if (scale is None) != (zero_point is None) or (scale is not None and not (math.isfinite(scale) and scale > 0)):
            raise ValueError(f"{name} has the scale {scale} and the zero point {zero_point}")
        tensors.append(IOTensor(name, shape, dtype, scale, zero_point))
    return tuple(tensors)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file())


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            yield block


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder in ``out`` for files that are half sent or half fetched, removed at the end.

    Beside the results, because the system's own temporary folder may be too small for a model. Its name is always the
    same, so that what a killed run left is removed by the next.
    """
    folder = out / ".transfer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
