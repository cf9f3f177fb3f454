"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` metadata, checked and made into one of the tokenizers library.

GGUF names the rule by which text is split before merging (`pre`) but does not hold it, so the rules are written here.
Nothing of the file is trusted: types, lengths and ids are checked. Using the tokenizer is for tokenizer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from freehold.errors import BadFile, UnsupportedModel

PREFIX = "tokenizer.ggml."
MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 22
# Kinds of token_type. The others, normal, unknown, unused and byte, are never recognised in a text as a whole.
CONTROL, USER_DEFINED = 3, 4

# One letter run, digit run, sign run or space run at a time; a run takes along the one space before it.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same with contractions in any case, line ends kept with signs, and digits in groups.
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words end where a capital follows a small letter.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How a family splits text before merging, and what else its `pre` implies."""

    pattern: str
    digits_first: bool = False  # each digit alone, before the pattern sees the text
    composes: bool = False  # Unicode NFC first, as Qwen's own tokenizer does and llama.cpp does not
    whole_tokens_first: bool = False  # a piece that is a token is taken without merging
    adds_bos: bool = False  # where add_bos_token is not stored


LLAMA3 = SplitRule(pattern=GPT4_SPLIT.format(digits=r"\p{N}{1,3}"), whole_tokens_first=True, adds_bos=True)
RULES = {
    "gpt-2": SplitRule(pattern=GPT2_SPLIT),
    "smollm": SplitRule(pattern=GPT2_SPLIT, digits_first=True),
    "qwen2": SplitRule(pattern=GPT4_SPLIT.format(digits=r"\p{N}"), composes=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "pixtral": LLAMA3,  # what published files of Nemotron 3 Nano carry; llama.cpp takes it for llama-bpe
    "tekken": SplitRule(pattern=TEKKEN_SPLIT, whole_tokens_first=True, adds_bos=True),
}


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """What a GGUF file says of its tokenizer, checked."""

    rule: SplitRule
    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    bos_id: int | None
    eos_id: int | None
    end_ids: list[int]
    adds_bos: bool

    def make_core(self) -> Core:
        """Return a tokenizer that gives each token the id of its place in the file. Raises: BadFile."""
        ids = {token: index for index, token in enumerate(self.tokens)}
        try:
            model = models.BPE(vocab=ids, merges=self.merges, ignore_merges=self.rule.whole_tokens_first)
        except Exception as error:  # the library raises nothing narrower
            raise BadFile(f"{PREFIX}merges do not fit the tokens: {' '.join(str(error).split())[:200]}") from None
        core = Core(model)
        if self.rule.composes:
            core.normalizer = normalizers.NFC()
        core.pre_tokenizer = _splitter(self.rule)
        core.decoder = decoders.ByteLevel()
        for kind, add in ((CONTROL, core.add_special_tokens), (USER_DEFINED, core.add_tokens)):
            found = [token for token, this in zip(self.tokens, self.kinds, strict=True) if this == kind]
            add([AddedToken(token, special=kind == CONTROL, normalized=False) for token in found])
        if self.adds_bos and self.bos_id is not None:
            bos = self.tokens[self.bos_id]
            core.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, self.bos_id)]
            )
        return core


def read_gguf_vocabulary(metadata: Mapping[str, Any]) -> GgufVocabulary:
    """Return the checked vocabulary. Raises: BadFile, or UnsupportedModel for another kind or an unknown `pre`."""
    kind = metadata.get(f"{PREFIX}model")
    if kind != "gpt2":
        raise UnsupportedModel(f"{PREFIX}model is {str(kind)[:60]!r}; byte-level BPE ('gpt2') is supported")
    pre = metadata.get(f"{PREFIX}pre", "gpt-2")
    if not isinstance(pre, str) or pre not in RULES:
        known = ", ".join(sorted(RULES))
        raise UnsupportedModel(
            f"{PREFIX}pre is {str(pre)[:60]!r}; known are {known}",
            hint="take the model's safetensors folder: its tokenizer.json holds the rule itself",
        )
    if metadata.get(f"{PREFIX}add_eos_token") is True:
        raise UnsupportedModel(f"{PREFIX}add_eos_token is set; no supported family ends a prompt with EOS")
    tokens = _strings(metadata, "tokens", limit=MAX_TOKENS)
    bos_id, eos_id = _token_id(metadata, "bos", len(tokens)), _token_id(metadata, "eos", len(tokens))
    ends = (eos_id, _token_id(metadata, "eot", len(tokens)), _token_id(metadata, "eom", len(tokens)))
    return GgufVocabulary(
        rule=RULES[pre],
        tokens=tokens,
        kinds=_kinds(metadata, len(tokens)),
        merges=_pairs(_strings(metadata, "merges", limit=MAX_MERGES)),
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=[end for end in ends if end is not None],
        adds_bos=bos_id is not None and _flag(metadata, "add_bos_token", default=RULES[pre].adds_bos),
    )


def _splitter(rule: SplitRule) -> pre_tokenizers.PreTokenizer:
    digits = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits_first else []
    pattern = pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*digits, pattern, to_bytes])


def _strings(metadata: Mapping[str, Any], name: str, *, limit: int) -> list[str]:
    values = metadata.get(PREFIX + name)
    if not isinstance(values, list) or not {str}.issuperset(map(type, values)):
        raise BadFile(f"{PREFIX}{name} is not a list of texts")
    if not 0 < len(values) <= limit:
        raise BadFile(f"{PREFIX}{name} has {len(values):,} entries where 1 to {limit:,} are wanted")
    if len(set(values)) != len(values):
        raise BadFile(f"{PREFIX}{name} holds an entry twice")
    return values


def _kinds(metadata: Mapping[str, Any], num_tokens: int) -> list[int]:
    kinds = metadata.get(f"{PREFIX}token_type")
    if not isinstance(kinds, list) or not {int}.issuperset(map(type, kinds)) or not set(range(7)).issuperset(kinds):
        raise BadFile(f"{PREFIX}token_type is not a list of kinds from 0 to 6")
    if len(kinds) != num_tokens:
        raise BadFile(f"{PREFIX}token_type has {len(kinds):,} entries for {num_tokens:,} tokens")
    return kinds


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or "" in pair:
            raise BadFile(
                f"{PREFIX}merges holds {' '.join(pair)[:60]!r} where two tokens with one space between are wanted"
            )
    return pairs


def _token_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token_id = metadata.get(f"{PREFIX}{name}_token_id")
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < num_tokens:
        raise BadFile(f"{PREFIX}{name}_token_id is {str(token_id)[:60]}; the file has {num_tokens:,} tokens")
    return token_id


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = metadata.get(PREFIX + name, default)
    if not isinstance(value, bool):
        raise BadFile(f"{PREFIX}{name} is {str(value)[:60]!r} where true or false is wanted")
    return value
