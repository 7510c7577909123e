"""Answers are found in what a chat template renders, and nothing else is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from adaconvert.data.tokens import load_tokenizer
from adaconvert.errors import DataError, OptionError
from adaconvert.testing import tiny_models
from adaconvert.train.chat import Chat
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack
from adaconvert.train.data_packing import CONTEXT, LEARNED, PADDING

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "Second\nanswer "},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
# no generation prompt, content stripped, as Llama 2 and Mistral
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} "
    "[/INST]{% elif m.role == 'assistant' %} {{ m.content.strip() }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# only the turn after the last question shows its reasoning, as Qwen 3
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the same, and the prompt opens the reasoning, which earlier turns do not have
PROMPTED = THINKING.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
COUNTED = "{{ messages | length }} turns\n" + CHATML
SHOUTED = COUNTED.replace("m.content", "m.content.upper()")
FORGETFUL = (
    "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def chat_of(folder: Path, template: str) -> tuple[Chat, Any]:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return Chat(tokenizer, "model"), tokenizer


def learned(folder: Path, template: str, turns: list[Any]) -> list[str]:
    """Return what is learned, one text a run of learned tokens."""
    chat, tokenizer = chat_of(folder, template)
    ids, mask = chat.encode(turns, "a.jsonl:1")
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for at, (token, counts) in enumerate(zip(ids, mask, strict=True)):
        if counts and not (at and mask[at - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [f"First answer.{END}", f"Second\nanswer {END}"]),
        (MARKED, [f"First answer.{END}", f"Second\nanswer {END}"]),
        (INSTRUCT, [f" First answer.{END}", f" Second\nanswer{END}"]),
        (THINKING, [f"First answer.{END}", f"<think>\n\n</think>\n\nSecond\nanswer {END}"]),
        (PROMPTED, [f"First answer.{END}", f"\n</think>\n\nSecond\nanswer {END}"]),
        (COUNTED, [f"First answer.{END}", f"Second\nanswer {END}"]),
    ],
    ids=["chatml", "marked", "instruct", "thinking", "prompted", "counted"],
)
def test_answers_with_what_ends_them_are_learned(
    dense: Path, template: str, expected: list[str]
) -> None:
    assert learned(dense, template, TURNS) == expected


@pytest.mark.parametrize("template", [SHOUTED, FORGETFUL], ids=["shouted", "forgetful"])
def test_template_whose_answers_cannot_be_found_is_refused(dense: Path, template: str) -> None:
    message = r"a\.jsonl:1: the answer in message 3 cannot be found .*\{% generation %\} and"
    turns = [{**turn, "content": turn["content"].strip(".")} for turn in TURNS]
    with pytest.raises(DataError, match=message):
        learned(dense, template, turns)


def test_both_methods_give_the_same_tokens(dense: Path) -> None:
    one, two = (chat_of(dense, template)[0].encode(TURNS, "") for template in (CHATML, MARKED))
    assert one == two


def test_answer_that_repeats_its_question_is_found(dense: Path) -> None:
    same = "Z assistant\n"
    turns = [{"role": role, "content": same} for role in ("user", "assistant", "user", "assistant")]
    assert learned(dense, CHATML, turns) == [f"{same}{END}"] * 2
    assert learned(dense, THINKING, turns) == [
        f"{same}{END}",
        f"<think>\n\n</think>\n\n{same}{END}",
    ]


def test_conversation_may_begin_with_an_answer(dense: Path) -> None:
    turns = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi."}]
    assert learned(dense, CHATML, turns) == [f"Hello.{END}"]


def test_every_token_of_letters_of_several_bytes_is_learned(dense: Path) -> None:
    answer = "\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{GRINNING FACE}"
    turns = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    assert learned(dense, CHATML, turns) == [answer + END]


def test_refusal_of_the_template_names_the_row(dense: Path) -> None:
    template = "{{ raise_exception('roles must\n alternate') }}"
    message = r"a\.jsonl:1: the chat template refuses the conversation; found 'roles must\\n alter"
    for text in (template, template + MARKED):
        with pytest.raises(DataError, match=message):
            learned(dense, text, TURNS)


def test_date_of_today_is_not_written_where_the_template_takes_one(dense: Path) -> None:
    template = "{{ date_string or strftime_now('%Y') }}|" + CHATML
    chat, tokenizer = chat_of(dense, template)
    assert tokenizer.decode(chat.encode(TURNS, "")[0]).startswith("26 Jul 2024|")


# -- packed


def conversation(number: int, words: int = 3) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"q{number}?"},
        {"role": "assistant", "content": f"a{number} " + "word " * words},
    ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def packed(folder: Path, data: list[str], **options: Any) -> Packed:
    given = {"steps": 3, "seq_len": 96, "batch_size": 4, **options}
    return pack(FinetuneConfig.of(data, given), folder)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    rows = [{"messages": conversation(i, i % 5), "id": i} for i in range(24)]
    return write(tmp_path / "chats.jsonl", rows)


def test_conversations_stay_whole(dense: Path, chats: str) -> None:
    found = packed(dense, [chats])
    assert found.kinds is not None
    tokenizer = load_tokenizer(dense)
    begins, ends = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", END))
    for ids, kinds in zip(found.ids, found.kinds, strict=True):
        real = ids[kinds != PADDING]
        assert real[0] == begins
        assert (real == begins).sum() == (real == ends).sum()
        # padding stands at the end alone
        assert not numpy.any((kinds[1:] != PADDING) & (kinds[:-1] == PADDING))
        text = tokenizer.decode(ids[kinds == LEARNED])
        assert text.count(END) == (real == ends).sum() / 2
        assert "q" not in text
        assert text[0] == "a"
    # several to a sequence, and none twice
    assert (found.kinds == PADDING).mean() < 0.2
    tally = found.sources[0]
    assert tally.documents == 24
    assert tally.tokens == (found.kinds != PADDING).sum()
    assert tally.learned == (found.kinds == LEARNED).sum()


def test_labels_and_mask_follow_the_kinds(dense: Path, chats: str) -> None:
    found = packed(dense, [chats])
    assert found.kinds is not None
    row, kinds = found[2], found.kinds[2]
    assert (row["labels"] != -100).tolist() == (kinds == LEARNED).tolist()
    assert row["labels"][row["labels"] >= 0].equal(row["input_ids"][row["labels"] >= 0])
    assert row["attention_mask"].tolist() == (kinds != PADDING).tolist()


def test_order_is_the_seeds(dense: Path, chats: str) -> None:
    one, again, other = (packed(dense, [chats], seed=seed).digest for seed in (1, 1, 2))
    assert one == again != other


def test_text_and_conversations_mix(dense: Path, chats: str, text: Path) -> None:
    found = packed(dense, [chats, str(text)])
    assert found.kinds is not None
    assert [tally.format for tally in found.sources] == ["messages", "text"]
    whole = (found.kinds == LEARNED).all(1)
    assert whole.tolist() == [False, True] * 6
    assert found[1]["attention_mask"].all()
    assert (found[0]["labels"] == -100).sum() > 1


def test_long_conversations_are_cut_and_counted(dense: Path, tmp_path: Path) -> None:
    rows = [{"messages": conversation(1)}, {"messages": conversation(2, 90)}]
    found = packed(dense, [write(tmp_path / "a.jsonl", rows)], steps=1, seq_len=64)
    assert found.kinds is not None
    assert (found.sources[0].cut, found.sources[0].left_out) == (1, 0)
    # the cut one fills its sequence and ends with what is learned
    assert (found.kinds[:, -1] == LEARNED).any()


def test_conversation_without_an_answer_left_is_left_out(dense: Path, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": "late"}]
    blank = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  "}]
    rows = [{"messages": long}, {"messages": blank}, {"messages": conversation(1)}]
    found = packed(dense, [write(tmp_path / "a.jsonl", rows)], steps=1)
    tally = found.sources[0]
    assert (tally.documents, tally.left_out, tally.cut) == (1, 2, 1)
    # one conversation a sequence: a copy could be read off
    assert tally.passes == 4
    with pytest.raises(DataError, match=r"a\.jsonl: holds no conversation with an answer to learn"):
        packed(dense, [write(tmp_path / "a.jsonl", rows[:2])])


def test_one_short_conversation_will_do(dense: Path, tmp_path: Path) -> None:
    found = packed(dense, [write(tmp_path / "a.jsonl", [{"messages": conversation(1)}])], steps=1)
    assert found.kinds is not None
    assert set(numpy.unique(found.kinds)) == {PADDING, CONTEXT, LEARNED}


# -- formats


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a", "messages": conversation(1)},
            {},
            r"a\.jsonl: holds both text and conversations; found fields 'text', 'messages'\. "
            r"Say which to train on: --data-format",
        ),
        (
            {"body": "a", "id": 1},
            {},
            r"a\.jsonl: there is no field 'text' and no field 'messages'; found fields 'body', "
            r"'id'\. Name .* \(--field\) or .* \(--messages-field\)",
        ),
        ({"text": "a"}, {"data_format": "messages"}, r"line 1: there is no field 'messages'"),
        (
            {"messages": "hello"},
            {},
            r"a\.jsonl:1 field 'messages': is not a conversation; expected a list of messages, "
            r"found a string\. A conversation is a list of",
        ),
        ({"messages": [["user", "hello"]]}, {}, r"message 1: is not a message; found an array"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            {},
            r"message 1: has no role; found 'from', 'value'",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "bo\x1bt", "content": "x"}]},
            {},
            r"message 2: has an unknown role; expected one of system, developer, user, assistant, "
            r"tool, found 'bo\\x1bt'",
        ),
        (
            {"messages": [{"role": 7, "content": "x"}]},
            {},
            r"has an unknown role; expected .*, found a number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            r"message 1: has content that is not text; expected a string, found an array\. Images",
        ),
        ({"messages": [{"role": "assistant"}]}, {}, r"has content that is not text; .* found null"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, {}, r"holds half a surrogate pair"),
        ({"messages": []}, {}, r"a\.jsonl: holds no conversation with an answer to learn; found 1"),
    ],
)
def test_bad_rows_are_refused_by_name(
    dense: Path, tmp_path: Path, row: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        packed(dense, [write(tmp_path / "a.jsonl", [row])], **options)


def test_format_can_be_given_for_each_source(dense: Path, tmp_path: Path) -> None:
    rows = [{"text": f"text {i} " * 20, "messages": conversation(i)} for i in range(5)]
    data = [write(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    found = packed(dense, data, data_format=("text", "messages"))
    assert [tally.format for tally in found.sources] == ["text", "messages"]
    with pytest.raises(OptionError, match="--data-format: is given neither once nor once a source"):
        packed(dense, data, data_format=("text",) * 3)
    with pytest.raises(OptionError, match="--data-format: is unknown; expected auto or text or me"):
        packed(dense, data, data_format="chat")


def test_other_field_for_conversations(dense: Path, tmp_path: Path) -> None:
    data = [write(tmp_path / "a.jsonl", [{"turns": conversation(i)} for i in range(4)])]
    found = packed(dense, data, messages_field="turns")
    assert found.sources[0].format == "messages"


def test_parquet_holds_conversations(dense: Path, tmp_path: Path, chats: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line)["messages"] for line in Path(chats).read_text().splitlines()]
    # a struct has every key in every row
    rows[0][0]["name"] = "x"
    table = pyarrow.table({"messages": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = packed(dense, [str(tmp_path / "a.parquet")])
    assert found.digest == packed(dense, [chats]).digest


def test_checkpoint_without_a_chat_template_is_refused(tmp_path: Path, chats: str) -> None:
    folder = tiny_models.make("llama-tied", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["chat_template"]
    config.write_text(json.dumps(settings))
    message = r"plain: the tokenizer of the checkpoint has no chat template\. Add the chat_template"
    with pytest.raises(DataError, match=message):
        packed(folder, [chats])
