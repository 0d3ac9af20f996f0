"""How an adapter changes a base: what it covers, found by PEFT on a skeleton, and the two lanes that compute it."""
