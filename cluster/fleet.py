"""How many workers a driver has, and what each gets of the cluster."""

from dataclasses import dataclass

from jobs.errors import NoCapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How many workers, of what kind."""

    num_workers: int
    device: str
    num_threads: int

    @property
    def num_gpus_each(self) -> int:
        """GPUs that Ray sets aside for each worker."""
        return 1 if self.device == "cuda" else 0


def plan_fleet(*, num_cpus: int, num_gpus: int, device: str, num_workers: int | None, num_threads: int | None) -> Fleet:
    """Decide on the workers: one for each GPU, or one for every two cores where there is none.

    Args:
        num_cpus: cores of the cluster.
        num_gpus: GPUs of the cluster.
        device: `auto`, `cpu` or `cuda`.
        num_workers: None for the default.
        num_threads: of each worker; None divides the cores among the workers.

    Raises:
        NoCapacityError: CUDA is asked for, and the cluster has fewer GPUs than workers.
    """
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if num_workers is None:
        num_workers = max(1, num_gpus) if device == "cuda" else max(1, num_cpus // 2)
    if device == "cuda" and num_workers > num_gpus:
        raise NoCapacityError(
            f"expected a GPU for each of {num_workers} workers, found {num_gpus} in the cluster; lower workers, or set "
            "device to cpu"
        )
    return Fleet(num_workers=num_workers, device=device, num_threads=num_threads or max(1, num_cpus // num_workers))
