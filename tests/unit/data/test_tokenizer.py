"""The tokenizer and its Hugging Face twin."""

from __future__ import annotations

import base64
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import (
    GUARD,
    SPECIAL_TOKENS,
    Tokenizer,
    copy_tokenizer,
    format_ranks,
    read_ranks,
    recover_merges,
    write_hf_tokenizer,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What's 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "谢谢"},
]


def trained_ranks() -> dict[bytes, int]:
    """Bytes, then tokens in an order that makes ties, overlaps and unreachable tokens likely."""
    pieces = [
        "th",
        "he",
        " t",
        "the",
        " the",
        "aa",
        "aaa",
        "aaaa",
        "ab",
        "bc",
        "abc",
        "in",
        "ing",
        "  ",
        "    ",
        "\n\n",
        "'s",
        "中",
        "中文",
        "é",
        "!!",
    ]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in [piece.encode() for piece in pieces] + ["中".encode()[:2], "文".encode()[:2], "文".encode(), b"xyz"]:
        ranks.setdefault(token, len(ranks))
    return ranks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(trained_ranks())


@pytest.fixture(scope="module")
def hf_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "hy.tiktoken").write_bytes(format_ranks(tokenizer.ranks))
    write_hf_tokenizer(tokenizer, folder)
    return folder


def test_special_tokens_follow_the_ranks_in_hunyuans_order(tokenizer: Tokenizer) -> None:
    n = len(tokenizer.ranks)
    assert len(SPECIAL_TOKENS) == 209
    assert [tokenizer.end_id, tokenizer.start_id, tokenizer.eos_id, tokenizer.pad_id] == [n, n + 1, n + 3, n + 4]
    # The release has 127,957 ranks; <|extra_203|> is 128165 there.
    assert tokenizer.special_ids["<|extra_0|>"] - n == 127962 - 127957
    assert tokenizer.special_ids["<|extra_203|>"] - n == 128165 - 127957
    assert tokenizer.vocab_size == n + 209


def test_a_document_has_start_and_end_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document("the thing")
    assert ids.tolist() == [tokenizer.start_id, *tokenizer.encode("the thing"), tokenizer.end_id]


def test_special_names_in_text_are_ordinary_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert max(ids) < len(tokenizer.ranks)
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_text_is_normalised_to_nfc_and_digits_stay_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert len(tokenizer.encode("12345")) == 5


def test_chat_follows_hunyuans_layout(tokenizer: Tokenizer) -> None:
    text = "<|startoftext|>Be brief.<|extra_4|>What's 2 + 2?<|extra_0|>4.<|eos|><|startoftext|>谢谢<|extra_0|>"
    assert tokenizer.decode(tokenizer.apply_chat(CHAT)) == text
    assert tokenizer.decode(tokenizer.apply_chat([CHAT[1]])) == "<|startoftext|>What's 2 + 2?<|extra_0|>"


def test_chat_refuses_roles_out_of_turn(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataFormatError, match="message 2 has role 'user', expected 'assistant'"):
        tokenizer.apply_chat([CHAT[1], CHAT[1]])
    with pytest.raises(DataFormatError, match="no user message"):
        tokenizer.apply_chat([CHAT[0]])


def test_folder_and_file_load_the_same(tokenizer: Tokenizer, hf_folder: Path) -> None:
    assert Tokenizer.load(hf_folder).digest == Tokenizer.load(hf_folder / "hy.tiktoken").digest == tokenizer.digest
    assert read_ranks(hf_folder / "hy.tiktoken") == tokenizer.ranks


