"""The hundred emoji and ten backgrounds that prompts name.

An emoji is called what Unicode calls it, in lower case; U+2764, HEAVY BLACK HEART there, is drawn red and called so.
Those whose Unicode name misleads at this size, or that look like another one, are not in the list.
"""

import unicodedata

# in an order that makes any first part of the list a varied one
CHARACTERS = (
    "🐙❤🐱🍎🚀🌻🍌👻🎸🌈🐸🍇🏠🐧🍓🌵💙🔑🦊🍩🚗🎈🐢🍕👑🌙🐼🍄🔥🎁"
    "🐶🍋🚒🌹🍍🤖🎺🐝🍉💎🐯🥕🚁🦋🍒🌴💚🔒🐷🍔🚜⚽🐬🌮🏆💡🦁🥑💧🍁"
    "🐮🍏⛵🌷🥝👾🎨🐞🍆🔔🐰🌽📷🦉🍑🌲💛⚡🐵🍪⏰🎲🐳🍦🎯🌟🐨🥦😀💀"
    "🦀🍭🐌🎃💜🌸🐻🍿🦄😡"
)
RENAMED = {"❤": "red heart"}

# the colour in the middle of the range that is drawn; red, green, blue in 0 ... 255
BACKGROUNDS = {
    "blue": (62, 112, 214),
    "white": (242, 242, 242),
    "black": (24, 24, 28),
    "green": (64, 158, 84),
    "red": (204, 48, 48),
    "yellow": (246, 214, 84),
    "purple": (128, 70, 180),
    "pink": (246, 168, 200),
    "orange": (240, 138, 44),
    "grey": (140, 142, 146),
}


def name_of(character: str) -> str:
    """What a prompt calls an emoji, one to four words in lower case."""
    return RENAMED.get(character) or unicodedata.name(character).lower()


EMOJI = tuple(name_of(character) for character in CHARACTERS)
COLOURS = tuple(BACKGROUNDS)


def with_article(name: str) -> str:
    """`an octopus`, `a red heart`; `grapes` and other plurals have no article."""
    if name in ("cherries", "grapes", "popcorn", "broccoli", "fire"):
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"  # of those with u, a unicorn is the only one
