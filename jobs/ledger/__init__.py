"""The durable queue: jobs with leases and fencing tokens, and the log of what happened to them."""
