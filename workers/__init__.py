"""The arithmetic and the delivery: plans, passes, parity, sinks. No ray."""

import os

HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"

# torch reads this with its first allocation: blocks of 2 MiB and more then lie in huge pages, where the kernel grants
# them on request (its default). Most of what temporaries the size of a weight cost was page faults.
os.environ.setdefault(HUGE_PAGES_VARIABLE, "1")

# cuBLAS keeps work space for every thread on every stream it has met, on recent GPUs 32 MiB of it: with each pass more,
# as threads come and go. A delta's product needs none, and this little makes it the same in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")

# NumPy's own BLAS, which nothing here calls, starts its threads when it is imported. A process that has several cannot
# be forked, and the server that tries files out (`unit/forks.py`) would have to import everything once more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Threads that wait for others sleep. Spinning, those of two processes on one machine make each other 12 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
