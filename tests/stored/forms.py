"""Every layout that a base is stored in, by what people call it."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.stored.awq import store_awq
from tests.stored.bitsandbytes_4bit import store_4bit
from tests.stored.compressed import FORMATS, store_compressed
from tests.stored.fp8_blocks import store_fp8
from tests.stored.modelopt import store_modelopt
from tests.stored.mxfp4 import store_mxfp4

Store = Callable[[Path, Path], Path]
"""Stores a base in a form, its twin in 16 bits beside it; see `tests.stored.store`."""

LINEAR: Mapping[str, Store] = {
    "fp8": functools.partial(store_fp8, block=(16, 16), scale_dtype=torch.float32),
    "fp8 in large blocks": store_fp8,
    "fp8 in cut blocks": functools.partial(store_fp8, block=(48, 80), scale_dtype=torch.float32),
    "fp8 with one scale": functools.partial(store_fp8, block=None),
    "fp8 with one plain scale": functools.partial(store_fp8, block=None, called="_scale", scale_dtype=torch.float32),
    "FBGEMM fp8": functools.partial(
        store_fp8, block=(1, 1), called="_scale", method="fbgemm_fp8", scale_dtype=torch.float32
    ),
    **{f"compressed-tensors {of}": functools.partial(store_compressed, of=of) for of in FORMATS},
    "AWQ": store_awq,
    "AWQ without zero points": functools.partial(store_awq, zero_point=False),
    "ModelOpt fp8": functools.partial(store_modelopt, of="fp8", declared_in="config"),
    "ModelOpt fp8 by channel": functools.partial(store_modelopt, of="fp8 by channel", declared_in="file"),
    "ModelOpt nvfp4": functools.partial(store_modelopt, of="nvfp4", declared_in="both"),
}
"""Those of linear weights."""
EXPERTS: Mapping[str, Store] = {"mxfp4": store_mxfp4}
"""Those of all experts of a layer at once, as gpt-oss has them."""
FOUR_BIT: Mapping[str, Store] = {"bitsandbytes 4-bit": store_4bit}
"""That of bitsandbytes, whose merges `make fidelity` has elsewhere."""
APART: Mapping[str, Store] = {
    "fp8 with scales apart": functools.partial(store_fp8, apart=True),
    "compressed-tensors nvfp4 with scales apart": functools.partial(store_compressed, of="nvfp4", apart=True),
    "mxfp4 with scales apart": functools.partial(store_mxfp4, apart=True),
}
"""Those whose scales lie in another shard than their codes."""
