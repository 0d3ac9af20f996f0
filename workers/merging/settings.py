"""What a worker needs to know about its machine."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.allowance import Allowance


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker needs to know about its machine."""

    cache: Path
    """Fetched sources and quantized bases; may be shared by workers."""
    scratch: Path
    """Files on their way to a remote destination."""
    reports: Path
    """Parity reports, one directory for each job."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is any."""
    num_threads: int | None = None
    """Threads that compute; None for one on each core this process may use."""
    resident_bytes: int = 4 << 30
    """Budget of device memory for quantized bases kept between units."""
    uplink_bytes_per_second: float | None = None
    """What the machine sends to remote stores in a second, over all its workers; None where it is not known."""
    inert_adapter_fields: frozenset[str] = frozenset()
    """Fields of adapters' configurations that PEFT may not know, and that change no merge."""
    allowance: Allowance = field(default_factory=Allowance)
    """The places that requests may name."""
