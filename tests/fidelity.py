"""What merges bit for bit as PEFT does: methods, and LoRA variants x architectures. Run by `make fidelity`.

Each cell merges one adapter twice, here and by PEFT over the whole loaded model, and compares every tensor of the
files. A cell says `equal`; `refused`, where PEFT itself cannot make, load or merge that adapter; or `better`, where
both differ and the reason is a known fault of the reference. Anything else is an error, and the exit code says so.
"""

import argparse
import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from jobs.errors import MergefleetError
from tests import architectures
from tests.merges import load_dequantized, merge_by_peft, plan_pass, read_tensors
from tests.methods import METHODS, make_method_adapter
from tests.models import build_llama, build_qwen2, load_plain
from tests.stored.cells import stored_cells
from tests.tied_heads import COLUMNS, tied_cells
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.methods import REMADE, SHAPED_BY_VALUES, UNSTABLE
from workers.bases.model import load_config, model_class
from workers.merging.sidecars import write_sidecars
from workers.parity.inference import quiet_libraries

OUTPUT = Path("docs/compatibility.md")

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*o_proj": 5}},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "all"},
    "embeddings, head": {"modules_to_save": "embeddings and head"},
}
"""Further fields of `LoraConfig`, by the name of the column."""

_MAMBA_LINEARS = r".*\.(in_proj|x_proj|dt_proj|up_proj|down_proj|q_proj|k_proj|v_proj|o_proj)"
"""PEFT refuses to adapt the other linears of state-space models."""

_BYPASSED: Mapping[str, list[str]] = {
    "mamba": ["dt_proj"],
    "mobilebert": ["predictions.decoder", "predictions.dense"],
}
"""Linear layers that the model never calls, as it computes with their weights: LoRA on them is refused."""

_REFUSED_HERE = "is a buffer of the base's model"
"""What mergefleet refuses and PEFT merges: a trained copy of a module with tensors beside its parameters (I-BERT)."""

_MARKS = {"equal": "=", "better": "+", "refused": "x"}


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of one adapter on one base."""

    verdict: str
    """`equal`, `better`, `refused`, or `wrong`."""
    reason: str = ""


def merge_both(base: Path, adapter: Path, directory: Path, quantization: str = "none", *, double: bool = False) -> Cell:
    """Merge here and by PEFT, and compare.

    Args:
        base: tiny checkpoint.
        adapter: made on it.
        directory: of this cell alone.
        quantization: what the base is merged in.
        double: whether the scales are quantized, too.
    """
    config = _in_4bit(quantization, double=double)
    options = {"quantization_options": {"bnb_4bit_use_double_quant": True}} if double else {}
    try:
        planned = plan_pass(
            base,
            {"job": adapter},
            directory,
            base_quantization=quantization,
            parity={"level": "arithmetic"},
            accept_unstable=True,
            **options,
        )
        for error in planned.run().errors.values():
            raise error
    except MergefleetError as error:
        fault = f"by mergefleet: a trained tensor {_REFUSED_HERE}; a merge changes parameters alone"
        if _REFUSED_HERE not in str(error):
            fault = _fault_of_peft(base, adapter, directory / "peft", config)
        return Cell("refused", fault) if fault else Cell("wrong", f"refused, but PEFT merges it: {error}")
    bad = [c.tensor for c in planned.check()["job"].values() if c.rounding_excess > 1 or c.num_bad_elements]
    if bad:
        return Cell("wrong", f"its own arithmetic check fails: {bad[:3]}")
    ours = read_tensors(planned.output("job"))
    theirs, minded = _merge_by_peft(base, adapter, directory / "peft", config)
    write_sidecars(planned.plans[0], planned.output("job"))
    loaded, misfits = _load(planned.output("job"))
    if misfits:
        return Cell("wrong", f"does not load: {misfits}")
    if ours.keys() > theirs.keys() and config is None:
        in_memory = _merged_in_memory(base, adapter)
        if _same(loaded, in_memory) and not _same(_load(directory / "peft")[0], in_memory):
            return Cell("better", "PEFT's model loses values of tied tensors that came apart when it is saved")
    cell = _compare(base, ours, theirs, quantized=config is not None)
    if cell.verdict == "wrong" and (fault := _fault_of_peft(base, adapter, directory / "again", config)):
        before = load_dequantized(base, config) if config else load_plain(base)
        cell = _compare_with_pairs(before.state_dict(), adapter, loaded, fault)
    if minded and cell.verdict == "equal":
        cell = Cell(
            "better", "PEFT refuses to merge into a model that was loaded in 4-bit, even when it is dequantized"
        )
    return cell


def _in_4bit(quantization: str, *, double: bool = False) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=double)


def _merge_by_peft(
    base: Path, adapter: Path, directory: Path, config: BitsAndBytesConfig | None
) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the tensors, and whether PEFT had to be kept from seeing that the model was in 4-bit once."""
    try:
        return merge_by_peft(base, adapter, directory, quantization=config), False
    except ValueError as error:
        if config is None or "4-bit mode" not in str(error):
            raise
        return merge_by_peft(base, adapter, directory, quantization=config, forget_4bit=True), True


