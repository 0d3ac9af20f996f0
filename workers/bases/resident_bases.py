"""Bases in 4-bit that a worker holds between passes, the least recently used let go first."""

from collections import OrderedDict
from collections.abc import Callable

from workers.bases.quantized_base import QuantizedBase


class ResidentBases:
    """Quantized bases a worker keeps between units: least recently used first out, under a budget of device bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._bases: OrderedDict[str, QuantizedBase] = OrderedDict()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the bases held, least recently used first."""
        return tuple(self._bases)

    def get(self, key: str, content: str, load: Callable[[], QuantizedBase]) -> QuantizedBase:
        """Return the base held under a key, loaded now if it is not there.

        Args:
            key: what requests have in common that use it.
            content: digest of what it is made from; a base that has changed since is loaded anew.
            load: makes or opens it.
        """
        if key not in self._bases or self._bases[key].key != content:
            self._bases[key] = load()
        self._bases.move_to_end(key)
        return self._bases[key]

    def num_device_bytes(self, key: str) -> int:
        """Return the bytes that the base under a key holds on a device; 0 if it is not held."""
        return self._bases[key].num_device_bytes if key in self._bases else 0

    def num_device_bytes_beside(self, key: str) -> int:
        """Return the bytes that all other bases hold on a device."""
        return sum(base.num_device_bytes for other, base in self._bases.items() if other != key)

    def make_room(self, key: str, num_bytes: int) -> None:
        """Let go of other bases than the one under a key, until they held so many bytes of a device or none is left."""
        for other in [other for other in self._bases if other != key]:
            if num_bytes <= 0:
                return
            num_bytes -= self._bases.pop(other).num_device_bytes

    def trim(self) -> None:
        """Let go of bases until the rest fit the budget; the one used last always stays."""
        while len(self._bases) > 1 and sum(base.num_device_bytes for base in self._bases.values()) > self._budget_bytes:
            self._bases.popitem(last=False)
