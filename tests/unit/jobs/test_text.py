"""Text from outside as it is shown: what acts becomes visible, what is said stays."""

import pytest

from jobs.text import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", "q_proj"),
        ("Überprüfung 東京 مرحبا 🚀", "Überprüfung 東京 مرحبا 🚀"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),
        ("a\r\nb\tc\0", "a\\r\\nb\\tc\\x00"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("a\u2066b\u2069", "a\\u2066b\\u2069"),
        ("in\u200bvisible\ufeff", "in\\u200bvisible\\ufeff"),
        ("\ud800half", "\\ud800half"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("\u3164", "\\u3164"),
        ("[red]a[/red] :smile: [link=http://x]y[/link]", "[red]a[/red] :smile: [link=http://x]y[/link]"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_what_acts_becomes_visible(text, expected):
    assert shown(text) == expected
    shown(text).encode()


# Default_Ignorable_Code_Point of Unicode 16, DerivedCoreProperties.txt: what is drawn as nothing.
IGNORABLE = (
    "00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFF8 "
    "1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)


def test_no_character_that_unicode_draws_as_nothing_stays():
    ranges = [[int(end, 16) for end in each.split("-")] for each in IGNORABLE.split()]
    letters = [chr(number) for ends in ranges for number in range(ends[0], ends[-1] + 1)]
    assert [letter for letter in letters if letter in shown(letter)] == []


def test_text_is_cut_and_lines_stay_where_they_are_wanted():
    assert shown("x" * 10, 4) == "xxxx… (6 more characters)"
    assert shown("a\nb", lines=True) == "a\nb"
    assert shown(ValueError("a\nb")) == "a\\nb"
