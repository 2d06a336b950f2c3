"""Captions of a sample, and the cleaning of captions from the web.

Models that users compare with (DeepFloyd IF and its successors) were trained on cleaned captions:
mojibake repaired, markup, addresses, file names and advertising removed, quotes and dashes
normalized, all in lower case. `clean` does the same by its own rules: its output is close to
theirs, not equal; to run one of their models, use their cleaner.

Letters of all scripts are kept except Han and the symbols around it, U+31C0 to U+9FFF, which those
cleaners remove too: T5's vocabulary covers English, French, German and Romanian, and maps all other
characters to one "unknown" token. With an encoder that reads Chinese, do not clean.

Time is linear in the length: each unbounded repeat either starts at a boundary that its own
characters cannot form (a lookbehind, so that each run is entered once) or is possessive (`++`).
"""

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

# The version of `clean`: embeddings of captions that another version cleaned are stale.
CLEANING = 1

# What is removed can bring together what has to be removed; prose is stable after two rounds.
MAX_ROUNDS = 8

FILES = r"(?:png|jpe?g|gif|bmp|webp|tiff?|svg|eps|psd|pdf|apk|mp4)"
WEB = r"(?:com|co|net|org|edu|gov|info|ru)"


def _split_slug(match: re.Match[str]) -> str:
    return re.sub("[-_]", " ", match[0])


# Patterns and their replacements, in order.
RULES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # The time of an article, below the text.
        (r"(?:\n|\\n)[ \t]{0,9}\d{1,2}:\d\d\Z", " "),
        # Line ends in escaped form.
        (r"\\[nrt](?![a-z])", " "),
        # From here on, words are separated by single spaces.
        (r"\s++", " "),
        # Some data sets replace names by this.
        (r"<person>", "person"),
        # Tags; not 2 < 3.
        (r"</?[a-z!][^<>]*+>", " "),
        # URLs.
        (r"(?:https?://|\bwww\.)\S*+", " "),
        # @nicknames and e-mail addresses.
        (r"(?<!\S)[^\s@]*+@\w\S*+", " "),
        # URLs without a scheme.
        (rf"(?<![\w.-])[\w.-]*\.{WEB}\b(?:/\S*+)?", " "),
        # File names.
        (rf"(?<!\S)\S*\.{FILES}\b", " "),
        # Cameras' file names without their suffix.
        (r"\b(?:img|dsc[fn]?|p)[_-]?\d{3,}+(?:_\d++)*+\b", " "),
        # Han and the symbols around it.
        (r"[\u31c0-\u9fff]++", " "),
        # Dashes.
        (r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]", "-"),
        # Quotes.
        (r"[`\u00b4\u00a8\u00ab\u00bb\u201c-\u201f\u2033]", '"'),
        (r"[\u2018-\u201b\u2032]", "'"),
        # Entities that remain after unescaping.
        (r"&(?:quot|amp|nbsp|lt|gt|apos|#\d{1,7});?", " "),
        # IP addresses.
        (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", " "),
        # #123
        (r"#\d++\b", " "),
        # Article numbers.
        (r"\b\d{6,}+\b", " "),
        # Sizes such as 10 x 15; the last of the three x is Cyrillic.
        (r"\b\d++(?:\.\d++)? ?[x\u00d7\u0445] ?\d++(?:\.\d++)?\b", " "),
        # Article codes such as jc6640vc.
        (r"\b(?:[a-z]{1,3}\d{4,15}|[a-z]++\d{2,}+[a-z]\w*+|\d++[a-z]++\d\w*+)\b", " "),
        # Advertising.
        (r"\b(?:(?:worldwide|international) )?(?:free )?shipping\b", " "),
        (r"\b(?:free )?downloads?\b(?: (?:free|now)\b)?", " "),
        (r"\bclick (?:here|for|on|to)\b(?: \w++)?", " "),
        (rf"\b{FILES}\b(?: (?:images?|files?|formats?)\b)?", " "),
        (r"\bpage \d++(?: of \d++)?\b", " "),
        # a-title-in-a-url
        (r"(?<![\w-])[^\W_]++(?:[-_][^\W_]++){4,}+", _split_slug),
        (r"\s++", " "),
        # Ornaments.
        (r"[_#*|\\/~^=<>{}\[\]\u00a7\u00a9\u00ae\u00b7\u00ba\u2022\u2122\u00a1\u00bf]++", " "),
        # An ellipsis.
        (r"\.\.++|\u2026", " "),
        # !!!, ----
        (r"([!?,;:'\"+&%$-])\1++", r"\1"),
        # Punctuation whose words were removed.
        (r"(?<!\S)[-+'\"&.,;:]++(?!\S)(?: [-+'\"&.,;:]++(?!\S))++", " "),
        (r"\( ?\)", " "),
        (r"\( ", "("),
        # No space before these.
        (r"(?<! ) ++([,.;:!?)])", r"\1"),
        (r"([,.;:!?])[,.;:]++", r"\1"),
        (r"\s++", " "),
        # Punctuation at the start and at the end.
        (r"\A[ .,;:!?)+&-]++|(?<![ ,;:(+&-])[ ,;:(+&-]++\Z", ""),
        # Quotes around the whole caption.
        (r"\A([\"'])([^\"']*+)\1\Z", r"\2"),
        # Neither a letter nor a digit.
        (r"\A[\W_]++\Z", ""),
    )
]


def captions(txt: str, meta: Mapping[str, Any], field: str) -> list[str]:
    """The captions of a sample in the caption field `field`, without empty ones.

    Field `txt` is KEY.txt (`txt`); all others are fields of KEY.json (`meta`), with one caption or
    a list of them.
    """
    value = txt if field == "txt" else meta.get(field)
    values = value if isinstance(value, list) else [value]
    return [caption.strip() for caption in values if isinstance(caption, str) and caption.strip()]


def clean(text: str) -> str:
    """The caption in lower case, without what does not describe the image; "" if nothing is left.
    Idempotent.

    (A text that still changes after MAX_ROUNDS rounds is no caption, and is returned as it then
    is.)
    """
    # Imported here: it takes 0.1 s, and most commands do not clean.
    import ftfy

    for _ in range(MAX_ROUNDS):
        before = text
        # Twice, as text from the web is often escaped twice: &amp;quot;.
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower().strip()
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text
