"""The locator against texts in which every number is the line it stands on."""

import tomllib
from pathlib import Path

import pytest

from gradflow.cli.experiments import shipped
from gradflow.study.spec.locate import Lines, syntax_error_line

NUMBERED = '''\
# a comment with a = 1, [brackets] and "quotes"

a = 3
"quoted key" = 4
'literal = key' = 5
dotted.inner.leaf = 6
"escaped \\" quote" = 7
text = """
b = 99
[not.a.table]
\\""" still text"""
after_text = 12
literal = \'\'\'
it''s [[no]] table\'\'\'
after_literal = 15
quotes_at_end = """"two quotes"""""
after_quotes = 17
inline = { x = 18, y = { z = 18 }, list = [18, 18] } # } comment ]
array = [
  20, # first, with [ and { in the comment
  [21, 21],
  { x = 22, deep.er = 22 },
  23,
]

[table]
x = 27
"a.b" = 28
[ table . sub ]
x = 30
[[many]]
x = 32
[many.child]
x = 34
[[many]]
x = 36
[many.child]
x = 38
[[many.nested]]
x = 40
[[many.nested]]
x = 42 ; '''.replace(" ; ", "")


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def test_every_number_stands_on_its_own_line():
    table, lines = tomllib.loads(NUMBERED), Lines(NUMBERED)
    numbers = {path: value for path, value in leaves(table) if isinstance(value, int)}
    assert len(numbers) > 25
    assert {path: lines.of(path) for path in numbers} == numbers


def test_tables_and_elements_have_the_line_that_starts_them():
    lines = Lines(NUMBERED)
    assert lines.of(("table",)) == 26
    assert lines.of(("table", "sub")) == 29
    assert lines.of(("many",)) == 31
    assert lines.of(("many", 1)) == 35
    assert lines.of(("many", 1, "child")) == 37
    assert lines.of(("array", 2)) == 22


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("table", "missing"), 26),
        (("many", 1, "missing", "deeper"), 35),
        (("inline", "missing"), 18),
        (("nowhere",), 1),
        ((), 1),
    ],
)
def test_a_missing_key_has_the_line_of_its_table(path, line):
    assert Lines(NUMBERED).of(path) == line


@pytest.mark.parametrize("text", ["", "\n\n# only a comment", "a = 1"])
def test_small_texts(text):
    assert Lines(text).of(("a",)) == 1


@pytest.mark.parametrize("path", shipped().values(), ids=lambda path: path.stem)
def test_shipped_specs_are_located(path: Path):
    text = path.read_text("utf-8")
    written, lines = text.splitlines(), Lines(text)
    for location, _ in leaves(tomllib.loads(text)):
        line = written[lines.of(location) - 1]
        names = [part for part in location if isinstance(part, str)]
        on_line_of_key = isinstance(location[-1], str)
        assert not on_line_of_key or names[-1] in line


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = \n", 2), ("a = 1\na = 2\n", 2), ("a = [1,\n2,\n", 2), ('x = """\n\n', 1)],
)
def test_syntax_errors_name_their_line(text, line):
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(text)
    assert syntax_error_line(str(caught.value), text) == line
