"""The arithmetic and the delivery: plans, passes, parity, sinks. No ray."""
