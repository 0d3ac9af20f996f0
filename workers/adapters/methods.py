"""What PEFT's methods are to a merge: which ones it merges, which ones it cannot, and why.

A method that is in neither table is refused by name, and a test holds both tables against the installed PEFT.
"""

MERGED = frozenset(
    {
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)

WEIGHED = frozenset({"ADAMSS", "BOFT", "FROD", "SHIRA", "UNILORA"})
"""Methods that compute with values while they are put on a model, so that a model without values will not do."""

SHAPED_BY_VALUES = frozenset({"ADAMSS"})
"""Methods whose tensors have shapes that follow from the values of the base's weights."""

UNSTABLE = {
    "FROD": (
        "PEFT makes its bases anew from the weights of the model whenever it is loaded; they follow the number of "
        "threads and the BLAS library, while the trained values belong to those of the training"
    ),
}
"""Methods whose merged weights move by more than rounding with the machine that merges, and why: the adapter does not
say what it is. They are merged only where the request accepts that; `tests/stability.py` measures all methods."""

REMADE = frozenset({"ADAMSS", "OSF", "PSOFT"})
"""Methods that decompose the base anew, too, whose merged weights move by rounding alone: by about 1e-4 of the delta,
which in 16 bits is the last bit of some elements. Their bits hold for one number of threads and one BLAS library."""

_ADDS_INPUTS = "it adds inputs to the model and changes no weight, so there is nothing to merge"

REFUSED = {
    "ADAPTION_PROMPT": _ADDS_INPUTS,
    "CARTRIDGE": _ADDS_INPUTS,
    "CPT": _ADDS_INPUTS,
    "LILY": "PEFT cannot merge it: its projections depend on the input",
    "MULTITASK_PROMPT_TUNING": _ADDS_INPUTS,
    "POLY": "PEFT cannot merge it: its mixture of adapters depends on the task",
    "PREFIX_TUNING": _ADDS_INPUTS,
    "PROMPT_TUNING": _ADDS_INPUTS,
    "P_TUNING": _ADDS_INPUTS,
    "SHADOW": "PEFT cannot merge it: what it adds depends on the input",
    "XLORA": "PEFT cannot merge it: its mixture of adapters depends on the input",
}
