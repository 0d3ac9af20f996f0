"""The chat template of a checkpoint: where it stands, and whether it is one. None is rendered."""

from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.releases.checks.checkpoint import Checkpoint
from workers.releases.checks.rules import EVERY, SERVERS, Engine, Finding, Rule, Severity, finding
from workers.sources.belongings import TEMPLATE_FILES, TOKENIZER_CONFIG

BROKEN = Rule(
    id="template.broken",
    what="the chat template is no template",
    severity=Severity.ERROR,
    misread_by=EVERY,
    advice="take the template of the base; transformers' apply_chat_template shows the fault",
    source="transformers 5.23 utils/chat_template_utils.py _compile_jinja_template; Amazon Bedrock user guide, "
    "Handling custom chat templates and tokenizers",
)
MISSING = Rule(
    id="template.missing",
    what="the tokenizer has tokens of a chat, and there is no chat template",
    severity=Severity.NOTE,
    misread_by=SERVERS,
    advice="bring chat_template.jinja of the base, or name one to the server (--chat-template)",
    source="vLLM issue 18140 (Default chat template is no longer allowed)",
)
OWN_FILE = Rule(
    id="template.own-file",
    what="the chat template stands in a file of its own alone",
    severity=Severity.NOTE,
    misread_by=(Engine.TRANSFORMERS_4,),
    advice="for servers that read tokenizer_config.json alone, put it there as chat_template, too",
    source="text-generation-inference issue 3247 (Load Chat Template from chat_template.jinja)",
)
DIFFER = Rule(
    id="template.differ",
    what="the chat template in its own file is not that of tokenizer_config.json",
    severity=Severity.WARNING,
    misread_by=(Engine.TRANSFORMERS_4, Engine.BEDROCK),
    advice="remove one of them: the file wins where it is read, and older engines do not read it",
    source="Amazon Bedrock user guide, Handling custom chat templates and tokenizers (Chat template precedence); "
    "text-generation-inference issue 3247",
)
RULES = (BROKEN, MISSING, OWN_FILE, DIFFER)

_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|start_of_role|>")
_FAULTS = (TemplateError, RecursionError, ValueError)


class _Generation(Extension):
    """The tag by which templates mark what the model says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the block as what is in it."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find a template that is none, missing, or there twice."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return
    files = sorted(name for name in checkpoint.files if name in TEMPLATE_FILES)
    held = checkpoint.documents.get(TOKENIZER_CONFIG, {}).get("chat_template")
    place = files[0] if files else TOKENIZER_CONFIG
    for template in tokenizer.templates:
        if fault := _fault(template):
            yield finding(BROKEN, place, "" if files else "chat_template", found=fault, expected="a template of Jinja")
            return
    if not tokenizer.templates:
        marks = [token for token in _MARKS if token in tokenizer.ids]
        if marks:
            yield finding(MISSING, TOKENIZER_CONFIG, found=f"the token {marks[0]}", expected="a chat template")
    elif files and not held:
        yield finding(OWN_FILE, place, found="it alone", expected=f"chat_template in {TOKENIZER_CONFIG}, too")
    elif files and isinstance(held, str) and _differs(held, tokenizer.templates):
        yield finding(DIFFER, place, found="another template", expected=f"that of {TOKENIZER_CONFIG}")


def _differs(held: str, templates: tuple[str, ...]) -> bool:
    return held.strip() not in {template.strip() for template in templates}


def _fault(template: str) -> str | None:
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
    )
    try:
        environment.parse(template)
    except _FAULTS as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None
