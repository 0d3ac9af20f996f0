"""Everything that is not streamed: PEFT's own merge, one module after the other, over mapped weights.

The model is whole, so state across layers is as PEFT has it everywhere; but its weights are mapped, and only the module
in work and the adapter take memory (docs/decisions/0006-peft-lane.md).
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from workers.lanes.adapter import put_on, take_off, wrapped_modules
from workers.module_weights import ModuleWeights
from workers.plan import MergePlan


def merge_modules(plan: MergePlan, weights: ModuleWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge what the plan leaves to PEFT.

    Args:
        plan: of the job.
        weights: of its base; not changed.

    Yields:
        Name of the output tensor and its values, on the CPU, each once.

    Raises:
        UnsupportedError, BadInputError: PEFT refuses the adapter, or a tensor of it is missing or left over.
    """
    model = weights.model()
    peft_model = put_on(plan.opened, model, values=True).model
    outputs = defaultdict(list)
    for output, source in plan.by_peft.items():
        outputs[source].append(output)
    for name, _ in wrapped_modules(peft_model):
        own = take_off(plan.opened, peft_model, name, merge=plan.merges(name)).state_dict()
        for key, tensor in own.items():
            if f"{name}.{key}" not in plan.tied:
                for output in outputs.pop(f"{name}.{key}", ()):
                    yield output, tensor
        if plan.tied.isdisjoint(f"{name}.{key}" for key in own):
            model.set_submodule(name, nn.Identity())  # what it held is free again
    # Values that several modules share are final when all of them are done; others lie outside of any layer.
    for source, names in outputs.items():
        for output in names:
            yield output, model.get_parameter(source).data
