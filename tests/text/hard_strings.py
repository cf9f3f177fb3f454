# ruff: noqa: RUF001
"""Texts on which tokenizers like to differ."""

HARD_STRINGS = {
    "empty": "",
    "plain": "The capital of France is Paris.",
    "contractions": "I'm you'll he'd they've it's don't WE'RE I'M 's 'S ’s",
    "digits": "1 12 123 1234 12345678901 3.14159 1,000,000 2026-11-24 0x1F ٣٤٥ ४५ ½ ² Ⅷ",
    "spaces before digits": "x =  12\n    1\n\t2  3   4",
    "spaces": " a  b   c    d     \n  \n\n \n e\t\tf \r\n g\r\r\n   ",
    "exotic spaces": "a\u00a0b\u3000c\u2028d\u200be\ufefff",
    "code": "def f(x: int) -> str:\n    return [f'{x:>{8}}' for _ in range(10)]  # done\n\n\nclass A(B):\n\tpass\n",
    "signs": '!!! ... ??? ((({[<>]}))) &amp; // /* */ <- => ::= #include <a/b.h> $x_1 @me __init__ --flag="v"',
    "camel case": "getHTTPResponseCode XMLHttpRequest iPhone McDonald ÀÉÎõü ǅungla",
    "european": "Größe, naïveté, smørrebrød, žluťoučký kůň, Łódź, çok güzel, Ελληνικά, Русский язык",
    "asian": "東京都に住んでいます。你好,世界!안녕하세요 สวัสดีครับ नमस्ते दुनिया",
    "right to left": "שלום עולם مرحبا بالعالم ١٢٣",
    "emoji": "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ☃",
    "composed": "caf\u00e9 \u00c5ngstr\u00f6m \ud55c\uae00",
    "decomposed": "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab q\u0307\u0323",
    "control characters": "\x00\x01\x1b[0m\x7f\x85",
    "long word": "a" * 300 + "ß" * 50,
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|eot_id|><|begin_of_text|>x<think></think>",
    "almost special": "<|im_start |> <|im_end| > <im_end> <|begin_of_text",
    "tool marks": "<tool_call>\n{}\n</tool_call> <repo_name>x<file_sep>",
    "outside the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 \U0010fffd",
}
