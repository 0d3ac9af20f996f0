"""What transformers makes of a base in a stored form, held against its twin."""

from pathlib import Path

import torch

from tests.merges import different
from tests.stored import twin_of
from workers.bases.forms.declared import declared_form
from workers.bases.model import load_config, model_class
from workers.parity.inference import quiet_libraries


def is_misread(base: Path) -> bool:
    """Return whether transformers refuses a base, or loads other weights than those of its twin."""
    twin = model_class(load_config(twin_of(base))).from_pretrained(twin_of(base), dtype=torch.bfloat16)
    form, config = declared_form(base), load_config(base)
    config.quantization_config = None if form is None or form.loaded_as is None else dict(form.loaded_as)
    try:
        with quiet_libraries():
            model = model_class(config).from_pretrained(base, config=config, dtype=torch.bfloat16)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return True
    return different(dict(model.state_dict()), dict(twin.state_dict())) != []
