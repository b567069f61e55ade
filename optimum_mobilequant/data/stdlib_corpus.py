"""Text that every Python installation carries: the standard library's sources and documentation.

It is the calibration set of last resort (``dataset="python-stdlib"``, no network, no download) and the corpus on which
the embedded demo model is trained. Files are split by the hash of their name, so the parts stay disjoint across Python
versions and machines.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Vendored, generated or test material: large, repetitive, or missing from some distributions.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}
# Tables of code points, written by a script of that name. One is as long as ten modules, and two of them would be most
# of what a perplexity is taken over. The demo model was trained with them, so that part keeps them.
_GENERATOR, _HEAD = "gencodec.py", 500  # characters
# Of 40 files one is for calibration, one for evaluation, the rest for training. A model is more certain of what it was
# trained on, and its activations differ there: calibration text must be as new to it as the text it will read.
_SPLITS = {0: "test", 20: "calibration"}


def _split_of(name: str) -> str:
    return _SPLITS.get(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 40, "train")


def stdlib_texts(split: str = "calibration") -> list[str]:
    """Texts of the running interpreter's standard library, in a fixed order.

    Args:
        split: ``"train"`` (38 files in 40), ``"calibration"`` or ``"test"`` (one in 40 each).

    Returns:
        One string for each source file and each documentation topic, ordered by the hash of its name. Generated tables
        of code points are in ``"train"`` alone.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the interpreter carries no standard-library sources (a frozen or stripped build).
    """
    if split not in ("train", "calibration", "test"):
        raise ValueError(f"split must be 'train', 'calibration' or 'test', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    named: dict[str, str] = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and relative.parts[0] != "pydoc_data":
            text = path.read_text(encoding="utf-8", errors="ignore")
            if split == "train" or _GENERATOR not in text[:_HEAD]:
                named[relative.as_posix()] = text
    try:
        from pydoc_data.topics import topics

        named.update({f"pydoc_data/{key}": text for key, text in topics.items()})
    except ImportError:  # some distributions leave the documentation out
        pass
    if not named:
        raise FileNotFoundError(
            f"no Python sources under {root}: this interpreter ships without them; give a text file as dataset instead"
        )
    wanted = [name for name in named if _split_of(name) == split and named[name].strip()]
    return [named[name] for name in sorted(wanted, key=lambda n: hashlib.sha256(n.encode()).hexdigest())]
