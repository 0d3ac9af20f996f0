"""Inner loops on the CPU, compiled by Numba: in one pass over a tile what torch does in several, with the same bits.

They hold no lock of the interpreter, so that threads with tiles of their own do not wait for each other. Arrays are
flat and contiguous. Arithmetic in float32 rounds after every operation, as torch does; nothing is contracted or
reordered except in sums that are for information.
"""
