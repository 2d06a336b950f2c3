"""The captions of a sample; and captions from the web, rid of what says nothing about the picture.

The models that people compare with (DeepFloyd IF and what follows it) saw captions that had been
cleaned: mojibake mended, markup, addresses, file names and shop-speak taken out, quotes and dashes
made plain, all in lower case. `clean` does the same by rules of its own: its words are near theirs,
not equal; a model of theirs wants their cleaner.

Letters of all scripts stay but for the Han and the symbols around them, U+31C0 to U+9FFF, which
those cleaners drop too: T5's vocabulary is English, French, German and Romanian, and has one
"unknown" for all the rest. Whoever has an encoder that reads Chinese does not clean.

Time is linear in the length: a repeat without a bound either starts at a border that its own
characters cannot make (a lookbehind, so a run is entered once) or does not give back (`++`).
"""

import html
import re
from collections.abc import Mapping
from typing import Any

CLEANING = 1  # the version of what `clean` answers: embeddings of captions that were cleaned otherwise are stale
ROUNDS = 8  # what is taken out can bring together what is to be taken out; prose is done after two

FILES = r"(?:png|jpe?g|gif|bmp|webp|tiff?|svg|eps|psd|pdf|apk|mp4)"
WEB = r"(?:com|co|net|org|edu|gov|info|ru)"

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?:\n|\\n)[ \t]{0,9}\d{1,2}:\d\d\Z", " "),  # the time of an article, below the rest
        (r"\\[nrt](?![a-z])", " "),  # line ends that were written out
        (r"\s++", " "),  # from here on, one space is all there is between words
        (r"<person>", "person"),  # in the place of names in some data sets
        (r"</?[a-z!][^<>]*+>", " "),  # tags; not 2 < 3
        (r"(?:https?://|\bwww\.)\S*+", " "),  # addresses
        (r"(?<!\S)[^\s@]*+@\w\S*+", " "),  # @nicknames and e-mail
        (rf"(?<![\w.-])[\w.-]*\.{WEB}\b(?:/\S*+)?", " "),  # addresses without a scheme
        (rf"(?<!\S)\S*\.{FILES}\b", " "),  # file names
        (
            r"\b(?:img|dsc[fn]?|p)[_-]?\d{3,}+(?:_\d++)*+\b",
            " ",
        ),  # and those of cameras without their endings
        (r"[\u31c0-\u9fff]++", " "),  # Han and the symbols around them
        (r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]", "-"),  # dashes
        (r"[`\u00b4\u00a8\u00ab\u00bb\u201c-\u201f\u2033]", '"'),  # quotes
        (r"[\u2018-\u201b\u2032]", "'"),
        (r"&(?:quot|amp|nbsp|lt|gt|apos|#\d{1,7});?", " "),  # what is left of entities
        (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", " "),  # IP addresses
        (r"#\d++\b", " "),  # #123
        (r"\b\d{6,}+\b", " "),  # the numbers of articles
        (
            r"\b\d++(?:\.\d++)? ?[x\u00d7\u0445] ?\d++(?:\.\d++)?\b",
            " ",
        ),  # sizes; the last of the three x is Cyrillic
        (
            r"\b(?:[a-z]{1,3}\d{4,15}|[a-z]++\d{2,}+[a-z]\w*+|\d++[a-z]++\d\w*+)\b",
            " ",
        ),  # their codes: jc6640vc
        (r"\b(?:(?:worldwide|international) )?(?:free )?shipping\b", " "),  # the shop
        (r"\b(?:free )?downloads?\b(?: (?:free|now)\b)?", " "),
        (r"\bclick (?:here|for|on|to)\b(?: \w++)?", " "),
        (rf"\b{FILES}\b(?: (?:images?|files?|formats?)\b)?", " "),
        (r"\bpage \d++(?: of \d++)?\b", " "),
        (
            r"(?<![\w-])[^\W_]++(?:[-_][^\W_]++){4,}+",
            lambda found: re.sub("[-_]", " ", found[0]),
        ),  # a-title-for-an-url
        (r"\s++", " "),
        (
            r"[_#*|\\/~^=<>{}\[\]\u00a7\u00a9\u00ae\u00b7\u00ba\u2022\u2122\u00a1\u00bf]++",
            " ",
        ),  # ornaments
        (r"\.\.++|\u2026", " "),  # dots that stand for a rest
        (r"([!?,;:'\"+&%$-])\1++", r"\1"),  # !!!, ----
        (
            r"(?<!\S)[-+'\"&.,;:]++(?!\S)(?: [-+'\"&.,;:]++(?!\S))++",
            " ",
        ),  # marks whose words are gone
        (r"\( ?\)", " "),
        (r"\( ", "("),
        (r"(?<! ) ++([,.;:!?)])", r"\1"),  # no space before these
        (r"([,.;:!?])[,.;:]++", r"\1"),
        (r"\s++", " "),
        (
            r"\A[ .,;:!?)+&-]++|(?<![ ,;:(+&-])[ ,;:(+&-]++\Z",
            "",
        ),  # what no caption begins or ends with
        (r"\A([\"'])([^\"']*+)\1\Z", r"\2"),  # quotes around all of it
        (r"\A[\W_]++\Z", ""),  # no letter, no digit
    )
]


def captions(txt: str, meta: Mapping[str, Any], field: str) -> list[str]:
    """What a sample has in the caption field `field`: `txt` is KEY.txt, all others are of KEY.json,
    whose value may be one caption or a list of them. Empty ones do not count.
    """
    value = txt if field == "txt" else meta.get(field)
    found = value if isinstance(value, list) else [value]
    return [caption.strip() for caption in found if isinstance(caption, str) and caption.strip()]


def clean(text: str) -> str:
    """The caption in lower case, without what is no description; "" where nothing is left. Cleaning
    twice is once.

    (A text that changes for more than ROUNDS rounds is no caption, and is taken as it is by then.)
    """
    import ftfy  # late: it takes 0.1 s to import, and most commands do not clean

    for _ in range(ROUNDS):
        before = text
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower().strip()
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text
