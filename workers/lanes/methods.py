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
