"""The table of rules in `docs/checking.md`, made of the rules themselves: `python -m tests.rules_page` writes it."""

from pathlib import Path

from workers.releases.checks.checking import RULES

PAGE = Path(__file__).parents[1] / "docs" / "checking.md"
BEGIN, END = "<!-- rules: begin -->\n", "<!-- rules: end -->\n"


def table() -> str:
    """Return one row for each rule."""
    rows = ["| rule | what is wrong | severity | refused by | misread by | seen in |", "|---|---|---|---|---|---|"]
    for rule in RULES.values():
        refused, misread = (", ".join(engines) for engines in (rule.refused_by, rule.misread_by))
        cells = (f"`{rule.id}`", rule.what, rule.severity.value, refused, misread, rule.source)
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """Return a page with the table of these rules in it."""
    front, _, rest = page.partition(BEGIN)
    return front + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
