"""What all stages of a unit share: where it computes, its room on this machine, how far it is, and who is to stop."""

from dataclasses import dataclass
from pathlib import Path

import torch

from workers.bases.quantized_cache import QuantizedCache
from workers.merging.tracker import Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Of one unit of work on one worker."""

    device: torch.device
    """Where tiles are computed and models run."""
    num_threads: int
    """Threads that compute."""
    scratch: Path
    """Directory for files that no release keeps."""
    cache: QuantizedCache
    """Bases in 4-bit."""
    tracker: Tracker
