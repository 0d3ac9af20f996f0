"""Which models compute with the flag that ties, by transformers' own sources."""

import ast
import importlib.util
from pathlib import Path

from workers.bases.ties import COMPUTES_WITH_FLAG

FLAGS = {"tie_word_embeddings", "scale_decoder_outputs"}


def reads_a_flag(function):
    return any(isinstance(node, ast.Attribute) and node.attr in FLAGS for node in ast.walk(function))


def test_every_model_that_scales_by_the_flag_is_known():
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    found = set()
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if any(f"config.{flag}" in source for flag in FLAGS):
            functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
            if any(function.name == "forward" and reads_a_flag(function) for function in functions):
                found.add(path.parent.name)
    assert found == COMPUTES_WITH_FLAG
