"""Arithmetic parity: what each tensor that ships has to be, from the adapter's own files, and what it is."""
