import json

import pytest

from sae_steer.corpus import UserText, read_texts
from sae_steer.errors import InputError

PLAN = "<|task|>Clean<|steps|>Wipe<|sep|><|end|>"


def test_a_text_file_holds_one_text_a_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(f"\ufeff{PLAN}\r\nfree text \u2028 here\n\n".encode())
    assert read_texts(path) == [
        UserText(PLAN, "Clean", None, 1),
        UserText("free text \u2028 here", "free text \u2028 here", None, 2),
    ]


def test_json_lines_may_name_task_and_variant(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": PLAN}, {"text": "a", "task": "t", "variant": "adhd"}, {"text": "b", "task": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(path) == [
        UserText(PLAN, "Clean", None, 1),
        UserText("a", "t", "adhd", 2),
        UserText("b", "b", None, 3),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty; put one text on each line"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"good\n\ngood\n", "a.txt, line 2: the text is empty or only special tokens; remove"),
        ("a.txt", b"good\n<|task|><|sep|>\n", "a.txt, line 2: .* only special tokens"),
        ("a.txt", b"good\n\xff\n", "a.txt, line 2: not UTF-8; save"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "a"}', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"title": "a"}', 'a.jsonl, line 1: no "text" string; write'),
        ("a.jsonl", b'["a"]', 'a.jsonl, line 1: no "text" string'),
        ("a.jsonl", b'{"text": 3}', 'a.jsonl, line 1: no "text" string'),
        ("a.jsonl", b'{"text": "a", "task": 3}', 'a.jsonl, line 1: "task" is no string'),
        ("a.jsonl", b'{"text": "<|pad|> "}', "a.jsonl, line 1: .* only special tokens"),
        ("a.csv", b"text", "unknown kind of file '.csv'; give a .txt or .jsonl"),
    ],
)
def test_a_fault_is_told_in_one_line_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_texts(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        read_texts(tmp_path / "folder.txt")