def _compare(
    base: Path, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], *, quantized: bool
) -> Cell:
    if ours.keys() != theirs.keys():
        return Cell("wrong", f"names differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    conv1d_in_4bit = quantized and _has_conv1d(base)
    reasons = {_difference(ours[name], theirs[name], conv1d_in_4bit) for name in ours}
    reasons.discard("")
    if any(reason.startswith("differs") for reason in reasons):
        return Cell("wrong", "; ".join(sorted(reasons)))
    return Cell("better", "; ".join(sorted(reasons))) if reasons else Cell("equal")


def _compare_with_pairs(
    before: Mapping[str, torch.Tensor], adapter: Path, loaded: Mapping[str, torch.Tensor], fault: str
) -> Cell:
    """Compare with W + scaling * B @ A of each pair in the adapter's file, in float64: PEFT does not load all of them.

    Only for plain LoRA on linears of the model.
    """
    config: Any = PeftConfig.from_pretrained(str(adapter))
    tensors, expected = load_file(adapter / ADAPTER_WEIGHTS), dict(before)
    for name, tensor in tensors.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" not in plain:
            expected[plain] = tensor
        elif plain.endswith(".lora_A.weight"):
            module = plain.removesuffix(".lora_A.weight")
            b_OR = tensors[name.replace("lora_A", "lora_B")].double()
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
            scaling = alpha / (math.sqrt(len(tensor)) if config.use_rslora else len(tensor))
            expected[f"{module}.weight"] = expected[f"{module}.weight"].double() + scaling * b_OR @ tensor.double()
    far = [
        name
        for name, tensor in expected.items()
        if not torch.allclose(loaded[name].double(), tensor.double(), rtol=2**-7, atol=1e-6)
    ]
    return Cell("wrong", f"{fault}; {far[:3]} are not W + delta") if far else Cell("better", fault)


def _difference(ours: torch.Tensor, theirs: torch.Tensor, conv1d_in_4bit: bool) -> str:
    if ours.shape == theirs.shape and _same_bits(ours, theirs):
        return ""
    if conv1d_in_4bit and ours.T.shape == theirs.shape and _same_bits(ours.T.contiguous(), theirs):
        return "dequantize() leaves the weights of Conv1D transposed, and the saved checkpoint does not load"
    dtypes = (ours.dtype, theirs.dtype)
    if dtypes == (torch.float32, torch.bfloat16) and ours.shape == theirs.shape:
        farthest = float((ours - theirs.float()).abs().max())
        if farthest <= 2**-7 * float(ours.abs().max()):
            return "4-bit loading rounds weights to 16 bits that the base, and transformers, keep in float32"
    return f"differs in {int((ours.float() != theirs.float()).sum()) if ours.shape == theirs.shape else 'shape'}"


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def _has_conv1d(base: Path) -> bool:
    return any(isinstance(module, Conv1D) for module in load_plain(base).modules())


def _load(directory: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state of the model in a directory, and what does not fit."""
    with quiet_libraries():
        model, info = model_class(load_config(directory)).from_pretrained(
            directory, dtype="auto", output_loading_info=True
        )
    return model.state_dict(), ", ".join(
        f"{kind}: {sorted(map(str, found))[:3]}" for kind, found in info.items() if found
    )


def _merged_in_memory(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with quiet_libraries():
        return PeftModel.from_pretrained(load_plain(base), adapter).merge_and_unload().state_dict()


def _same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(_same_bits(left[name], right[name]) for name in left)


def _fault_of_peft(base: Path, adapter: Path, directory: Path, config: BitsAndBytesConfig | None) -> str:
    """Return why PEFT cannot merge its own adapter, or nothing where it can."""
    with quiet_libraries():
        try:
            model = PeftModel(
                load_dequantized(base, config) if config else load_plain(base), PeftConfig.from_pretrained(str(adapter))
            )
            found: Any = set_peft_model_state_dict(model, load_file(adapter / ADAPTER_WEIGHTS))
            if found.unexpected_keys:
                return f"PEFT drops {len(found.unexpected_keys)} tensors of its own adapter when it loads it"
            merge_by_peft(base, adapter, directory, quantization=config)
        except Exception as error:  # noqa: BLE001 - whatever PEFT raises is the reason
            return f"PEFT: {_first_line(error)}"
    return ""


def method_cells(directory: Path) -> Iterator[tuple[str, str, Cell]]:
    """Yield method, quantization and cell, for every method that offers `merge_and_unload`."""
    llama = build_llama(directory / "llama", tokenizer=False)
    qwen2 = build_qwen2(directory / "qwen2", tokenizer=False)
    for method in sorted(METHODS):
        base = qwen2 if method == "BEFT" else llama
        for quantization in ("none", "nf4"):
            with _scratch() as scratch:
                cell = _cell(base, scratch, quantization, method, METHODS[method])
                if cell.verdict == "equal" and method in UNSTABLE:
                    cell = Cell("equal", f"refused unless the request says accept_unstable: {UNSTABLE[method]}")
                elif cell.verdict == "equal" and method in REMADE:
                    cell = Cell("equal", "bit by bit with one number of threads and one BLAS library")
                yield method, quantization, cell
    yield "XLORA", "none", Cell("refused", "PEFT: its mixture of adapters depends on the input")
    yield "XLORA", "nf4", Cell("refused", "PEFT: its mixture of adapters depends on the input")


def architecture_cells(
    kind: str, model_type: str, base: Path, variants: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Cell]]:
    """Yield column and cell of one architecture: every variant on 16 bits, plain LoRA on NF4, doubly, too."""
    state_space = "mamba" in model_type or model_type == "nemotron_h"
    targets = {"r": 4, "lora_alpha": 8, "target_modules": _MAMBA_LINEARS if state_space else "all-linear"}
    left_out = _BYPASSED.get(model_type, [])
    targets |= {"exclude_modules": left_out} if left_out else {}

    def without(cell: Cell) -> Cell:
        return replace(cell, reason=cell.reason or f"without {', '.join(left_out)}") if left_out else cell

    for name, fields in variants.items():
        with _scratch() as scratch:
            yield name, without(_cell(base, scratch, "none", "LORA", targets | fields))
    if kind in ("decoder", "vision-language"):
        for name, double in (("LoRA, NF4", False), ("LoRA, NF4 doubly", True)):
            with _scratch() as scratch:
                yield name, without(_cell(base, scratch, "nf4", "LORA", targets, double=double))


def _cell(
    base: Path, scratch: Path, quantization: str, method: str, fields: Mapping[str, Any], *, double: bool = False
) -> Cell:
    if fields.get("modules_to_save") == "embeddings and head":
        fields = dict(fields) | {"modules_to_save": _embeddings_and_head(base)}
    try:
        made_on = _in_4bit(quantization) if method in SHAPED_BY_VALUES else None
        adapter = make_method_adapter(
            base, scratch / "adapter", method, quantization=made_on, **{"task_type": None} | dict(fields)
        )
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is the reason
        return Cell("refused", f"PEFT cannot make it: {_first_line(error)}")
    try:
        return merge_both(base, adapter, scratch, quantization, double=double)
    except Exception as error:  # noqa: BLE001 - a fault of ours is a cell, too
        return Cell("wrong", f"{type(error).__name__}: {_first_line(error)}")


def _embeddings_and_head(base: Path) -> list[str]:
    model = load_plain(base)
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is w for w in wanted)}
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:160]


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="fidelity-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one architecture."""

    kind: str
    model_type: str
    cells: Mapping[str, Cell]
    tied: Mapping[str, Cell]
    unbuilt: str = ""
    """Why transformers builds no tiny model of it."""


def architecture_row(kind: str, model_type: str) -> Row:
    """Fill the row of one architecture."""
    with _scratch() as scratch:
        base = scratch / model_type
        try:
            architectures.build(kind, model_type, base)
        except Exception as error:  # noqa: BLE001 - the reason goes into the page
            return Row(kind, model_type, {}, {}, _first_line(error))
        cells = dict(architecture_cells(kind, model_type, base, VARIANTS))
        tied = {column: Cell(verdict, reason) for column, (verdict, reason) in tied_cells(base, _scratch)}
        return Row(kind, model_type, cells, tied)


def _row_of(wanted: tuple[str, str]) -> Row:
    return architecture_row(*wanted)


def method_table() -> dict[str, dict[str, Cell]]:
    """Fill the table of methods."""
    methods: dict[str, dict[str, Cell]] = {}
    with _scratch() as scratch:
        for method, quantization, cell in method_cells(scratch):
            methods.setdefault(method, {})[quantization] = cell
    return methods


def stored_table() -> dict[str, dict[str, Cell]]:
    """Fill the table of stored forms."""
    forms: dict[str, dict[str, Cell]] = {}
    for form, column, (verdict, reason) in stored_cells(_scratch):
        forms.setdefault(form, {})[column] = Cell(verdict, reason)
    return forms


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> int:
    """Fill the table, a process for each core, write the page, and return 1 if a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(architectures.KINDS), help="which architectures")
    parser.add_argument("--only", default="", help="model types, comma-separated; the page is not written")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    wanted = [
        (kind, name)
        for kind in arguments.kinds.split(",")
        for name in architectures.names(kind)
        if not only or name in only
    ]
    started = time.monotonic()
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    # Libraries keep what they compile and trace: a process is replaced before it is large.
    with context.Pool(len(os.sched_getaffinity(0)), _quiet, maxtasksperchild=50) as pool:
        tables = [] if only else [pool.apply_async(table) for table in (method_table, stored_table)]
        for row in pool.imap(_row_of, wanted):
            rows.append(row)
            for column, cell in (*row.cells.items(), *row.tied.items()):
                _report(f"{row.kind} {row.model_type}, {column}", cell)
        filled = [table.get() for table in tables]
    for name, table in ((name, table) for tables in filled for name, table in tables.items()):
        for column, cell in table.items():
            _report(f"{name}, {column}", cell)
    if not only:
        OUTPUT.write_text(_page(*filled, rows))
    cells = [cell for tables in filled for table in tables.values() for cell in table.values()]
    cells += [cell for row in rows for cell in (*row.cells.values(), *row.tied.values())]
    counts = Counter(cell.verdict for cell in cells)
    sys.stdout.write(f"{len(cells)} cells in {time.monotonic() - started:.0f} s: {dict(counts)}\n")
    return 1 if counts["wrong"] else 0


def _report(what: str, cell: Cell) -> None:
    sys.stdout.write(f"{what}: {cell.verdict}{f' ({cell.reason})' if cell.reason else ''}\n")
    sys.stdout.flush()


def _page(
    methods: Mapping[str, Mapping[str, Cell]], stored: Mapping[str, Mapping[str, Cell]], rows: Sequence[Row]
) -> str:
    notes: dict[str, int] = {}
    lines = [
        "# Compatibility",
        "",
        f"Written by `make fidelity`, with PEFT {peft.__version__} and transformers {transformers.__version__}. A cell",
        "is one adapter, merged here and by PEFT over the whole loaded model, and compared bit by bit in every tensor",
        "of the files: `=` equal; `x` refused, as PEFT itself cannot make, load or merge it, or as the reason says;",
        "`+` better, as the reference is known to be wrong. Numbers point to the reasons at the end.",
        "",
        "## Methods",
        "",
        "On a small Llama (BEFT: Qwen2), into the base's own 16 bits and through NF4 and back.",
        "",
        *_table("method", ["none", "nf4"], methods, notes),
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        table = {row.model_type: row.cells for row in rows if row.kind == kind and not row.unbuilt}
        unbuilt = {row.model_type: row.unbuilt for row in rows if row.kind == kind and row.unbuilt}
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        lines += ["", f"## LoRA on {len(table)} {kind} architectures", "", *_table("model_type", columns, table, notes)]
        if unbuilt:
            lines += ["", "Not tried, as transformers builds no tiny random model of them:", ""]
            lines += [f"- `{name}`: {reason}" for name, reason in sorted(unbuilt.items())]
    tied = {f"{row.model_type} ({row.kind})": row.tied for row in rows if row.tied}
    lines += [
        "",
        f"## What base + adapter computes, on {len(tied)} tied architectures",
        "",
        "LoRA on a head that is one parameter with the embedding, or on the embedding, held against the weights that",
        "the unmerged layers answer with, in float64: `=` the same, rounded once, and so is PEFT's own merge; `+` the",
        "same, and PEFT's merge is not.",
        "",
        *_table("model_type", list(COLUMNS), tied, notes),
    ]
    columns = list(dict.fromkeys(column for row in stored.values() for column in row))
    lines += [
        "",
        "## Stored as",
        "",
        "Bases in stored forms ([what is read](stored-forms.md)), against PEFT's merge into what their library makes",
        "of them.",
        "",
        *_table("form", columns, stored, notes),
    ]
    lines += ["", "## Reasons", "", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    return "\n".join(lines)


def _table(
    first: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Cell]], notes: dict[str, int]
) -> list[str]:
    def show(cell: Cell | None) -> str:
        if cell is None:
            return ""
        mark = _MARKS.get(cell.verdict, "WRONG")
        return f"{mark} {notes.setdefault(cell.reason, len(notes) + 1)}" if cell.reason else mark

    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(show(row.get(column)) for column in columns)} |" for name, row in rows.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
