"""The files of a tokenizer: which there are, who reads them, and whether its ids have rows."""

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.errors import BadInputError
from jobs.request_files.problems import show
from workers.bases.model import token_embedding
from workers.bases.tokenizers import read_tokenizer
from workers.releases.checks.checkpoint import Checkpoint
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity, finding, several
from workers.releases.checks.skeletons import Skeleton
from workers.releases.vocabulary import rows_note
from workers.sources.belongings import TOKENIZER_CONFIG, TOKENIZER_FILE, is_vocabulary

MISSING = Rule(
    id="tokenizer.missing",
    what="no tokenizer",
    severity=Severity.NOTE,
    refused_by=(*SERVERS, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="copy the tokenizer of the base; servers take another one by an option (--tokenizer)",
    source="llama.cpp conversion/base.py TextModel.set_vocab; Amazon Bedrock user guide, Use Custom model import",
)
NO_ROWS = Rule(
    id="tokenizer.no-rows",
    what="tokens in use have ids beyond the rows of the embedding",
    severity=Severity.ERROR,
    misread_by=(*TRANSFORMERS, *SERVERS),
    refused_by=(Engine.LLAMA_CPP,),
    advice="resize the embedding before saving (resize_token_embeddings), or ship the base's tokenizer",
    source="torch 2.13 nn/functional.py embedding (index out of range); llama.cpp pull request 3633 (Vocab size "
    "mismatch)",
)
FEW_ROWS = Rule(
    id="tokenizer.few-rows",
    what="the tokenizer has ids beyond the rows of the embedding",
    severity=Severity.WARNING,
    misread_by=(*TRANSFORMERS, *SERVERS),
    refused_by=(Engine.LLAMA_CPP,),
    advice="resize the embedding before saving (resize_token_embeddings), or remove the tokens",
    source="torch 2.13 nn/functional.py embedding (index out of range); llama.cpp pull request 3633 (Vocab size "
    "mismatch)",
)
NEW_CLASS = Rule(
    id="tokenizer.new-class",
    what="a class of transformers 5 alone",
    severity=Severity.NOTE,
    refused_by=(Engine.TRANSFORMERS_4, Engine.BEDROCK),
    advice="for servers on transformers 4, write PreTrainedTokenizerFast as tokenizer_class, or the base's class",
    source="LlamaFactory issue 10310, gpustack issue 5096 (Tokenizer class TokenizersBackend does not exist)",
)
NEW_LIST = Rule(
    id="tokenizer.new-list",
    what="extra_special_tokens is a list, as transformers 5 writes it",
    severity=Severity.NOTE,
    refused_by=(Engine.TRANSFORMERS_4, Engine.BEDROCK),
    advice="for servers on transformers 4, write the list as additional_special_tokens",
    source="mlx-lm issue 661, transformers pull request 44781 ('list' object has no attribute 'keys')",
)
SLOW = Rule(
    id="tokenizer.slow-only",
    what="there is no tokenizer.json",
    severity=Severity.NOTE,
    misread_by=(Engine.LLAMA_CPP,),
    refused_by=(Engine.BEDROCK,),
    advice="load the tokenizer with transformers and save it: that writes tokenizer.json",
    source="Amazon Bedrock user guide, Use Custom model import; llama.cpp conversion/base.py TextModel.set_vocab",
)
ADDED_DIFFER = Rule(
    id="tokenizer.added-differ",
    what="the files of the tokenizer give one token different ids",
    severity=Severity.WARNING,
    misread_by=TRANSFORMERS,
    advice="save the tokenizer anew: the files are of two saves, and versions go by different ones",
    source="transformers 5.23 tokenization_utils_base.py PreTrainedTokenizerBase._from_pretrained "
    "(added_tokens_decoder before added_tokens.json)",
)
NO_SUCH_TOKEN = Rule(
    id="tokenizer.no-such-token",
    what="a special token is not in the vocabulary",
    severity=Severity.WARNING,
    misread_by=(*TRANSFORMERS, *SERVERS),
    advice="correct tokenizer_config.json: the token is added while loading, with an id that no row belongs to",
    source="transformers 5.23 tokenization_utils_base.py PreTrainedTokenizerBase.__init__ (tokens not yet in vocab)",
)
NO_ROLES = Rule(
    id="tokenizer.no-roles",
    what="no file says which tokens are special",
    severity=Severity.NOTE,
    misread_by=TRANSFORMERS,
    advice="bring special_tokens_map.json or tokenizer_config.json of the base: without them nothing ends a text",
    source="transformers 5.23 tokenization_utils_base.py PreTrainedTokenizerBase._from_pretrained",
)
RULES = (MISSING, NO_ROWS, FEW_ROWS, NEW_CLASS, NEW_LIST, SLOW, ADDED_DIFFER, NO_SUCH_TOKEN, NO_ROLES)

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def find(checkpoint: Checkpoint, skeleton: Skeleton | None) -> Iterator[Finding]:
    """Find what is wrong with the tokenizer of a checkpoint.

    Args:
        checkpoint: looked at.
        skeleton: its model; None where it cannot be built, and no rows are counted.
    """
    files = [name for name in checkpoint.files if is_vocabulary(name)]
    if not files:
        if skeleton is None or token_embedding(skeleton.model)[0] is not None:
            yield finding(MISSING, TOKENIZER_FILE, found="nothing", expected="the files of a tokenizer")
        return
    config = checkpoint.documents.get(TOKENIZER_CONFIG, {})
    if config.get("tokenizer_class") == "TokenizersBackend":
        yield finding(
            NEW_CLASS, TOKENIZER_CONFIG, "tokenizer_class", found="TokenizersBackend", expected="a class of both"
        )
    if isinstance(config.get("extra_special_tokens"), list) and config["extra_special_tokens"]:
        yield finding(NEW_LIST, TOKENIZER_CONFIG, "extra_special_tokens", found="a list", expected="names with tokens")
    if TOKENIZER_FILE not in checkpoint.files:
        yield finding(SLOW, files[0], found=several(sorted(files)), expected=f"{TOKENIZER_FILE}, too")
    yield from _tokens(checkpoint, config)
    rows = _num_rows(skeleton)
    if rows is not None and checkpoint.tokenizer is not None:
        try:
            notes = list(rows_note(checkpoint.tokenizer, checkpoint.tokenizer, checkpoint.config, rows))
        except BadInputError:
            rule = NO_ROWS
        else:
            if not notes:
                return
            rule = FEW_ROWS
        token, id_ = max(checkpoint.tokenizer.counted.items(), key=lambda pair: pair[1])
        yield finding(rule, files[0], show(token), found=f"id {id_}", expected=f"ids below {rows}, the rows there are")


def _tokens(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or TOKENIZER_FILE not in checkpoint.files:
        return
    inside = ids_inside(checkpoint)
    if inside:
        for name, tokens in (
            (TOKENIZER_CONFIG, _declared(config)),
            ("added_tokens.json", checkpoint.documents.get("added_tokens.json", {})),
        ):
            differ = [token for token, id_ in tokens.items() if isinstance(id_, int) and inside.get(token, id_) != id_]
            if differ:
                found = f"id {tokens[differ[0]]}"
                yield finding(ADDED_DIFFER, name, show(differ[0]), found=found, expected=f"id {inside[differ[0]]}")
        absent = [role for role in _ROLES if (token := tokenizer.roles.get(role)) and token not in tokenizer.ids]
        if absent:
            token = show(tokenizer.roles[absent[0]])
            yield finding(NO_SUCH_TOKEN, TOKENIZER_CONFIG, absent[0], found=token, expected="a token of the vocabulary")
    if not tokenizer.roles:
        yield finding(NO_ROLES, TOKENIZER_CONFIG, "eos_token", found="no special token", expected="one, at least")


def ids_inside(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Return the ids of `tokenizer.json` alone; none where it is not there, or cannot be read."""
    if TOKENIZER_FILE not in checkpoint.files:
        return {}
    try:
        found = read_tokenizer({TOKENIZER_FILE: checkpoint.files[TOKENIZER_FILE]})
    except BadInputError:
        return {}
    return {} if found is None else found.ids


def _declared(config: Mapping[str, Any]) -> dict[str, int]:
    decoder = config.get("added_tokens_decoder")
    pairs = decoder.items() if isinstance(decoder, dict) else ()
    return {
        token["content"]: int(id_)
        for id_, token in pairs
        if isinstance(token, dict) and isinstance(token.get("content"), str) and id_.isascii() and id_.isdigit()
    }


def _num_rows(skeleton: Skeleton | None) -> int | None:
    """Return the rows of the embedding as it is stored, and those beside it."""
    if skeleton is None:
        return None
    name, beside = token_embedding(skeleton.model)
    stored = skeleton.sources.get(name or "", ())
    shape = skeleton.stored[stored[0]] if stored else None
    return shape[0] + beside if shape else None
