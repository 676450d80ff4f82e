"""A `tokenizers` tokenizer from the vocabulary inside a GGUF file.

transformers can read these too, but needs torch for it and leaves the pre-tokenizer of some models out; here the text
is split as llama.cpp does by `tokenizer.ggml.pre`. Two kinds of vocabulary are read:

- `gpt2`: byte-level BPE, `tokens` spelled in GPT-2's byte alphabet and `merges` in order of priority;
- `llama`: SentencePiece BPE, `tokens` and `scores`; the merges are every way to cut a token into two others, best
  score first, characters without a token fall back to bytes, and spaces are written as U+2581.

Token types: 1 normal, 2 unknown, 3 control (special), 4 user defined (matched whole), 5 unused, 6 byte.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# What llama.cpp does with a vocabulary whose pre-tokenizer is only known as "default": one expression after another.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# pre-tokenizer -> what happens to the text before bytes are mapped; llama.cpp, src/llama-vocab.cpp
_SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", "gpt2"),
    "gpt-2": ("gpt2",),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "default": _DEFAULT,
}
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3")
_NORMALIZED = ("qwen2", "deepseek-r1-qwen")


def build_tokenizer(metadata: dict[str, Any], name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the settings (special tokens, chat template) that go with it in a transformers wrapper.

    ValueError: no vocabulary in the file, or one of an unsupported kind.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list) or not tokens:
        raise ValueError(
            f"{name} has a tokenizer of kind {kind!r} with {len(tokens or ())} tokens; supported: 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece BPE)"
        )
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"{name} is damaged: {len(tokens)} tokens but {len(types)} token types")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"{name} is damaged: the token {twice!r} stands in the vocabulary twice")
    build = _byte_level if kind == "gpt2" else _sentence_piece
    tokenizer = build(metadata, vocabulary, name)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer, _settings(metadata, tokens, kind, name)


def _settings(metadata: dict[str, Any], tokens: list[str], kind: str, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise ValueError(f"{name} is damaged: {key}_token_id = {index} is beyond the {len(tokens)} tokens")
        if index is not None:
            settings[f"{role}_token"] = AddedToken(tokens[index], normalized=False, special=True)
    # Files without the flag: llama.cpp puts a BOS before SentencePiece text and before Llama 3's.
    bos_by_default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _IGNORE_MERGES
    settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) and "bos_token" in settings
    settings["add_eos_token"] = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in settings
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def _byte_level(metadata: dict[str, Any], vocabulary: dict[str, int], name: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        said = "does not say how text is split (convert it again)" if pre is None else f"splits text as {pre!r}"
        raise ValueError(f"{name} {said}; supported pre-tokenizers: {', '.join(_SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        model = BPE(vocabulary, merges, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as error:  # the library's Rust side raises plain Exception
        raise ValueError(f"{name} is damaged: its merges do not fit its tokens ({error})") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre] if split != "gpt2"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in _SPLITS[pre]),
        ]
    )
    if pre in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: dict[str, Any], vocabulary: dict[str, int], name: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise ValueError(f"{name} is damaged: {len(vocabulary)} tokens but {len(scores or ())} scores")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown_token = next((token for token, index in vocabulary.items() if index == unknown), None)
    model = BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every cut of a token into two tokens, by falling score; equal scores keep the vocabulary's order."""
    found = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]
