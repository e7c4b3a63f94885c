"""CSV, TSV and JSON lines: columns, headers, rows, and tables that are broken."""

import csv
import gzip
import itertools
import json
import warnings

import pytest
from word_encoder import ENC, documents_of, load, texts_of, wrapped, write

from gpt_2_simple.data import dataset, tables
from gpt_2_simple.data.text_files import DataFile, ReadReport
from gpt_2_simple.data.windows import without_flags


def test_choice_of_the_first_column_is_printed(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "id,text\n1,one\n2,two\n")
    said = f"{path}: its first column is used, of 2; column= names another\n"
    load(path)
    assert said in capsys.readouterr().out
    load(path, column="text")
    load(write(tmp_path / "b.csv", "text\none\n"))
    assert "first column" not in capsys.readouterr().out


def test_open_quote_that_joins_lines_warns(tmp_path):
    path = write(tmp_path / "a.csv", 'text\na pipe\n"two\nlines"\n"open\nthree\nfour\n')
    with pytest.warns(UserWarning, match="a quote is left open: lines 5 to 7 were read as one"):
        load(path)
    load(write(tmp_path / "b.csv", 'text\n6" pipe\nthe end\n'))  # no warning


def test_csv_rows_get_start_and_end_tokens(tmp_path):
    path = write(tmp_path / "a.csv", 'text\nfirst\n"sec, ond",x\n"two\nlines"\n')
    with pytest.warns(UserWarning, match="1 rows have more columns"):
        found = texts_of(path)
    assert found == [
        "<|startoftext|>first<|endoftext|>\n"
        "<|startoftext|>sec, ond<|endoftext|>\n"
        "<|startoftext|>two\nlines<|endoftext|>\n"
    ]


JOKES = 'ID,Joke,Stars\n1,"He said ""no"", then left",3\n2,"Two\nlines",4\n'


@pytest.mark.parametrize("column", ["Joke", 1, "1"])
def test_column_by_name_and_by_number(tmp_path, column):
    path = write(tmp_path / "a.csv", JOKES)
    assert documents_of(path, column=column) == wrapped('He said "no", then left', "Two\nlines")


def test_template_of_several_columns(tmp_path):
    path = write(tmp_path / "a.csv", JOKES)
    rows = documents_of(path, template="{Joke} ({2} stars)")
    assert rows == wrapped('He said "no", then left (3 stars)', "Two\nlines (4 stars)")


QUESTIONS = "question,answer\nWhy?,Because.\n1 + 1,2\n"


def learned_texts(path, **options):
    """Each row's text, in pieces that are learned or not: [(text, is_learned)...]."""
    found = []
    for chunk in load(path, pad_documents=True, **options):
        ids, is_learned = without_flags(chunk)
        groups = itertools.groupby(zip(ids, is_learned, strict=True), key=lambda pair: pair[1])
        found.append([(ENC.decode([i for i, _ in group]), bool(key)) for key, group in groups])
    return found


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", QUESTIONS),
        (
            ".jsonl",
            '{"question": "Why?", "answer": "Because."}\n{"question": "1 + 1", "answer": 2}',
        ),
    ],
)
def test_train_on_a_column_learns_it_and_the_end_token_alone(tmp_path, suffix, content):
    path = write(tmp_path / f"a{suffix}", content)
    rows = learned_texts(path, template="{question}\n{answer}", train_on="answer")
    assert rows == [
        [("<|startoftext|>Why?\n", False), ("Because.<|endoftext|>\n", True)],
        [("<|startoftext|>1 + 1\n", False), ("2<|endoftext|>\n", True)],
    ]
    rows = learned_texts(path, template="{answer} = {question}", train_on="answer")
    assert rows[1] == [
        ("<|startoftext|>", False),
        ("2", True),
        (" = 1 + 1", False),
        ("<|endoftext|>\n", True),
    ]


def test_train_on_a_string_learns_what_comes_after_its_first_occurrence(tmp_path):
    path = write(tmp_path / "a.csv", "text\nHi ### there ### x\nno mark\n")
    with pytest.warns(UserWarning, match="1 of 2 rows do not hold train_on='###': nothing"):
        rows = learned_texts(path, train_on="###")
    assert rows == [
        [("<|startoftext|>Hi ###", False), (" there ### x<|endoftext|>\n", True)],
        [("<|startoftext|>no mark<|endoftext|>\n", False)],
    ]


