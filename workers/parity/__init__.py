"""Behaviour: what a merged checkpoint answers beside base + adapter; and the verdict of all checks."""
