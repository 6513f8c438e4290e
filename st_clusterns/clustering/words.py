"""The words of a text in any language: as terms that texts share, and as pieces that a text is cut into.

A term is a run of letters, marks and digits. In scripts that are written without spaces, each pair of adjacent
characters counts as a term, as in search engines (the CJK bigrams of Lucene). The vowel marks of Arabic and Hebrew,
which most texts leave out, do not count. A piece is what stands between spaces; without spaces, a character.
"""

from __future__ import annotations

import unicodedata

import regex

SOUTH_EAST_ASIAN = r"\p{Line_Break=Complex_Context}"  # Thai, Lao, Khmer, Burmese and others
UNSPACED = rf"[[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ー{SOUTH_EAST_ASIAN}]--\p{{M}}]"
CHARACTER = rf"{UNSPACED}\p{{M}}*"
WORDS = regex.compile(rf"(?V1)(?=({CHARACTER}{CHARACTER})){CHARACTER}|((?!\p{{M}})[\w--{UNSPACED}]{{2,}})")
VOWEL_MARKS = regex.compile(r"(?<=[\p{Arabic}\p{Hebrew}])\p{Mn}+")
PIECES = regex.compile(rf"(?V1){CHARACTER}\s*|(?:(?!{UNSPACED})\S)+\s*")
CHARACTERS = regex.compile(rf"(?V1){CHARACTER}")


def split_words(text: str) -> list[str]:
    """Return the words of a text in any language, in lower case; those of a single letter are left out."""
    return [pair or word for pair, word in WORDS.findall(fold_case(text))]


def fold_case(text: str) -> str:
    """Return a text as words are compared: in lower case and composed characters, without optional vowel marks."""
    folded: str = VOWEL_MARKS.sub("", unicodedata.normalize("NFKC", text).lower())
    return folded


def split_pieces(text: str) -> list[str]:
    """Cut a text into its pieces, each with the space that follows it: joined, they are the text with single spaces."""
    words = text.split()
    if not CHARACTERS.search(text):  # most texts: five times as fast
        return [f"{word} " for word in words[:-1]] + words[-1:]
    pieces: list[str] = PIECES.findall(" ".join(words))
    return pieces


def count_words(text: str) -> float:
    """Return the number of words of a text; where no spaces are written, two characters count as one."""
    characters = len(CHARACTERS.findall(text))
    return len(split_pieces(text)) - characters / 2 if characters else len(text.split())
