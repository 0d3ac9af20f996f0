"""The front of a queue: what people and programs ask of it, over the ledger itself or over HTTP."""
