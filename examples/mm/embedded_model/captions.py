"""What a picture may be called: from its full name to the broadest word that fits it.

A caption is *specific* (the CLDR name, in several phrasings), *keyword* (one CLDR tag or short name) or *broad* (the
kind of thing: "fruit", "an animal"). Specific captions teach a prompt to give one picture, broad ones to give many.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from common import listed

if TYPE_CHECKING:
    from data import Picture

SPECIFIC, KEYWORD, BROAD = 0, 1, 2

#: Natural broad words for each subcategory of emoji.json.
SUBCATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "animal-amphibian": ("animal", "amphibian"),
    "animal-bird": ("animal", "bird"),
    "animal-bug": ("animal", "insect", "bug"),
    "animal-mammal": ("animal", "mammal"),
    "animal-marine": ("animal", "sea animal"),
    "animal-reptile": ("animal", "reptile"),
    "cat-face": ("cat face", "face"),
    "monkey-face": ("monkey face", "animal"),
    "plant-flower": ("plant", "flower"),
    "plant-other": ("plant",),
    "food-fruit": ("food", "fruit"),
    "food-vegetable": ("food", "vegetable"),
    "food-prepared": ("food", "meal"),
    "food-asian": ("food", "asian food"),
    "food-sweet": ("food", "sweet", "dessert"),
    "drink": ("drink",),
    "dishware": ("dishes", "tableware"),
    "face-affection": ("face", "smiley", "happy face"),
    "face-concerned": ("face", "smiley", "sad face"),
    "face-costume": ("mask", "costume"),
    "face-glasses": ("face", "smiley", "face with glasses"),
    "face-hand": ("face", "smiley", "face with hand"),
    "face-hat": ("face", "smiley", "face with hat"),
    "face-negative": ("face", "smiley", "angry face"),
    "face-neutral-skeptical": ("face", "smiley", "neutral face"),
    "face-sleepy": ("face", "smiley", "sleepy face"),
    "face-smiling": ("face", "smiley", "smiling face"),
    "face-tongue": ("face", "smiley", "face with tongue"),
    "face-unwell": ("face", "smiley", "sick face"),
    "emotion": ("emotion", "comic symbol"),
    "heart": ("heart",),
    "body-parts": ("body part",),
    "family": ("family", "people"),
    "hand-fingers-closed": ("hand", "fist"),
    "hand-fingers-open": ("hand", "open hand"),
    "hand-fingers-partial": ("hand", "hand sign"),
    "hand-prop": ("hand",),
    "hand-single-finger": ("hand", "pointing hand"),
    "hands": ("hands",),
    "person": ("person",),
    "person-activity": ("person", "person doing something"),
    "person-fantasy": ("fantasy figure", "fairy tale figure"),
    "person-gesture": ("person", "person making a gesture"),
    "person-resting": ("person", "person resting"),
    "person-role": ("person", "worker", "profession"),
    "person-sport": ("person", "athlete", "person doing sport"),
    "person-symbol": ("people", "silhouette"),
    "place-building": ("building",),
    "place-religious": ("building", "religious building"),
    "place-geographic": ("landscape", "place"),
    "place-map": ("map",),
    "place-other": ("place", "scene"),
    "sky & weather": ("weather", "sky"),
    "time": ("clock", "time"),
    "transport-air": ("vehicle", "aircraft"),
    "transport-ground": ("vehicle", "transport"),
    "transport-water": ("vehicle", "ship", "boat"),
    "hotel": ("hotel",),
    "arts & crafts": ("art", "craft"),
    "award-medal": ("award", "prize"),
    "event": ("celebration", "party"),
    "game": ("game", "toy"),
    "sport": ("sport", "sports equipment"),
    "book-paper": ("paper", "book"),
    "clothing": ("clothing", "clothes"),
    "computer": ("computer", "device"),
    "household": ("household object", "home object"),
    "light & video": ("light", "camera"),
    "lock": ("lock", "key"),
    "mail": ("mail", "post"),
    "medical": ("medical object",),
    "money": ("money",),
    "music": ("music",),
    "musical-instrument": ("musical instrument", "instrument"),
    "office": ("office object", "stationery"),
    "other-object": ("object",),
    "phone": ("phone",),
    "science": ("science", "laboratory object"),
    "sound": ("sound",),
    "tool": ("tool",),
    "writing": ("writing", "pen"),
    "alphanum": ("letter sign", "button"),
    "arrow": ("arrow", "arrow sign"),
    "av-symbol": ("media button", "button"),
    "currency": ("currency sign",),
    "gender": ("gender sign",),
    "geometric": ("geometric shape", "shape"),
    "keycap": ("keycap", "number"),
    "math": ("mathematical sign", "math"),
    "other-symbol": ("symbol", "sign"),
    "punctuation": ("punctuation mark",),
    "religion": ("religious symbol", "religion"),
    "transport-sign": ("traffic sign", "sign"),
    "warning": ("warning sign", "sign"),
    "zodiac": ("zodiac sign",),
    "country-flag": ("flag", "country flag"),
    "flag": ("flag",),
    "subdivision-flag": ("flag",),
    "skin-tone": ("skin tone",),
}

#: Natural broad words for each category of emoji.json.
CATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "Smileys & Emotion": ("smiley",),
    "People & Body": ("people",),
    "Component": ("skin tone",),
    "Animals & Nature": ("nature",),
    "Food & Drink": ("food and drink",),
    "Travel & Places": ("travel",),
    "Activities": ("activity",),
    "Objects": ("object",),
    "Symbols": ("symbol",),
    "Flags": ("flag",),
}

_UNCOUNTED = frozenset(
    listed(
        """
        clothing, weather, sky, nature, food, money, mail, post, music, science, art, sport, travel, math,
        writing, people, family, hands, dishes, tableware, time, clothes, stationery, paper, transport, religion
        """
    )
)


def article(noun: str) -> str:
    """``noun`` with its indefinite article: "an apple", "a red apple"."""
    return f"{'an' if noun[:1] in 'aeio' or noun.startswith(('um', 'up')) else 'a'} {noun}"


def plural(noun: str) -> str:
    """A plain English plural of the last word."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def clean(text: str) -> str:
    """Lower case, without the quotes, colons and brackets of CLDR names, single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"[“”\"():]", " ", text.lower())).replace(" ,", ",").strip()


def name_forms(label: str) -> list[str]:
    """Natural ways to say a CLDR label; the first is its plain form."""
    if label.startswith("flag: "):
        country = clean(label.removeprefix("flag: "))
        return [f"flag of {country}", f"{country} flag", country]
    head, separator, detail = label.partition(": ")
    if not separator:
        return [clean(label)]
    if "skin tone" in detail:
        return [clean(f"{head}, {detail}"), clean(f"{head} with {detail}"), clean(f"{detail} {head}")]
    return [clean(f"{head} {detail}"), clean(f"{head} with {detail}"), clean(f"{head}, {detail}")]


def broad_words(picture: Picture) -> list[str]:
    """The broad nouns of a picture, most telling first."""
    return list(dict.fromkeys(SUBCATEGORY_WORDS[picture.subcategory] + CATEGORY_WORDS[picture.category]))


def picture_captions(picture: Picture) -> list[tuple[str, int, float]]:
    """``(caption, kind, weight)`` of one picture; the weights of each kind are relative to each other."""
    result: list[tuple[str, int, float]] = []
    forms = name_forms(picture.label)
    plain = forms[0]
    result.append((plain, SPECIFIC, 4.0))
    result += [(form, SPECIFIC, 1.0) for form in forms[1:]]
    result += [
        (article(plain), SPECIFIC, 1.5),
        (f"a picture of {article(plain)}", SPECIFIC, 0.7),
        (f"a picture of {plain}", SPECIFIC, 0.7),
        (f"{plain} emoji", SPECIFIC, 0.7),
        (f"an icon of {article(plain)}", SPECIFIC, 0.4),
        (f"a drawing of {article(plain)}", SPECIFIC, 0.4),
    ]
    if picture.is_variant:
        result += [(form, KEYWORD, 1.0) for form in name_forms(picture.base_label)]
        result += [
            (clean(tone), KEYWORD, 0.3)
            for tone in picture.label.partition(": ")[2].split(", ")
            if tone.endswith("skin tone")
        ]
    for tag in picture.tags:
        tag = clean(tag)
        if tag:
            result.append((tag, KEYWORD, 1.0 if " " in tag else 0.6))
    for rank, word in enumerate(broad_words(picture)):
        weight = 1.0 if rank < 3 else 0.5
        singular = word if word in _UNCOUNTED else article(word)
        result += [
            (word, BROAD, weight),
            (singular, BROAD, 0.5 * weight),
            (f"a picture of {singular}", BROAD, 0.4 * weight),
            (f"{word} emoji", BROAD, 0.2 * weight),
        ]
        if word not in _UNCOUNTED:
            result.append((plural(word), BROAD, 0.3 * weight))
    merged: dict[str, tuple[str, int, float]] = {}
    for caption, kind, weight in result:
        if caption not in merged:
            merged[caption] = (caption, kind, weight)
    return list(merged.values())


@dataclass(frozen=True)
class Captions:
    """All captions and which picture may carry which."""

    texts: list[str]
    """Distinct captions; index 0 is the empty one."""
    of_picture: list[list[tuple[int, int, float]]]
    """For each picture ``(caption index, kind, weight)``."""

    def sampling_table(self, shares: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(indices, weights)``, both ``(N, K)``: padded caption indices and their probabilities for each picture.

        Args:
            shares: probability of a specific, a keyword and a broad caption.
        """
        width = max(len(row) for row in self.of_picture)
        indices = torch.zeros(len(self.of_picture), width, dtype=torch.long)
        weights = torch.zeros(len(self.of_picture), width)
        for i, row in enumerate(self.of_picture):
            total = [sum(w for _, k, w in row if k == kind) for kind in range(3)]
            for j, (index, kind, weight) in enumerate(row):
                indices[i, j] = index
                weights[i, j] = shares[kind] * weight / total[kind]
        return indices, weights / weights.sum(1, keepdim=True)

    def fits(self) -> torch.Tensor:
        """``(N, number of captions)`` bool: whether the caption is one of the picture's."""
        result = torch.zeros(len(self.of_picture), len(self.texts), dtype=torch.bool)
        for i, row in enumerate(self.of_picture):
            result[i, [index for index, _, _ in row]] = True
        return result


def build_captions(pictures: list[Picture]) -> Captions:
    """Caption every picture; the order of ``texts`` is that of first use, so it is the same on every machine."""
    index: dict[str, int] = {"": 0}
    rows = []
    for picture in pictures:
        rows.append([(index.setdefault(text, len(index)), kind, w) for text, kind, w in picture_captions(picture)])
    return Captions(list(index), rows)
