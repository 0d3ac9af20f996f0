"""What of a file may take long, for messages: the largest numbers, the expressions and the long lists."""

from typing import Any

from jobs.text import shown

_NUM_NAMED = 3


def widest(config: Any) -> str:
    """Return the largest numbers of a configuration, as people look for them."""
    numbers: list[tuple[float, str]] = []
    sections = [("", config)]
    while sections:
        prefix, section = sections.pop()
        for field, value in section.items() if isinstance(section, dict) else ():
            if isinstance(value, dict):
                sections.append((f"{prefix}{field}.", value))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                numbers.append((value, f"{prefix}{field}"))
    found = sorted(numbers, reverse=True)[:_NUM_NAMED]
    return ", ".join(f"{shown(field, 80)} = {shown(value, 40)}" for value, field in found) or "its numbers"


def expressions(config: dict[str, Any]) -> str:
    """Return the fields of an adapter that may be regular expressions or long lists, as people look for them."""
    found = []
    for field, value in config.items():
        if isinstance(value, list | dict) and value:
            found.append((len(str(value)), f"{field} ({len(value)} entries)"))
        elif isinstance(value, str) and any(sign in value for sign in "*+?({[|"):
            found.append((len(value), f"{field} = {value}"))
    longest = sorted(found, reverse=True)[:_NUM_NAMED]
    return ", ".join(shown(words, 200) for _, words in longest) or "its fields"
