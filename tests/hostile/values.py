"""Values that attackers put into fields: numbers at the limits of their types, and texts that steer what shows them."""

from typing import Final

# One or two of each kind that must never be in a text.
HIDDEN: Final = {
    "NUL": "\x00",
    "escape": "\x1b",
    "line feed": "\n",
    "tab": "\t",
    "delete": "\x7f",
    "first C1 control": "\x80",
    "next line": "\x85",
    "control sequence introducer": "\x9b",
    "operating system command": "\x9d",
    "last C1 control": "\x9f",
    "soft hyphen": "\u00ad",
    "Arabic letter mark": "\u061c",
    "zero width space": "\u200b",
    "left-to-right mark": "\u200e",
    "right-to-left mark": "\u200f",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "left-to-right embedding": "\u202a",
    "right-to-left embedding": "\u202b",
    "pop directional formatting": "\u202c",
    "left-to-right override": "\u202d",
    "right-to-left override": "\u202e",
    "word joiner": "\u2060",
    "left-to-right isolate": "\u2066",
    "right-to-left isolate": "\u2067",
    "first strong isolate": "\u2068",
    "pop directional isolate": "\u2069",
    "byte order mark": "\ufeff",
    "interlinear annotation": "\ufff9",
    "private use": "\ue000",
    "noncharacter": "\ufffe",
    "unassigned": "\u0378",
    "language tag": "\U000e0001",
    "tag letter": "\U000e0041",
    "private use, plane 16": "\U0010fffd",
    "last code point": "\U0010ffff",
    "non-joiner between Latin letters": "a\u200cb",
    "joiner between Latin letters": "a\u200db",
    "joiner alone": "\u200d",
}
HIDDEN_TEXTS: Final = tuple(f"a{hidden}b" for hidden in HIDDEN.values())
# Bytes that are no UTF-8: a surrogate, as CESU-8 writes it, an overlong NUL, a code point beyond the last, a cut sequence.
BAD_UTF8: Final = (b"\xed\xa0\x80", b"\xed\xb2\x9b", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xc2", b"\x9b", b"\xff")
# Texts that people write, one in each of many scripts, with the joiners and marks that their spelling needs.
READABLE: Final = (
    "left the company (ticket 4711)",
    "grüße, Łódź, Ærø, naïve: ½ §7 € – “quoted”",
    "Ноутбук украден №7",
    "Κλάπηκε ο φορητός",
    "נגנב המחשב הנייד",
    "سُرق الحاسوب المحمول",
    "می\u200cخواهم کلید را باطل کنم",
    "क\u094d\u200dष और क\u094d\u200cष",
    "র\u200d\u09cdয\u09be\u09ae",
    "\u0dc1\u0dca\u200d\u0dbb\u0dd3 ලංකා",
    "கணினி திருடப்பட்டது",
    "คอมพิวเตอร์ถูกขโมย",
    "ကွန်ပျူတာ ခိုးခံရသည်",
    "노트북 도난",
    "ノートパソコン\u3000盗難",
    "笔记本电脑被盗",
    "ხელმოწერა კომპრომეტირებულია",
    "ኮምፒውተር ተሰረቀ",
    "e\u0301 decomposed\u00a0and unbroken",
    "🔑 lost",
)
NUMBERS: Final = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
WIDE_NUMBERS: Final = (*NUMBERS, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
# Seconds and nanoseconds: at the ends of Python's calendar, of PostgreSQL's and of the type.
MOMENTS: Final = (
    *((0, 0), (-62_135_596_800, 0), (253_402_300_799, 999_999_999)),
    *((-62_135_596_801, 0), (253_402_300_800, 0), (0, -1), (0, 1_000_000_000), (0, 2**31 - 1), (0, -(2**31))),
    *((-210_866_803_200, 0), (-210_866_803_201, 0), (9_224_318_015_999, 0), (9_224_318_016_000, 0)),
    *((2**31, 0), (2**63 - 1, 0), (-(2**63), 0)),
)
