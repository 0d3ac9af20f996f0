"""Arithmetic on tiles: how weights are cut, multiplied, rounded and compared."""