def test_train_on_that_nothing_has_raises_value_error(tmp_path):
    path = write(tmp_path / "a.csv", QUESTIONS)
    with pytest.raises(ValueError, match="train_on='anwser' is neither a column of the template"):
        load(path, template="{question}\n{answer}", train_on="anwser")
    with pytest.raises(ValueError, match="train_on='' names nothing"):
        load(path, train_on="")
    with pytest.raises(ValueError, match="is encoded already"):
        load(write(tmp_path / "a.npz", b""), train_on="answer")


def test_train_on_with_plain_text_warns(tmp_path):
    path = write(tmp_path / "a.txt", "some text")
    with pytest.warns(UserWarning, match="read as plain text, without train_on='answer'"):
        load(path, train_on="answer")


def test_train_on_tokens_are_found_again_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_BYTES", 10)
    path = write(tmp_path / "a.csv", QUESTIONS)
    options = {"template": "{question}\n{answer}", "cache_dir": str(tmp_path / "cache")}
    first = learned_texts(path, train_on="answer", **options)
    assert learned_texts(path, train_on="answer", **options) == first
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert learned_texts(path, **options) != first
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_missing_column_lists_the_columns(tmp_path):
    path = write(tmp_path / "a.csv", JOKES)
    for options in ({"column": "joke"}, {"column": 3}, {"column": -1}, {"template": "{joke}"}):
        with pytest.raises(ValueError, match="no column .*columns are 'ID', 'Joke', 'Stars'"):
            load(path, **options)
    path = write(tmp_path / "a.jsonl", '{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match="no column 'text': its columns are 'a', 'b'"):
        load(path, column="text")
    with pytest.raises(ValueError, match="exclude each other"):
        load(path, column="a", template="{b}")
    with pytest.raises(ValueError, match="names no column"):
        load(path, template="text")


def test_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\ta, b\n2\t"tab\tinside"\n'.encode("utf-16"))
    assert documents_of(path, column="text") == wrapped("a, b", "tab\tinside")


def test_blank_rows_are_skipped_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'id,text\n1,a\n\n2,\n3," "\n4\n5,b\n\n')
    assert documents_of(path, column="text") == wrapped("a", "b")
    assert "5 blank rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "is_header"),
    [
        ("text", True),
        ("Joke,ID", True),
        ("Why did the chicken cross the road?", False),
        ("A sentence of many more words than a name", False),
        ("12,34", False),
        ("a,", False),
        ("same,same", False),
    ],
)
def test_header_row_is_detected(tmp_path, capsys, first, is_header):
    path = write(tmp_path / "a.csv", f"{first}\nrow,1\n")
    expected = ["row"] if is_header else [first.split(",")[0], "row"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert documents_of(path) == wrapped(*expected)
        assert documents_of(path, header=True) == wrapped("row")
        assert documents_of(path, header=False) == wrapped(first.split(",")[0], "row")
    assert ("reads like data" in capsys.readouterr().out) != is_header


def test_header_row_with_a_named_column_that_reads_like_a_sentence(tmp_path):
    path = write(tmp_path / "a.csv", "id,Is it funny?\n1,yes\n")
    assert documents_of(path, column="Is it funny?") == wrapped("yes")


def test_csv_field_longer_than_the_csv_module_allows(tmp_path):
    csv.field_size_limit(131072)
    long = "word " * 50_000 + "end"
    assert documents_of(write(tmp_path / "a.csv", f"text\n{long}\n")) == wrapped(long)
    assert csv.field_size_limit() == 131072


def test_open_quote_of_a_very_long_field_raises_value_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_FIELD_CHARACTERS", 1000)
    path = write(tmp_path / "a.csv", 'text\n"open\n' + "row\n" * 1000)
    with pytest.raises(ValueError, match="a.csv', line .*quote left open"):
        load(path)


def test_json_lines(tmp_path):
    lines = [{"id": 1, "text": "a\nb"}, {"text": None}, {"id": 2, "text": "c", "n": 2.5}]
    content = "\n\n".join(json.dumps(line) for line in lines)
    path = write(tmp_path / "a.jsonl", content)
    assert documents_of(path) == wrapped("a\nb", "c")
    assert documents_of(path, template="{id}{n}") == wrapped("1", "22.5")
    other = write(tmp_path / "b.jsonl", '{"n": 1, "body": "x"}')
    assert documents_of(other) == documents_of(other, column=1) == wrapped("x")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: list, where an object"),
        ('{"text": ["x"]}', "line 2: column 'text' holds a list"),
    ],
)
def test_malformed_json_lines_raise_value_error(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' + line)
    with pytest.raises(ValueError, match=reason):
        load(path)


def test_csv_reader_left_unfinished_keeps_the_field_size_limit(tmp_path):
    csv.field_size_limit(131072)
    path = write(tmp_path / "a.csv", "text\n" + "row\n" * 1000)
    file = DataFile(path, "csv", named=True)
    with open(path, encoding="utf-8") as lines:
        rows = tables.read_rows(lines, file, tables.RowFormat(), ReadReport())
        assert next(rows).text == wrapped("row")[0]
        assert csv.field_size_limit() == 131072
        assert len(list(rows)) == 999


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Emma\nOlivia\nAva\n", ["Emma", "Olivia", "Ava"]),
        ("Hello world\nHow are you\n", ["Hello world", "How are you"]),
        ("Witze\nA man walks into a bar\n", ["A man walks into a bar"]),
        ("Tweets\none\n", ["one"]),
    ],
)
def test_header_of_a_table_with_one_column(tmp_path, capsys, content, expected):
    assert documents_of(write(tmp_path / "a.csv", content)) == wrapped(*expected)
    out = capsys.readouterr().out
    assert ("its first row, 'Witze', is taken for the column's name" in out) == (
        content.startswith("Witze")
    )


