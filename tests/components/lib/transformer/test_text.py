"""Texts are read, joined, tokenised and cut as the pruning literature does it."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from components.lib.errors import Refusal
from components.lib.transformer import text
from components.lib.transformer.text import (
    consecutive_windows,
    draw_windows,
    prompt_ids,
    read_documents,
    text_file,
    token_stream,
    windows_possible,
)

ENGLISH = "\n\n".join(pydoc_data.topics.topics.values())[:60_000] + " déjà vu, 日本語, 🌳🌳" * 99


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 3, Qwen and GPT-2 have it: bytes, split into words by a regular expression."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **special)


@cache
def _trained() -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([ENGLISH], trainer)
    return inner.to_str()


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: no words, a leading mark, bytes for what it does not know, a beginning-of-text token."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted({*ENGLISH[:5000], "▁"} - {" "}),
    ]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁"), ("\n", "\n")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


class TestReadDocuments:
    def test_txt_is_one_document_verbatim(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n\ntwo \n".encode())
        assert read_documents(tmp_path / "a.txt") == ["one\r\n\n\ntwo \n"]

    def test_jsonl_is_one_document_a_row_of_the_field(self, tmp_path: Path) -> None:
        rows = [{"body": "one\u2028still one", "id": 1}, {"body": ""}, {"body": "two"}]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
        assert read_documents(tmp_path / "a.jsonl", "body") == ["one\u2028still one", "", "two"]

    def test_parquet_is_one_document_a_row_of_the_field(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(
            pyarrow.table({"text": ["one", "", "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet"
        )
        assert read_documents(tmp_path / "a.parquet") == ["one", "", "two"]

    def test_an_absent_column_is_refused_with_those_there_are(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"body": ["one"], "id": [1]}), tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text('{"body": "one", "id": 1}')
        for name in ("a.parquet", "a.jsonl"):
            with pytest.raises(Refusal, match=r"no column 'text'.*\(body, id\)"):
                read_documents(tmp_path / name)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.txt", b"", "is empty"),
            ("a.txt", b" \n\n", "is empty"),
            ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
            ("a.jsonl", b'{"text": "a"}\n{"text":', "no JSON on line 2"),
            ("a.jsonl", b'["a"]', "has a list on line 1"),
            ("a.jsonl", b'{"text": "a"}\n\n{"text": null}', "has null in column 'text' of row 3"),
            ("a.jsonl", b'{"text": ""}', "is empty"),
            ("a.parquet", b"no parquet at all", "cannot be read as parquet"),
            ("a.csv", b"text\na", "ends in '.csv': use one of .txt, .jsonl, .parquet"),
            ("a", b"a", "ends in ''"),
        ],
    )
    def test_what_cannot_be_read_is_refused_in_one_line(
        self, tmp_path: Path, name: str, content: bytes, said: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal) as refused:
            read_documents(tmp_path / name)
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_null_in_parquet_is_refused_by_its_row(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
        with pytest.raises(Refusal, match="null in column 'text' of row 2"):
            read_documents(tmp_path / "a.parquet")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match="No such file"):
            read_documents(tmp_path / "a.txt")


class TestTextFile:
    def test_is_the_one_file_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        assert text_file(tmp_path) == text_file(tmp_path / "a.txt") == tmp_path / "a.txt"

    def test_another_number_of_files_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match=r"holds 0 \(none\)"):
            text_file(tmp_path)
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("a")
        with pytest.raises(Refusal, match=r"holds 2 \(a.txt, b.txt\)"):
            text_file(tmp_path)


class TestTokenStream:
    def test_documents_are_joined_by_a_blank_line_and_nothing_else(self) -> None:
        tokenizer = byte_level()
        assert token_stream(["one", "", "two"], tokenizer).tolist() == tokenizer.encode("one\n\n\n\ntwo")

    def test_is_what_the_tokenizer_makes_of_the_joined_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        stream = token_stream(["one </s> two", "three"], tokenizer)
        assert stream.dtype == torch.long
        assert stream.tolist() == tokenizer("one </s> two\n\nthree")["input_ids"]

    def test_begins_with_a_beginning_of_text_only_where_the_tokenizer_puts_one(self) -> None:
        llama = sentencepiece()
        assert token_stream(["one", "two"], llama).tolist().count(llama.bos_token_id) == 1
        assert token_stream(["one"], llama)[0] == llama.bos_token_id
        silent = byte_level(bos_token="<s>")
        assert silent.bos_token_id not in token_stream(["one"], silent).tolist()

    def test_ends_without_an_end_of_text(self) -> None:
        ending = byte_level(eos_token="</s>")
        ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", ending.eos_token_id)]
        )
        assert ending("one")["input_ids"][-1] == ending.eos_token_id
        assert ending.eos_token_id not in token_stream(["one"], ending).tolist()

    def test_pieces_give_the_same_tokens_as_the_whole(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = token_stream([ENGLISH], tokenizer)
        monkeypatch.setattr(text, "PIECE", 3_001)
        monkeypatch.setattr(text, "OVERLAP", 400)
        asked: list[int] = []
        _count_lengths(monkeypatch, asked)
        assert torch.equal(token_stream([ENGLISH], tokenizer), whole)
        assert max(asked) == 3_001  # the whole was never tokenised in one go
        assert len(asked) > len(ENGLISH) // 3_001

    @pytest.mark.parametrize("length", [2_999, 3_000, 3_001, 5_799, 5_800, 5_801, 5_999, 6_000, 8_600, 8_601])
    def test_pieces_fit_at_every_length(self, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = byte_level()
        whole = token_stream([ENGLISH[:length]], tokenizer)
        monkeypatch.setattr(text, "PIECE", 3_000)
        monkeypatch.setattr(text, "OVERLAP", 200)
        assert torch.equal(token_stream([ENGLISH[:length]], tokenizer), whole)

    def test_text_without_any_break_is_tokenised_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """aaaa… has no place where two pieces must agree, as the pairs are formed from each piece's own start."""
        inner = Tokenizer(models.BPE({"a": 0, "aa": 1, "aaaa": 2}, [("a", "a"), ("aa", "aa")]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
        endless = "a" * 5_003
        whole = token_stream([endless], tokenizer)
        monkeypatch.setattr(text, "PIECE", 1_001)
        monkeypatch.setattr(text, "OVERLAP", 202)
        assert torch.equal(token_stream([endless], tokenizer), whole)


def _count_lengths(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    encode: Callable[..., object] = PreTrainedTokenizerFast._encode_plus

    def counting(self: PreTrainedTokenizerFast, text: str, **kwargs: object) -> object:
        asked.append(len(text))
        return encode(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", counting)


class TestDrawWindows:
    @given(tokens=st.integers(1, 300), length=st.integers(1, 40), seed=st.integers(0, 9), data=st.data())
    def test_every_window_is_a_stretch_of_the_text_and_none_overlap(
        self, tokens: int, length: int, seed: int, data: st.DataObject
    ) -> None:
        stream = torch.arange(tokens)
        possible = windows_possible(stream, length)
        if not possible:
            return
        samples = data.draw(st.integers(1, possible))
        windows = draw_windows(stream, samples, length, seed)
        assert windows.shape == (samples, length)
        assert torch.equal(windows, windows[:, :1] + torch.arange(length))
        assert windows.unique().numel() == samples * length

    def test_equal_seeds_draw_equal_windows_and_others_do_not(self) -> None:
        stream = torch.arange(10_000)
        first, again, other = (draw_windows(stream, 16, 64, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_places_are_spread_over_the_text_and_in_no_order(self) -> None:
        starts = draw_windows(torch.arange(100_000), 200, 100, 0)[:, 0]
        assert starts.min() < 5_000
        assert starts.max() > 94_000
        assert (
            abs(starts[:100].double().mean() - starts[100:].double().mean()) < 15_000
        )  # sorted, they differ by 50,000

    def test_every_window_that_fits_can_be_drawn(self) -> None:
        assert draw_windows(torch.arange(40), 4, 10, 0).unique().numel() == 40

    def test_text_too_short_is_refused_with_what_it_gives(self) -> None:
        with pytest.raises(Refusal, match="asks for 128 windows of 256 tokens and the text's 1000 tokens give 3"):
            draw_windows(torch.arange(1000), 128, 256, 0)


class TestConsecutiveWindows:
    def test_cuts_the_text_from_its_start_and_leaves_the_rest(self) -> None:
        assert consecutive_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_text_shorter_than_a_window_is_refused(self) -> None:
        with pytest.raises(Refusal, match="has 11 tokens, which gives no window of 12"):
            consecutive_windows(torch.arange(11), 12)


class TestPromptIds:
    def test_without_a_template_are_those_of_the_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert prompt_ids("one two", tokenizer).tolist() == [tokenizer("one two")["input_ids"]]

    def test_with_a_template_are_a_message_whose_special_tokens_the_template_writes(self) -> None:
        tokenizer = sentencepiece()
        tokenizer.chat_template = "<s>{{ messages[0].role }}: {{ messages[0].content }}"
        ids = prompt_ids("the", tokenizer)
        assert ids.tolist() == [tokenizer("<s>user: the", add_special_tokens=False)["input_ids"]]
        assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
