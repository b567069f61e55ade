"""Speed and memory of a quantized checkpoint beside other ways to run the same model."""

from .compare import Speed, compare_speed
from .peers import PEERS, Peer, check_installed

__all__ = ["PEERS", "Peer", "Speed", "check_installed", "compare_speed"]