def test_header_whose_first_name_is_empty_as_pandas_writes_its_index(tmp_path, capsys):
    path = write(tmp_path / "a.csv", ",text,label\n0,one,x\n1,two,y\n")
    assert documents_of(path) == wrapped("one", "two")
    assert "its column 'text' is used, of 3" in capsys.readouterr().out
    assert documents_of(path, column="label") == wrapped("x", "y")
    assert documents_of(path, column=0) == wrapped("0", "1")


@pytest.mark.parametrize("column", ["2024", 2024])
def test_column_whose_name_is_a_number(tmp_path, column):
    path = write(tmp_path / "a.csv", "2023,2024\nold,new\n")
    assert documents_of(path, column=column) == wrapped("new")
    path = write(tmp_path / "a.jsonl", '{"2023": "old", "2024": "new"}')
    assert documents_of(path, column=column) == wrapped("new")


def test_delimiter_is_found_out_and_told(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'id;text\n1;"Hello; you"\n2;one, two\n')
    assert documents_of(path, column="text") == wrapped("Hello; you", "one, two")
    assert "its columns are read as separated by ';'" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="1 rows have more columns"):
        assert documents_of(path, column="id;text", delimiter=",")[1:] == wrapped("2;one")
    assert "separated" not in capsys.readouterr().out
    poems = write(tmp_path / "b.csv", "roses are red; violets blue\nsugar is sweet; and so on\n")
    assert documents_of(poems)[1] == wrapped("sugar is sweet; and so on")[0]
    piped = write(tmp_path / "c.tsv", "id|text\n1|one\n")
    assert documents_of(piped, column="text", delimiter="|") == wrapped("one")
    with pytest.raises(ValueError, match="delimiter=';;' must be one character"):
        load(path, delimiter=";;")


@pytest.mark.parametrize("text", ['"Hello" she said', '"open', '"Hello, he said'])
def test_quotes_of_tsv_that_are_text(tmp_path, capsys, text):
    path = write(tmp_path / "a.tsv", f'id\ttext\n1\t{text}\n2\tother\n3\tlast"\n')
    assert documents_of(path, column="text") == wrapped(text, "other", 'last"')
    assert "its quotes are read as text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        '[{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]',
        ' [\n  {"text": "one"},\n  {"text": "two"}\n]\n',
        '{"text": "one"}\n{"text": "two"}\n',
    ],
)
def test_json_array_and_json_lines_under_json(tmp_path, content):
    assert documents_of(write(tmp_path / "a.json", content)) == wrapped("one", "two")
    packed = write(tmp_path / "a.json.gz", gzip.compress(content.encode()))
    assert documents_of(packed, column="text") == wrapped("one", "two")


def test_malformed_json_array_raises_value_error(tmp_path):
    with pytest.raises(ValueError, match="a.json': not JSON"):
        load(write(tmp_path / "a.json", '[{"text": "one"}'))
    with pytest.raises(ValueError, match="a.json', object 2: int, where an object"):
        load(write(tmp_path / "a.json", '[{"text": "one"}, 2]'))


@pytest.mark.parametrize("options", [{"column": "text"}, {"template": "{text}"}])
def test_column_or_template_of_plain_text_warns(tmp_path, options):
    for name, content in (("a.txt", "some text"), ("a.json", '{\n "setting": 1\n}')):
        path = write(tmp_path / name, content)
        with pytest.warns(UserWarning, match="is read as plain text, without (column|template)="):
            assert texts_of(path, **options) == [content + "<|endoftext|>"]
