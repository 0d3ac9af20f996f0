"""The command line. It parses, calls and shows; what it calls is imported when it is called.

Exit codes: 0 done, 1 some job failed, 2 bad input, 3 parity failed, 4 work is left.
"""

from cluster.cli.app import app, main

__all__ = ["app", "main"]