def test_digest_changes_with_any_rank(tokenizer: Tokenizer) -> None:
    ranks = trained_ranks()
    ranks[b"th"], ranks[b"he"] = ranks[b"he"], ranks[b"th"]
    assert Tokenizer(ranks).digest != tokenizer.digest


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTES = b"".join(line(bytes([byte]), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BYTES + b"not base64!\n", r"line 257: b'not base64!' is not base64 of a token, a space and its rank"),
        (BYTES + b"YWI= x\n", r"line 257: .* is not base64 of a token"),
        (BYTES + line(b"ab", 256) + line(b"ab", 257), r"line 258: token b'ab' occurs twice \(first on line 257\)"),
        (BYTES + line(b"ab", 7), r"line 257: rank 7 occurs twice \(first on line 8\)"),
        (BYTES + line(b"ab", 258), r"no token has rank 256; 257 tokens must have the ranks 0 to 256"),
        (
            b"".join(line(bytes([byte]), byte) for byte in range(255)),
            r"no token for 1 of 256 single bytes, the first 0xff",
        ),
        (b"", r"no token for 256 of 256 single bytes"),
    ],
)
def test_a_damaged_ranks_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "hy.tiktoken").write_bytes(content)
    with pytest.raises(DataFormatError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "hy.tiktoken" in str(caught.value)


def test_a_ranks_file_in_any_order_with_empty_lines_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hy.tiktoken"
    file.write_bytes(line(b"ab", 257) + b"\n  \n" + BYTES + b"\n" + line(b"xyz", 256))
    assert list(read_ranks(file).items())[256:] == [(b"xyz", 256), (b"ab", 257)]
    file.write_bytes(line(b"ab", 257) + b"  \n" + line(b"ab", 256) + BYTES)
    with pytest.raises(DataFormatError, match=r"line 3: token b'ab' occurs twice \(first on line 1\)"):
        read_ranks(file)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"hy\.tiktoken: no such file"):
        Tokenizer.load(tmp_path)


def test_a_run_of_white_space_beyond_the_pattern_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataFormatError, match="run of white space is too long"):
        tokenizer.encode(" " * 3_000_000)


def test_merges_are_those_that_tiktoken_makes() -> None:
    merges = {left + right: (left, right) for left, right in recover_merges(trained_ranks())}
    assert merges[b"aaa"] == (b"aa", b"a")
    assert merges[b"aaaa"] == (b"aa", b"aa")
    assert merges["中文".encode()] == ("中".encode(), "文".encode())
    assert b"xyz" not in merges


def test_auto_tokenizer_loads_without_remote_code(tokenizer: Tokenizer, hf_folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(hf_folder)
    assert len(loaded) == tokenizer.vocab_size
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.start_id,
        tokenizer.end_id,
        tokenizer.pad_id,
    )
    text = "the thing's 中文 xyz"
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text
    for messages in (CHAT, CHAT[1:], CHAT[:2], CHAT[:3]):
        ids = loaded.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == tokenizer.apply_chat(messages)
    with pytest.raises(Exception, match="roles must be"):
        loaded.apply_chat_template([CHAT[2]], tokenize=False)


