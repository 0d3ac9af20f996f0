"""compressed-tensors, the form of vLLM's tools and of Kimi K2: FP8, INT8, packed INT4, NVFP4, MXFP4 and MXFP8.

The configuration is read, and a tile is dequantized, by compressed-tensors 0.20 itself: `decompress` of the format's
own compressor, on rows of a weight as if they were all of it. Which weights there are, headers tell.
"""
