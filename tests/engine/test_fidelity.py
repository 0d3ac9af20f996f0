"""A sample of the table that `make fidelity` fills."""

import pytest

from tests import architectures
from tests.fidelity import VARIANTS, architecture_cells

SAMPLE = [
    ("decoder", "gemma3"),
    ("decoder", "gpt2"),
    pytest.param("decoder", "hrm_text", marks=pytest.mark.slow),
    pytest.param("decoder", "mamba", marks=pytest.mark.slow),
    ("decoder", "mixtral"),
    pytest.param("decoder", "deepseek_v3", marks=pytest.mark.slow),
    pytest.param("decoder", "phi3", marks=pytest.mark.slow),
    pytest.param("vision-language", "qwen2_5_vl", marks=pytest.mark.slow),
    pytest.param("encoder-decoder", "t5", marks=pytest.mark.slow),
    ("encoder", "bert"),
]
REFUSED = {("mixtral", "DoRA"), ("deepseek_v3", "DoRA")}
BETTER = {("gpt2", "LoRA, NF4"), ("gpt2", "LoRA, NF4 doubly"), ("t5", "embeddings, head")}


@pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=lambda value: value)
def test_merges_are_those_of_peft(tmp_path, kind, model_type):
    base = architectures.build(kind, model_type, tmp_path / "base")
    cells = dict(architecture_cells(kind, model_type, base, VARIANTS))
    assert len(cells) >= len(VARIANTS)
    for column, cell in cells.items():
        expected = "equal"
        if (model_type, column) in REFUSED:
            expected = "refused"
        elif (model_type, column) in BETTER:
            expected = "better"
        assert cell.verdict == expected, f"{model_type}, {column}: {cell}"


def test_every_kind_has_its_architectures():
    assert len(architectures.names("decoder")) > 100
    assert sum(len(architectures.names(kind)) for kind in architectures.KINDS) > 300
