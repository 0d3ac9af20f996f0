"""Commands that are too long for `cli.py`; the others are whole there."""
