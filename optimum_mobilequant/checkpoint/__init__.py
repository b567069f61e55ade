"""Between the tuned student and the saved folder: integers, their place in a model, and checks of what was saved."""

from .files import check_files, scheme_digest
from .pack import Packed, install, pack, skeleton

__all__ = ["Packed", "check_files", "install", "pack", "scheme_digest", "skeleton"]
