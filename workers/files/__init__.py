"""Bytes on disks: safetensors layouts, buffers, hashing, writing; and the one door for files from outside."""
