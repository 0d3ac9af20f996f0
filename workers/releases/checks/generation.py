"""The generation configuration of a checkpoint: whether it is one, and whether an answer ends."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from workers.bases.model import quiet_transformers
from workers.releases.checks.checkpoint import CONFIG, GENERATION_CONFIG, Checkpoint
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity, finding
from workers.releases.checks.vocabularies import ids_inside
from workers.releases.vocabulary import stop_notes
from workers.sources.belongings import TOKENIZER_FILE

INVALID = Rule(
    id="generation.invalid",
    what="no generation configuration",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    advice="correct the field, or take generation_config.json of the base",
    source="transformers 5.23 generation/configuration_utils.py GenerationConfig.validate",
)
UNSAVABLE = Rule(
    id="generation.unsavable",
    what="flags that do nothing, which transformers refuses to save",
    severity=Severity.WARNING,
    misread_by=(Engine.TRANSFORMERS_4,),
    advice="set do_sample to true, or take temperature, top_p and the like away",
    source="transformers 5.23 generation/configuration_utils.py GenerationConfig.validate (strict), save_pretrained",
)
NO_SUCH_STOP = Rule(
    id="generation.no-such-stop",
    what="generation stops at an id that the tokenizer does not have",
    severity=Severity.WARNING,
    misread_by=(*TRANSFORMERS, *SERVERS, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="set eos_token_id to the ids of the tokens that end a text and a turn",
    source="transformers 5.23 generation/utils.py GenerationMixin._prepare_special_tokens",
)
GOES_ON = Rule(
    id="generation.goes-on",
    what="generation does not stop where the tokenizer or the template ends",
    severity=Severity.NOTE,
    misread_by=(*TRANSFORMERS, *SERVERS),
    advice="set eos_token_id in generation_config.json to all tokens that end a text or a turn",
    source="transformers 5.23 generation/utils.py GenerationMixin._prepare_special_tokens",
)
STOPS_DIFFER = Rule(
    id="generation.stops-differ",
    what="config.json and generation_config.json stop at different tokens",
    severity=Severity.NOTE,
    misread_by=(Engine.LLAMA_CPP,),
    advice="write the same eos_token_id into both",
    source="transformers 5.23 generation/configuration_utils.py GenerationConfig.from_model_config",
)
RULES = (INVALID, UNSAVABLE, NO_SUCH_STOP, GOES_ON, STOPS_DIFFER)

_WHOLE = frozenset({TOKENIZER_FILE, "vocab.json"})
"""Files that tell all tokens: those of pieces count them alone."""
_REFUSALS = (ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError)


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what is wrong with how a checkpoint generates."""
    if GENERATION_CONFIG in checkpoint.unreadable:
        return  # which has a rule of its own
    document = checkpoint.documents.get(GENERATION_CONFIG)
    if document is not None:
        problem = _problem(document)
        if problem is not None:
            rule, what = problem
            yield finding(rule, GENERATION_CONFIG, found=what, expected="flags that go together")
            if rule is INVALID:
                return
    stops = _ids((document or {}).get("eos_token_id"))
    where = GENERATION_CONFIG if stops else CONFIG
    own = _ids(checkpoint.config.get("eos_token_id")) or _ids(checkpoint.text_config.get("eos_token_id"))
    if stops and own and not set(stops) & set(own):
        yield finding(STOPS_DIFFER, CONFIG, "eos_token_id", found=f"{own}", expected=f"one of {stops}")
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or not _WHOLE & checkpoint.files.keys() or not (stops or own):
        return
    known = {*tokenizer.ids.values(), *ids_inside(checkpoint).values()}
    unknown = [id_ for id_ in stops or own if id_ not in known]
    if len(unknown) == len(stops or own):
        most = max(known)
        yield finding(NO_SUCH_STOP, where, "eos_token_id", found=f"{unknown}", expected=f"ids of tokens, up to {most}")
        return
    for note in stop_notes(tokenizer, checkpoint.files, checkpoint.config):
        yield finding(GOES_ON, where, "eos_token_id", found=note, expected="both")


def _problem(document: Mapping[str, Any]) -> tuple[Rule, str] | None:
    with quiet_transformers():
        try:
            config = GenerationConfig.from_dict(dict(document))
            config.validate()
        except _REFUSALS as error:
            return INVALID, f"{type(error).__name__}: {error}"[:300]
        try:
            config.validate(strict=True)
        except ValueError as error:
            lines = [line for line in str(error).splitlines() if line.startswith("- ")]
            return UNSAVABLE, (lines[0].removeprefix("- ") if lines else str(error))[:300]
    return None


def _ids(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if type(each) is int]
