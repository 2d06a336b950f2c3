"""Cleaning: examples for every rule, idempotence and linear time; the captions of a sample."""

import hashlib
import random
import subprocess
import sys

import pytest

from pipeline.text.captions import CLEANING, RULES, captions, clean

EXAMPLES = {
    "A Photo of a Cat": "a photo of a cat",
    "  much \t space\n here ": "much space here",
    # UTF-8 decoded as Latin-1.
    "caf\u00c3\u00a9 d\u00c3\u00a9j\u00c3\u00a0 vu": "caf\u00e9 d\u00e9j\u00e0 vu",
    "a &amp;quot;big&amp;quot; dog": 'a "big" dog',
    "black &amp; white": "black & white",
    "<b>Bold</b> and <br/>": "bold and",
    "&lt;i&gt;thin&lt;/i&gt;": "thin",
    "<person> on a horse": "person on a horse",
    "see http://a.b/c?d=1 now": "see now",
    "at www.foo.com/bar today": "at today",
    "from amazon.com now!!!": "from now!",
    "by @nick_name on Twitter": "by on twitter",
    "mail me@x.org please": "mail please",
    "IMG_1234.jpg": "",
    "dog IMG_1234": "dog",
    "a red car.png": "a red",
    "\u4e1c\u4eac Tokyo \u5854 tower": "tokyo tower",
    "\u043c\u0438\u0440": "\u043c\u0438\u0440",
    "\u201chello\u201d \u2014 it\u2019s": '"hello" - it\'s',
    "\u00abquoted\u00bb": "quoted",
    "dogs' bed": "dogs' bed",
    "from 192.168.0.1 server": "from server",
    "news title\n 12:45": "news title",
    "news title\\n 12:45": "news title",
    "at 12:45": "at 12:45",
    "#123 and #45678 cats": "and cats",
    "item 12345678 in red": "item in red",
    "two of 10000 lakes": "two of 10000 lakes",
    "jc6640vc shirt": "shirt",
    "h2o, r2d2 and an f150": "h2o, r2d2 and an f150",
    "1920x1080 wallpaper png images": "wallpaper",
    "boots, free shipping": "boots",
    "free download mountains": "mountains",
    "lake click for details": "lake",
    "page 12 of 30, a map": "a map",
    "red-car-in-the-old-street": "red car in the old street",
    "state-of-the-art t-shirt": "state-of-the-art t-shirt",
    "hello... world": "hello world",
    "wow!!! really??? ---- yes": "wow! really? - yes",
    "photo, http://x.y, of a cat .": "photo, of a cat.",
    "cost $5.99, 50% off (new)": "cost $5.99, 50% off (new)",
    "photo (jpg)": "photo",
    "first\\n second": "first second",
    "one | two_three": "one two three",
    "cat,; dog": "cat, dog",
    "\u2714 ?": "",
    "a ( small ) dog": "a (small) dog",
    "rock &apos roll": "rock roll",
    "5\u2032 tall": "5' tall",
    "a 10 x 15.5 print": "a print",
    "a photo - . , cat": "a photo cat",
    "": "",
    "...": "",
    "<p></p> \u4e1c": "",
}


@pytest.mark.parametrize(("text", "cleaned"), EXAMPLES.items())
def test_examples(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@pytest.mark.parametrize("seed", range(40))
def test_cleaning_is_idempotent(seed: int) -> None:
    """For random texts made of parts that the rules match, with and without spaces between."""
    draw = random.Random(seed)
    for _ in range(25):
        pieces = [
            draw.choice([*EXAMPLES, *"ab1-_.,:;'\"&#()<>@ ", "&amp;", "\ud800", "\0"])
            for _ in range(draw.randint(1, 6))
        ]
        cleaned = clean(draw.choice(["", " "]).join(pieces))
        assert clean(cleaned) == cleaned
        assert cleaned == cleaned.strip().lower()
        assert "  " not in cleaned


UNITS = [
    *"a1<@#-_(). \"'!?&\n\u4e00\u00e9\0",
    "<a",
    "a.",
    "a@",
    "#1",
    "a-",
    "a_",
    " .",
    "- ",
    "- x ",
    "&amp;",
    "&#38;",
    "1x",
]
UNITS += [
    "1.",
    "1 x ",
    "http://",
    "\n 1",
    "free ",
    "page 1 ",
    "img_1",
    "_1",
    ", ",
    "\u00c3\u00a9",
    ".png",
    "a.com",
    "&lt;",
    "a1",
]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_time_is_linear_in_the_length(unit: str) -> None:
    """A rule of quadratic time would take a minute for each of these."""
    text = unit * (30_000 // len(unit))
    for long in (text, f"{text}!", f"q{text}1 q", f"{text}-a"):
        assert len(clean(long)) <= len(long)


def test_every_rule_has_an_example() -> None:
    """Each matches an example, in its original form or after the preceding rules."""
    import ftfy

    unused = {pattern.pattern for pattern, _ in RULES}
    for text in (ftfy.fix_text(text).lower() for text in EXAMPLES):
        for pattern, replacement in RULES:
            text, count = pattern.subn(replacement, text)
            if count:
                unused.discard(pattern.pattern)
    assert not unused


def test_the_module_imports_neither_ftfy_nor_mindspore() -> None:
    code = (
        "import sys, pipeline.text.captions; "
        "sys.exit('ftfy' in sys.modules or 'mindspore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("txt", ["a dog"]),
        ("alt", ["a cat", "two"]),
        ("title", ["one"]),
        ("number", []),
        ("none", []),
        ("absent", []),
        ("blank", []),
    ],
)
def test_captions_of_a_sample(field: str, expected: list[str]) -> None:
    meta = {
        "alt": [" a cat ", "", None, 3, "two"],
        "title": "one\n",
        "number": 3,
        "none": None,
        "blank": " ",
    }
    assert captions(" a dog\n", meta, field) == expected
    assert captions("", meta, field) == ([] if field == "txt" else expected)


def test_other_rules_need_another_version() -> None:
    """Stored embeddings depend on it. If this fails, raise CLEANING and change the digest here."""
    rules = [
        (pattern.pattern, replacement if isinstance(replacement, str) else "")
        for pattern, replacement in RULES
    ]
    assert (CLEANING, hashlib.sha256(repr(rules).encode()).hexdigest()[:12]) == (1, "813fcb44f16e")
