"""Whatever the user calls a dataset, as documents: texts or token ids, read as they are asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch

from ..lookup import unknown_name
from .stdlib_corpus import stdlib_texts

Document: TypeAlias = str | torch.Tensor  # a text, or its token ids as int64 [tokens]

BUILT_IN = ("python-stdlib",)
SELF = "self"  # the model that is quantized writes the text
CALIBRATION = "calibration"  # of fine-tuning: the text that the rest of the run reads
FILE_TYPES = (".txt", ".jsonl", ".parquet")
_COLUMNS = ("text", "input_ids")  # tried in this order when no column is named
_PIECE = 2**16  # characters that are read and tokenised at once
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def dataset_kind(dataset: Any) -> str:
    """``"none"``, ``"name"``, ``"record"``, ``"texts"``, ``"ids"`` or ``"table"`` (a ``datasets.Dataset``).

    Only the first element is looked at. A record is what [`dataset_record`] left of a dataset in a saved config.

    Raises:
        ValueError: none of these, or empty.
    """
    if dataset is None:
        return "none"
    if isinstance(dataset, (str, Path)):
        return "name"
    if isinstance(dataset, Mapping):
        if "kind" in dataset:
            return "record"
        raise ValueError(
            f"dataset is a mapping of {sorted(map(str, dataset))}; pick one of them, e.g. dataset['train']"
        )
    if hasattr(dataset, "column_names"):
        return "table"
    if isinstance(dataset, torch.Tensor):
        dataset = list(dataset) if dataset.dim() == 2 else [None]
    if isinstance(dataset, (list, tuple)):
        if not dataset:
            raise ValueError("dataset is empty; give texts, a file or a dataset name")
        if isinstance(dataset[0], str):
            return "texts"
        if isinstance(dataset[0], (list, tuple)) or getattr(dataset[0], "ndim", None) == 1:
            return "ids"
    raise ValueError(
        f"a dataset cannot be a {type(dataset).__name__}; give a name, a file ({', '.join(FILE_TYPES)}), a list of "
        "texts, a list of token id lists, or a datasets.Dataset (turn a generator into a list first)"
    )


def dataset_record(dataset: Any) -> str | dict[str, Any] | None:
    """What a saved config keeps of a dataset: its name, or ``{"kind", "count", "sha256"}``, never its contents."""
    kind = dataset_kind(dataset)
    if kind == "none":
        return None
    if kind == "name":
        return str(dataset)
    if kind == "record":
        return dict(dataset)
    count = len(dataset) if hasattr(dataset, "__len__") else None
    if kind == "table":  # reading all of it only to hash it could take minutes; datasets keeps its own fingerprint
        return {"kind": kind, "count": count, "fingerprint": getattr(dataset, "_fingerprint", None)}
    digest = hashlib.sha256()
    for row in dataset:
        data = row.encode("utf-8", "surrogatepass") if isinstance(row, str) else _ids(row, "dataset").numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return {"kind": kind, "count": count, "sha256": digest.hexdigest()}


def _ids(row: Any, where: str) -> torch.Tensor:
    try:
        ids = row.detach().cpu() if isinstance(row, torch.Tensor) else torch.as_tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} is not a flat list of token ids ({error})") from error
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise ValueError(
            f"{where} must be a flat list of whole numbers (token ids), not {ids.dtype} {list(ids.shape)}"
        )
    return ids.long()


def _row(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (Mapping, bytes, int, float)):
        raise ValueError(f"{where} holds {type(value).__name__}, neither text nor token ids")
    return _ids(value, where)


def _column(columns: Iterable[str], wanted: str | None, where: str) -> str:
    columns = list(columns)
    for name in _COLUMNS if wanted is None else (wanted,):
        if name in columns:
            return name
    missing = '"text" or "input_ids"' if wanted is None else f'"{wanted}"'
    raise ValueError(f"{where} has no column {missing}; set text_column to one of {columns}")


def _table_rows(table: Iterable[Mapping[str, Any]], text_column: str | None, where: str) -> Iterator[Document]:
    column = None
    for number, row in enumerate(table):
        column = column or _column(row, text_column, where)
        yield _row(row[column], f'{where} row {number}: column "{column}"')


@contextmanager
def _utf8(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _jsonl_rows(path: Path, text_column: str | None) -> Iterator[Document]:
    with _utf8(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f'{where} must be a JSON object such as {{"text": "..."}}, not {type(row).__name__}')
            column = _column(row, text_column, where)
            yield _row(row[column], f'{where}: column "{column}"')


def _parquet_rows(path: Path, text_column: str | None) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow; pip install pyarrow") from error
    table = parquet.ParquetFile(path)
    column = _column(table.schema_arrow.names, text_column, str(path))
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _row(value, f'{path} row {number}: column "{column}"')
            number += 1


def _hub_rows(name: str, split: str | None, text_column: str | None) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f'dataset "{name}" is on the Hugging Face Hub, which needs: pip install datasets') from error
    repository, _, config = name.partition(":")
    try:
        table = load_dataset(repository, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:  # offline, unknown name, missing config, bad split
        raise ValueError(
            f'dataset "{name}" (split "{split or "train"}") is not a file here and could not be loaded from the '
            f"Hugging Face Hub: {error}. Check the name and the network, or give a text file"
        ) from error
    yield from _table_rows(table, text_column, f'dataset "{name}"')


def _blocks(path: Path) -> Iterator[str]:
    with _utf8(path) as file:
        yield from iter(lambda: file.read(_PIECE), "")


def _pieces(document: str | Iterable[str]) -> Iterator[str]:
    """Cut a long text after a line (else before a word), so that a part of it can be tokenised by itself."""
    rest = ""
    blocks = (
        (document[i : i + _PIECE] for i in range(0, len(document), _PIECE)) if isinstance(document, str) else document
    )
    for block in blocks:
        rest += block
        cut = rest.rfind("\n") + 1 or rest.rfind(" ")
        if len(rest) >= _PIECE and cut > 0:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def iter_documents(
    dataset: Any, *, split: str | None = None, text_column: str | None = None
) -> Iterator[Iterable[str] | torch.Tensor]:
    """Documents in their own order, read as they are asked for.

    A ``.txt`` file is one document; a row of a ``.jsonl`` or ``.parquet`` file, of a list or of a table is one each.

    Yields:
        The text as consecutive pieces of about 64 KiB, or token ids as int64 [tokens].

    Raises:
        ValueError: no such dataset, an unknown file type, no text column, a row without text.
        FileNotFoundError: the named file does not exist.
        ImportError: the source needs a package that is not installed.
    """
    kind = dataset_kind(dataset)
    if kind == "none":
        raise ValueError('no dataset; set dataset to a text file, a list of texts, or "python-stdlib"')
    if kind == "record":
        raise ValueError(f"only a record of the dataset was saved, not its contents: {dict(dataset)}; give it again")
    rows: Iterable[Any]
    path = Path(dataset).expanduser() if kind == "name" else Path()
    if kind == "table":
        rows = _table_rows(dataset, text_column, "dataset")
    elif kind != "name":
        rows = (_row(row, f"dataset row {number}") for number, row in enumerate(dataset))
    elif str(dataset) == SELF:
        raise ValueError(f'dataset "{SELF}" is written by the model that is quantized and cannot be read; give a text')
    elif str(dataset) in BUILT_IN:
        rows = stdlib_texts(split or "calibration")
    elif path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{path} has an unknown file type; known: {', '.join(FILE_TYPES)}")
        rows = {
            ".txt": lambda: [_blocks(path)],
            ".jsonl": lambda: _jsonl_rows(path, text_column),
            ".parquet": lambda: _parquet_rows(path, text_column),
        }[path.suffix]()
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; name one file in it ({', '.join(FILE_TYPES)})")
    elif path.suffix in FILE_TYPES or path.is_absolute():
        raise FileNotFoundError(f"dataset file {path} does not exist (looked from {Path.cwd()})")
    elif _HUB_NAME.fullmatch(str(dataset)):
        rows = _hub_rows(str(dataset), split, text_column)
    else:
        unknown = unknown_name("dataset", dataset, (*BUILT_IN, SELF))
        raise ValueError(
            f'{unknown}; also a file ({", ".join(FILE_TYPES)}), or "owner/name" '
            "on the Hugging Face Hub (needs the network and: pip install datasets)"
        )
    if split is not None and (kind != "name" or path.is_file()):
        raise ValueError(f'dataset_split="{split}" has no effect on this dataset, which has no splits; leave it unset')
    for row in rows:
        yield row if isinstance(row, torch.Tensor) else _pieces(row)
