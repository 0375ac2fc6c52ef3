"""Each word one token, whatever the captions."""

from __future__ import annotations

from invmm.training.tokenizer import merges_of, word_tokenizer

CAPTIONS = [
    "white flower",
    "flow",
    "lower flowers",
    "tear-off calendar",
    "Café",
    "squared ideograph-6708",
    "ab",
    "cab",
    "abab",
    "bcd abcd",
]


def words(tokenizer, caption: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)


def test_each_word_is_one_token_even_where_words_share_pieces():
    tokenizer = word_tokenizer(CAPTIONS)
    for caption in ("white flower", "lower flowers", "ab cab", "abab", "bcd abcd flow"):
        assert words(tokenizer, caption) == [
            "<|startoftext|>", *(f"{word}</w>" for word in caption.split()), "<|endoftext|>",
        ]  # fmt: skip
    assert len(words(tokenizer, "café")) == 3


def test_hyphens_and_digits_are_words_as_in_clip():
    tokenizer = word_tokenizer(CAPTIONS)
    assert words(tokenizer, "tear-off")[1:-1] == ["tear</w>", "-</w>", "off</w>"]
    assert words(tokenizer, "6708")[1:-1] == ["6</w>", "7</w>", "0</w>", "8</w>"]


def test_captions_come_back_from_their_ids_after_saving(tmp_path):
    from transformers import CLIPTokenizer

    word_tokenizer(CAPTIONS).save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for caption in ("white flower", "lower flowers", "bcd abcd"):
        ids = loaded(caption).input_ids
        assert ids == word_tokenizer(CAPTIONS)(caption).input_ids
        assert loaded.decode(ids, skip_special_tokens=True).strip() == caption
    assert loaded.model_max_length == 2 + len(["squared", "ideograph", "-", *"6708"])


def test_the_order_of_the_captions_does_not_matter():
    assert (
        word_tokenizer(CAPTIONS).get_vocab() == word_tokenizer(reversed(CAPTIONS * 2)).get_vocab()
    )


def test_unknown_words_are_spelled_and_unknown_signs_marked():
    tokenizer = word_tokenizer(["ab", "ba"])
    assert words(tokenizer, "aab")[1:-1] == ["a", "ab</w>"]
    assert tokenizer.unk_token_id in tokenizer("z").input_ids


def test_a_merge_of_one_word_does_not_break_another():
    """Folding every word from the left on its own would leave `c ab</w>` of "cab"."""
    assert merges_of([["a", "b</w>"], ["c", "a", "b</w>"]]) == [("a", "b</w>"), ("c", "ab</w>")]
