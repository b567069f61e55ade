"""Generate text from a Genie bundle on this computer: libGenie over the HTP emulator, in a process of its own.

The library must not share a process with ONNX Runtime's QNN provider (both load the HTP library, and the process
dies), and it writes to file descriptor 1, so :func:`generate` starts this module as a program and reads its JSON::

    python -m optimum_mobilequant.exporters.genie_runner BUNDLE --prompt "Once" --tokens 32

libGenie comes with the package onnxruntime-qnn (Linux x86-64). Source of its calls: the C API that Genie documents.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIG, EXTENSIONS = "genie_config.json", "htp_backend_ext_config.json"
STATE = "prefix"  # a dialog that has read the checkpoint's prefix, if it has one; see genie_prefix.py
# GenieDialog_query's status: 0, or a warning that ended the text. Negative ones are errors.
_ENDED = {0: "ended", 4: "context full"}
_COMPLETE = 0  # GENIE_DIALOG_SENTENCE_COMPLETE: the query is all of the prompt


@dataclass(frozen=True)
class Generated:
    """What Genie wrote.

    Args:
        text: the continuation.
        pieces: the same as Genie handed it over, in most tokenizers one piece for each token.
        ids: token ids of the continuation; empty for a prompt given as text, for which Genie returns none.
        ended: ``"ended"`` (end-of-text token or the number of tokens asked for) or ``"context full"``.
        seconds: loading the bundle excluded.
    """

    text: str
    pieces: list[str]
    ids: list[int]
    ended: str
    seconds: float


def generate(
    bundle: Path,
    prompt: str | Sequence[int],
    *,
    tokens: int,
    greedy: bool = True,
    dump: Path | None = None,
    timeout: float = 600.0,
) -> Generated:
    """Continue a prompt with the bundle's own files and tokenizer.

    Args:
        bundle: folder that the ``genie`` target wrote.
        prompt: text, or token ids (``ids`` of the result are then filled). Genie puts the bundle's BOS before either.
        tokens: how many at most; the text ends earlier at an end-of-text token or where the context is full.
        greedy: the likeliest token each time, whatever the bundle's sampler says.
        dump: folder into which Genie writes every tensor that enters and leaves a graph.
        timeout: seconds.

    Raises:
        FileNotFoundError: no bundle there.
        ValueError: an empty prompt, a token id outside the vocabulary, or no token asked for.
        ImportError: onnxruntime-qnn is missing (names the pip command).
        RuntimeError: Genie refused the bundle or died; carries what it printed.
        TimeoutError: not done in time.
    """
    if not (bundle / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {bundle}: give a folder that export to genie wrote")
    if tokens < 1 or not len(prompt):
        raise ValueError("give a prompt, and ask for at least one token")
    context = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))["dialog"]["context"]
    if not isinstance(prompt, str) and not all(0 <= token < context["n-vocab"] for token in prompt):
        raise ValueError(f"token ids must lie in 0 to {context['n-vocab'] - 1}")
    _library()
    with tempfile.TemporaryDirectory(prefix="mobilequant-") as folder:
        request = Path(folder) / "request.json"
        asked = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
        options = {"prompt": asked, "tokens": tokens, "greedy": greedy, "dump": str(dump) if dump else None}
        request.write_text(json.dumps(options), encoding="utf-8")
        # By its path: this file needs nothing of the package, whose import takes seconds.
        command = [sys.executable, str(Path(__file__).resolve()), str(bundle.resolve()), "--request", str(request)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"Genie was not done after {timeout:.0f} s: ask for fewer tokens") from error
    if done.returncode or not done.stdout.strip():
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())[-2000:]
        raise RuntimeError(f"Genie stopped with exit code {done.returncode}:\n{said}")
    return Generated(**json.loads(done.stdout))


def emulated(config: dict[str, Any], extensions: Path) -> dict[str, Any]:
    """A phone's Genie configuration with what the emulator cannot do turned off.

    Args:
        extensions: backend extensions without shared weights.
    """
    config = copy.deepcopy(config)
    engine = config["dialog"]["engine"]
    engine["backend"]["QnnHtp"] |= {"use-mmap": False, "poll": False, "cpu-mask": "0x1"}
    engine["backend"]["extensions"] = str(extensions)
    return config


def _library() -> Path:
    """libGenie's path, found without importing what would load the HTP library.

    Raises:
        ImportError: the package is missing; RuntimeError: it has no libGenie for this machine.
    """
    found = find_spec("onnxruntime_qnn")
    if found is None or found.origin is None:
        raise ImportError('onnxruntime_qnn missing: pip install "optimum-mobilequant[qnn]"')
    library = Path(found.origin).parent / "libGenie.so"
    if not library.is_file():
        raise RuntimeError(f"no {library}: Genie can be tried on Linux x86-64 only")
    return library


class _Genie:
    """One dialog over a bundle, in this process. Paths in its configuration are relative to the working directory."""

    def __init__(self, config: dict[str, Any]):
        self.api = ctypes.CDLL(str(_library()))
        self.dialog, held = ctypes.c_void_p(), ctypes.c_void_p()
        text = json.dumps(config).encode()
        self.check("reading the configuration", self.api.GenieDialogConfig_createFromJson(text, ctypes.byref(held)))
        self.check("loading the bundle", self.api.GenieDialog_create(held, ctypes.byref(self.dialog)))

    def check(self, doing: str, status: int) -> int:
        if status < 0:
            raise RuntimeError(f"Genie failed with status {status} while {doing}")
        return status

    def restore(self, state: Path) -> None:
        self.check("restoring the prefix", self.api.GenieDialog_restore(self.dialog, str(state).encode()))

    def limit(self, tokens: int) -> None:
        self.check("setting the limit", self.api.GenieDialog_setMaxNumTokens(self.dialog, ctypes.c_uint32(tokens)))

    def continue_text(self, prompt: str) -> tuple[list[str], int]:
        pieces: list[bytes] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
        heard = kind(lambda piece, code, user: pieces.append(piece or b""))
        status = self.api.GenieDialog_query(self.dialog, prompt.encode(), _COMPLETE, heard, None)
        return [piece.decode(errors="replace") for piece in pieces if piece], self.check("generating", status)

    def continue_ids(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        ids: list[int] = []
        pointer = ctypes.POINTER(ctypes.c_uint32)
        kind = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
        heard = kind(lambda tokens, count, code, user: ids.extend(tokens[i] for i in range(count)))
        given = (ctypes.c_uint32 * len(prompt))(*prompt)
        count = ctypes.c_uint32(len(prompt))
        status = self.api.GenieDialog_tokenQuery(self.dialog, given, count, _COMPLETE, heard, None)
        return ids, self.check("generating", status)


def _run(bundle: Path, request: dict[str, Any], folder: Path) -> Generated:
    config = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))
    extensions = json.loads((bundle / EXTENSIONS).read_text(encoding="utf-8"))
    extensions.setdefault("context", {})["weight_sharing_enabled"] = False
    changed = folder / EXTENSIONS
    changed.write_text(json.dumps(extensions), encoding="utf-8")
    config = emulated(config, changed)
    if request["greedy"]:
        config["dialog"]["sampler"] = {"version": 1, "greedy": True, "temp": 1.0, "top-k": 1, "top-p": 1.0, "seed": 0}
    if request["dump"]:
        wanted = {f"dump-{what}": True for what in ("tensors", "specs", "outputs")}
        config["dialog"]["debug"] = {"path": str(request["dump"]), **wanted}
    os.chdir(bundle)
    genie = _Genie(config)
    if (bundle / STATE).is_dir():
        genie.restore(bundle / STATE)
    genie.limit(request["tokens"])
    started = time.monotonic()
    pieces: list[str] = []
    ids: list[int] = []
    if isinstance(request["prompt"], str):
        pieces, status = genie.continue_text(request["prompt"])
    else:
        ids, status = genie.continue_ids(request["prompt"])
    seconds = time.monotonic() - started
    if ids:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(config["dialog"]["tokenizer"]["path"])
        pieces = [tokenizer.decode(ids, skip_special_tokens=False)]
    return Generated("".join(pieces), pieces, ids, _ENDED.get(status, f"status {status}"), seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: prints one JSON object, nothing else, on standard output."""
    parser = argparse.ArgumentParser(prog="genie_runner", description="Generate from a Genie bundle on the emulator.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=32, help="how many at most (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="use the bundle's sampler instead of greedy search")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if (given.prompt is None) == (given.request is None):
        parser.error("give --prompt")
    request = {"prompt": given.prompt, "tokens": given.tokens, "greedy": not given.sample, "dump": None}
    if given.request is not None:
        request = json.loads(given.request.read_text(encoding="utf-8"))
    # The libraries write to descriptor 1; the answer goes to what it was.
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="mobilequant-") as folder:
        try:
            found = _run(given.bundle.resolve(), request, Path(folder))
        except (RuntimeError, ImportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    print(json.dumps(asdict(found)), file=answer, flush=True)
    os._exit(0)  # unloading the libraries is not worth the risk: the answer is written


if __name__ == "__main__":
    raise SystemExit(main())
