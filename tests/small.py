"""A tokenizer small enough to read: words of a small town, with the special tokens of BERT."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    "a", "all", "an", "and", "at", "baker", "be", "bread", "buy", "cat", "child", "dog", "does", "eat", "end", "fish",
    "for", "go", "good", "he", "her", "home", "in", "is", "it", "king", "made", "man", "milk", "not", "of", "old",
    "queen", "read", "see", "she", "the", "to", "town", "what", "where", "who", "woman", "?", ".",
)  # fmt: skip


def tokenizer(*, words: tuple[str, ...] = WORDS, special: bool = True, **options: object) -> PreTrainedTokenizerFast:
    """Word by word in lower case, [CLS] before and [SEP] behind; `special=False`: as GPT-2's, which adds nothing.

    `options` replace what the tokenizer says of its special tokens, such as `pad_token=None`.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    known = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")} | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{name: token for name, token in known.items() if token})
