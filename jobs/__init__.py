"""The vocabulary and the ledger: requests, states, releases and the durable store. No torch, no ray, no cloud."""
