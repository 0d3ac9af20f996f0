"""How many workers a driver has, of what kinds, and what each gets of the cluster."""

from dataclasses import dataclass

from jobs.errors import NoCapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Workers of one kind."""

    num_workers: int
    device: str
    """`cuda` or `cpu`: where all of them compute."""
    num_threads: int
    """Of each."""
    without_gpus: bool = False
    """Whether they belong on machines without a GPU, beside a crew on those that have them."""

    @property
    def num_gpus_each(self) -> int:
        """GPUs that Ray sets aside for each worker."""
        return 1 if self.device == "cuda" else 0


def plan_crews(
    *,
    num_cpus: int,
    num_gpus: int,
    num_cpus_without_gpus: int,
    device: str,
    num_workers: int | None,
    num_threads: int | None,
) -> tuple[Crew, ...]:
    """Decide on the workers: one for each GPU, and one for every two cores of machines that have none.

    Args:
        num_cpus: cores of the cluster.
        num_gpus: GPUs of the cluster.
        num_cpus_without_gpus: cores of those of its machines that have no GPU.
        device: `auto`, `cpu` (of all machines) or `cuda` (GPUs alone).
        num_workers: in all; None for the default. With `auto` GPUs get theirs first.
        num_threads: of each worker; None divides the cores among the workers.

    Returns:
        One crew, or two: the one on GPUs, and the one on machines without.

    Raises:
        NoCapacityError: there is no GPU for workers that must have one, or more workers are asked for than there are
            GPUs, and no other machine may take them.
    """
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return (_crew("cpu", num_workers or max(1, num_cpus // 2), num_cpus, num_threads),)
    if num_gpus == 0:
        raise NoCapacityError(
            "device is cuda, and Ray found no GPU in the cluster: look whether nvidia-smi shows one there, or set "
            "MERGEFLEET_DEVICE to auto or cpu"
        )
    mixed = device == "auto" and num_cpus_without_gpus > 0
    on_gpus = num_gpus if num_workers is None else min(num_workers, num_gpus) if mixed else num_workers
    if on_gpus > num_gpus:
        raise NoCapacityError(
            f"expected a GPU for each of {on_gpus} workers, found {num_gpus} in the cluster; ask for at most "
            f"{num_gpus} workers, or set MERGEFLEET_DEVICE to cpu"
        )
    crews = [_crew("cuda", on_gpus, num_cpus - num_cpus_without_gpus if mixed else num_cpus, num_threads)]
    beside = 0
    if mixed:
        beside = max(1, num_cpus_without_gpus // 2) if num_workers is None else num_workers - on_gpus
    if beside:
        crews.append(_crew("cpu", beside, num_cpus_without_gpus, num_threads, without_gpus=True))
    return tuple(crews)


def _crew(device: str, num_workers: int, num_cpus: int, num_threads: int | None, *, without_gpus: bool = False) -> Crew:
    return Crew(
        num_workers=num_workers,
        device=device,
        num_threads=num_threads or max(1, num_cpus // num_workers),
        without_gpus=without_gpus,
    )