def test_a_text_gets_a_start_token_and_no_end_token(tokenizer: Tokenizer, hf_folder: Path) -> None:
    """The default of tokenizer(text): what a model saw before such a text, which it is asked to continue."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(hf_folder)
    text = "the thing"
    assert loaded(text)["input_ids"] == tokenizer.encode_document(text).tolist()[:-1]
    assert loaded("<|eos|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_id], (
        "by name, as everywhere in Hugging Face"
    )
    assert loaded("a<|eos|>", split_special_tokens=True)["input_ids"] == [
        tokenizer.start_id,
        *tokenizer.encode("a<|eos|>"),
    ]


def test_batches_are_padded_on_the_left(tokenizer: Tokenizer, hf_folder: Path) -> None:
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(hf_folder)(["a", "ab!"], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_id] * (len(batch["input_ids"][1]) - 2) + [tokenizer.start_id]
    assert batch["attention_mask"][0][0] == 0


@pytest.fixture(scope="module")
def chat_template(hf_folder: Path):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(hf_folder)
    return lambda messages: loaded.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)


PIECES = [
    "<",
    "|",
    ">",
    "eos",
    GUARD,
    "<|eos|>",
    "<|extra_0|>",
    "<|startoftext|>",
    "<|",
    "\u0338",
    "{{ x }}",
    " ",
    "\n",
    "the",
]


@given(text=st.lists(st.sampled_from(PIECES), max_size=9).map("".join) | st.text(max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_text_of_a_message_becomes_a_control_token(text: str, tokenizer: Tokenizer, chat_template) -> None:
    """In the chat template of transformers and in ours, for any text and every role."""
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    ids = chat_template(messages)
    assert ids == tokenizer.apply_chat(messages)
    start, end_of_user, end_of_system = (
        tokenizer.start_id,
        tokenizer.special_ids["<|extra_0|>"],
        tokenizer.special_ids["<|extra_4|>"],
    )
    turns = [start, end_of_user, tokenizer.eos_id, start, end_of_user]
    if text:
        turns.insert(1, end_of_system)
    assert [i for i in ids if i >= tokenizer.end_id] == turns
    assert tokenizer.decode(ids[:1]) == "<|startoftext|>"


def test_an_empty_system_message_is_omitted(tokenizer: Tokenizer, chat_template) -> None:
    messages = [{"role": "system", "content": ""}, CHAT[1]]
    assert chat_template(messages) == tokenizer.apply_chat(messages) == tokenizer.apply_chat([CHAT[1]])


def test_a_message_that_is_not_text_is_refused(chat_template) -> None:
    with pytest.raises(Exception, match="the content of a message must be text"):
        chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}])


@pytest.fixture(scope="module")
def fast(hf_folder: Path):
    from tokenizers import Tokenizer as HFTokenizer

    return HFTokenizer.from_file(str(hf_folder / "tokenizer.json"))


WORDS = st.sampled_from(
    [
        "the",
        " the",
        "aaaaa",
        "abcabc",
        "xyz",
        " xyz",
        "wxyz",
        "thing's",
        "'S",
        "'\u017f",
        "中文文中",
        "e\u0301",
        "\u0301\u0323a",
        "👩‍👩‍👧",
        "🇨🇳",
        "١٢3",
        "\r\n",
        "\n \n",
        "   ",
        "\t",
        "\u00a0",
        "\u3000",
        "\x85",
        "\x1c",
        "!!\n",
        " !?",
        "\ufeff",
        "\u200b",
        "a" * 300,
        " " * 50,
        "中" * 80,
        "\0",
    ]
)
TEXT = (
    st.lists(WORDS | st.text(max_size=8) | st.text(alphabet="abctheing' \n1", max_size=20), max_size=12)
    .map("".join)
    .filter(
        lambda text: "<|" not in text
    )  # hypothesis tries strings of the program, and Hugging Face interprets special tokens in text
)


@given(text=TEXT)
@settings(max_examples=400, deadline=None)
def test_hugging_face_gives_the_same_ids_as_tiktoken(text: str, tokenizer: Tokenizer, fast) -> None:
    assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_decoding_returns_the_text_in_nfc(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_hugging_face_splits_every_character_as_tiktoken(tokenizer: Tokenizer, fast) -> None:
    """Both regular-expression engines put each character in the same class: letter, digit, white space or other."""
    known = (
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    )
    # Ideographs and Hangul are runs of one class; every 16th of them will do.
    chosen = [c for c in known if not ("\u3400" <= c <= "\ud7a3" or c >= "\U00017000") or ord(c) % 16 == 0]
    texts = [f"a{c}b 1{c} !{c}\n '{c} " for c in chosen]
    different = [
        c
        for c, text, other in zip(chosen, texts, fast.encode_batch(texts, add_special_tokens=False), strict=True)
        if other.ids != tokenizer.encode(text)
    ]
    assert len(chosen) > 30_000
    assert different == []


def test_a_run_copies_only_the_files_of_its_tokenizer(tmp_path):
    """Whatever else is in the folder. A copy onto itself does nothing; a copy over another tokenizer replaces it as a
    whole."""
    source, copy = tmp_path / "source", tmp_path / "run" / "tokenizer"
    (source / "checkpoint").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"large")
    (source / "hy.tiktoken").write_bytes(format_ranks({bytes([byte]): byte for byte in range(256)}))
    copy_tokenizer(source, copy)
    assert [path.name for path in copy.iterdir()] == ["hy.tiktoken"]
    assert Tokenizer.load(copy).digest == Tokenizer.load(source).digest
    before = (copy / "hy.tiktoken").stat()
    copy_tokenizer(copy, copy)
    assert (copy / "hy.tiktoken").stat() == before
    (source / "hy.tiktoken").write_bytes(format_ranks({**{bytes([byte]): byte for byte in range(256)}, b"ab": 256}))
    copy_tokenizer(source, copy)
    assert Tokenizer.load(copy).vocab_size == Tokenizer.load(source).vocab_size
    assert [path.name for path in copy.iterdir()] == ["hy.tiktoken"]
