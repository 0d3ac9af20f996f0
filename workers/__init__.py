"""The arithmetic and the delivery: plans, passes, parity, sinks. No ray."""

import os

HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"

# torch reads this with its first allocation: blocks of 2 MiB and more then lie in huge pages, where the kernel grants
# them on request (its default). Most of what temporaries the size of a weight cost was page faults.
os.environ.setdefault(HUGE_PAGES_VARIABLE, "1")
