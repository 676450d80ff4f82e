"""Tokenizers come out of directories and GGUF vocabularies, and can be stored and read again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import convert
from convert.gguf_tokenizer import build_tokenizer

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["Hello  world", " a\n\n 12345\tb ", "naïve 你好 1 22 333 4444", "", "it's DON'T we'll\r\n\r\n end", "  \n x"]


def bytes_alphabet():
    """GPT-2's 256 characters, one a byte."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre, merges=(), extra=(), **keys):
    """Metadata of a byte-level vocabulary: the bytes, the merges' results, and (token, type) extras."""
    tokens = [*bytes_alphabet(), *("".join(merge) for merge in merges), *(token for token, _ in extra)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(extra)) + [kind for _, kind in extra],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        **{f"tokenizer.{key}": value for key, value in keys.items()},
    }


def sentence_piece(**keys):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "▁ab"]
    scores = [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, -5.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.{key}": value for key, value in keys.items()},
    }


def pieces_of(metadata, text):
    return build_tokenizer(metadata, "it")[0].encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(pre, text):
    tokenizer, _ = build_tokenizer(byte_level(pre), "it")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())  # no merges: a token a byte


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Ġ", "1", "2"]),  # every digit alone, and the space not with it
        ("gpt-2", ["Ġ1", "2"]),
        ("llama-bpe", ["Ġ", "12"]),  # up to three digits together
        ("qwen2", ["Ġ", "1", "2"]),
    ],
)
def test_the_pre_tokenizer_decides_what_may_merge(pre, expected):
    assert pieces_of(byte_level(pre, merges=[("Ġ", "1"), ("1", "2")]), " 12") == expected


def test_smollm_splits_as_the_published_tokenizer_does():
    reference = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*bytes_alphabet(), "ĊĊ", "ĊĊĠ"])}, [("Ċ", "Ċ"), ("ĊĊ", "Ġ")])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reference.decoder = decoders.ByteLevel()
    ours = byte_level("smollm", merges=[("Ċ", "Ċ"), ("ĊĊ", "Ġ")])
    for text in [*TEXTS, "\n\n 1", "\n\n x"]:
        assert pieces_of(ours, text) == reference.encode(text).tokens


def test_qwen_text_is_normalized_and_llama3_words_in_the_vocabulary_are_not_split():
    assert pieces_of(byte_level("qwen2"), "e\u0301") == pieces_of(byte_level("qwen2"), "\u00e9")
    assert len(pieces_of(byte_level("llama-bpe"), "e\u0301")) == 3
    unreachable = byte_level("llama-bpe", merges=[("c", "d")], extra=[("abc", 1)])
    assert pieces_of(unreachable, "abc") == ["abc"]
    assert pieces_of(unreachable | {"tokenizer.ggml.pre": "gpt-2"}, "abc") == ["a", "b", "c"]


def test_control_and_user_defined_tokens_stay_whole():
    metadata = byte_level("gpt-2", extra=[("<|end|>", 3), ("<think>", 4), ("<unused>", 5)])
    tokenizer, _ = build_tokenizer(metadata, "it")
    encoding = tokenizer.encode("a<|end|><think>b<unused>")
    assert encoding.tokens[1:3] == ["<|end|>", "<think>"] and "<unused>" not in encoding.tokens
    assert tokenizer.decode(encoding.ids) == "a<think>b<unused>"
    assert tokenizer.get_vocab_size() == 259


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes():
    metadata = sentence_piece()
    assert pieces_of(metadata, "abc") == ["▁a", "bc"]  # bc scores best, then ▁a
    assert pieces_of(metadata, "ab") == ["▁ab"]  # ab (-2), then ▁ with it (-5)
    assert pieces_of(metadata, "é") == ["▁", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("text", TEXTS)
def test_sentence_piece_round_trip(text):
    tokenizer, _ = build_tokenizer(sentence_piece(), "it")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    without, _ = build_tokenizer(sentence_piece(**{"ggml.add_space_prefix": False}), "it")
    assert without.decode(without.encode(text).ids) == text


def test_special_tokens_and_template_come_from_the_metadata(gguf_file):
    path = gguf_file(metadata=sentence_piece(chat_template="{{ messages }}") | {"tokenizer.ggml.padding_token_id": 2})
    tokenizer = convert.load_tokenizer(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("abc")[0] == 1  # SentencePiece files that say nothing get a BOS
    assert tokenizer.encode("abc", add_special_tokens=False)[0] != 1
    assert tokenizer.decode(tokenizer.encode("abc"), skip_special_tokens=True) == "abc"


@pytest.mark.parametrize(("flag", "first"), [(True, 256), (False, None)])
def test_bos_follows_its_flag(gguf_file, flag, first):
    keys = {"ggml.bos_token_id": 256, "ggml.add_bos_token": flag}
    path = gguf_file(metadata=byte_level("gpt-2", extra=[("<s>", 3)], **keys))
    ids = convert.load_tokenizer(path).encode("a")
    assert len(ids) == 1 + flag and (not flag or ids[0] == first)


@pytest.mark.parametrize("metadata", [byte_level("qwen2", merges=[("a", "b")], extra=[("<s>", 3)]), sentence_piece()])
def test_saved_tokenizers_are_read_again_without_a_config(gguf_file, tmp_path, metadata):
    tokenizer = convert.load_tokenizer(gguf_file(metadata=metadata | {"tokenizer.chat_template": "{{ x }}"}))
    directory = tmp_path / "saved"
    tokenizer.save_pretrained(directory)
    assert not (directory / "config.json").exists()
    for again in (AutoTokenizer.from_pretrained(str(directory)), convert.load_tokenizer(directory)):
        assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert again.chat_template == "{{ x }}"
        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of kind 't5'.* supported: 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "with 0 tokens"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken'; supported pre-tokenizers: smollm"),
        ({"tokenizer.ggml.pre": None}, "does not say how text is split"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "its merges do not fit its tokens"),
        ({"tokenizer.ggml.merges": ["single"]}, "its merges do not fit its tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "256 tokens but 1 token types"),
        ({"tokenizer.ggml.tokens": ["a"] * 256}, "the token 'a' stands in the vocabulary twice"),
        ({"tokenizer.ggml.eos_token_id": 256}, "eos_token_id = 256 is beyond the 256 tokens"),
    ],
)
def test_vocabularies_that_cannot_be_used_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(byte_level("gpt-2") | changes, "it")
    with pytest.raises(ValueError, match="268 tokens but 2 scores"):
        build_tokenizer(sentence_piece() | {"tokenizer.ggml.scores": [0.0, 1.0]}, "it")


def test_directories_without_a_usable_tokenizer_say_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        convert.load_tokenizer(tmp_path / "x")
    with pytest.raises(ValueError, match="has no tokenizer; expected tokenizer.json or tokenizer.model"):
        convert.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match="cannot be read"):
        convert.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        convert.load_tokenizer(tmp_path)


def test_code_in_a_tokenizer_directory_is_not_run(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(byte_level("gpt-2"), "it")[0]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    try:
        convert.load_tokenizer(tmp_path)
    except ValueError as error:
        assert "cannot be read" in str(error)


def test_loading_prints_nothing(gguf_file, small):
    tensors = small.gguf_tensors(tied=True) | {"token_embd.weight": np.zeros((256, 32), np.float32)}
    path = gguf_file(tensors, metadata=byte_level("gpt-2"))
    code = f"import convert; source = convert.open_source({str(path)!r}); source.tokenizer(); source.load()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
