"""What `matrix` and `defaults` of a request file spell out."""

import pytest

AXES = "matrix:\n  bases: [/b]\n  adapters: [/a, /c]\n"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("matrix:\n  bases: [/b]\n  destination: /o\n", [(1, "matrix.adapters")]),
        ("matrix: {destination: /o}\n", [(1, "matrix.bases"), (1, "matrix.adapters")]),
        ("matrix:\n  bases: []\n  adapters: /a\n  destination: /o\n", [(2, "matrix.bases"), (3, "matrix.adapters")]),
        ("matrix:\n  bases: [null]\n  adapters: [/a]\n  destination: /o\n", [(2, "matrix.bases[0]")]),
        (f"{AXES}  base: /c\n  destination: /o/{{adapter}}\n", [(4, "matrix.base")]),
        (f"{AXES}  base_quantization: fp5\n  destination: /o/{{adapter}}\n", [(4, "matrix.base_quantization")]),
        (
            f"{AXES}  base_quantization: fp4\n  quantizations: [nf4]\n  destination: /o/{{adapter}}\n",
            [(4, "matrix.base_quantization")],
        ),
        (f"{AXES}  destination: /o/{{base}}\n", [(4, "matrix.destination")]),
        (f"{AXES}  destination: s3://b/{{adapter}}\n", [(4, "matrix.destination")]),
        (f"{AXES}  destination: /o/{{id}}\n", [(4, "matrix.destination")]),
        (f"{AXES}  destination: /o/{{base!r}}\n", [(4, "matrix.destination")]),
        (f"{AXES}  destination: /o/{{base\n", [(4, "matrix.destination")]),
        (f"{AXES}  id: '{{id}}'\n  destination: /o/{{adapter}}\n", [(4, "matrix.id")]),
        (f"{AXES}  id: x\n  destination: /o/{{id}}\n", [(4, "matrix.id")]),
        (f"{AXES}  dtype: int8\n", [(1, "matrix.destination"), (4, "matrix.dtype")]),
        ("matrix:\n  - bases: [/b]\n    dtype: int8\n", [(2, "matrix[0].adapters"), (3, "matrix[0].dtype")]),
    ],
)
def test_matrix_mistakes(refuse, text, places):
    assert refuse("batch.yaml", text)[0] == places


def test_mistakes_on_the_axes_stand_at_their_entries(refuse):
    text = """\
    matrix:
      bases: [/b]
      adapters: [/a, 'ftp://x']
      quantizations:
        - nf4
        - nf5
      destination: '/o/{adapter}-{quantization}'
    """
    assert refuse("batch.yaml", text)[0] == [(3, "matrix.adapters[1]"), (6, "matrix.quantizations[1]")]


def test_defaults_that_half_of_a_matrix_would_ignore(refuse):
    text = """\
    defaults:
      quantization_options: {bnb_4bit_use_double_quant: true}
    matrix:
      bases: [/b]
      adapters: [/a]
      quantizations: [none, nf4]
      destination: '/o/{quantization}'
    """
    assert refuse("batch.yaml", text)[0] == [(2, "defaults.quantization_options")]
