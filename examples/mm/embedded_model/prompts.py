"""The prompts that ship beside the model, and those it is judged by."""

from __future__ import annotations

from captions import SUBCATEGORY_WORDS, article, name_forms
from common import listed
from data import DataSet

#: Fixed validation prompts: recognisable things, and four broad words.
VALIDATION = listed(
    """
    red apple, a pineapple, dog face, a penguin, a butterfly, a sunflower, a picture of a cactus, pizza, a birthday
    cake, soccer ball, guitar, a rocket, an automobile, a sailboat, a house, umbrella, red heart, grinning face, a
    fire engine, an octopus, a fruit, an animal, a vehicle, a building
    """
)

#: 64 prompts that name one thing each, for the retrieval figure.
SPECIFIC = listed(
    """
    red apple, pineapple, banana, strawberry, watermelon, grapes, lemon, carrot, hamburger, pizza, hot dog, birthday
    cake, ice cream, doughnut, hot beverage, wine glass, dog face, cat face, pig face, panda, lion, tiger face,
    elephant, unicorn, penguin, owl, butterfly, lady beetle, octopus, snail, turtle, spouting whale, sunflower,
    rose, cactus, deciduous tree, four leaf clover, mushroom, automobile, bus, fire engine, bicycle, rocket,
    helicopter, sailboat, house, castle, mount fuji, soccer ball, basketball, guitar, trumpet, hammer, umbrella,
    light bulb, key, open book, gem stone, crown, red heart, star, grinning face, skull, jack-o-lantern
    """
)

#: Broad prompts, for the diversity figure.
BROAD_WORDS = ("fruit", "animal", "bird", "vehicle", "building", "drink", "face", "plant")

#: Subcategories whose pictures show a thing anybody knows by sight.
_TRAINING_SUBCATEGORIES = listed(
    """
    animal-bird, animal-bug, animal-mammal, animal-marine, animal-reptile, plant-flower, plant-other, food-fruit,
    food-vegetable, food-prepared, food-sweet, food-asian, drink, transport-air, transport-ground, transport-water,
    place-building, sport, musical-instrument, tool, clothing, face-smiling, household
    """
)


def training_prompts(data: DataSet) -> list[str]:
    """Prompts for reward tuning: a few hundred names in two phrasings, then broad words; no validation prompt."""
    prompts: list[str] = []
    for picture in data.pictures:
        if picture.subcategory in _TRAINING_SUBCATEGORIES and not picture.is_variant:
            plain = name_forms(picture.label)[0]
            prompts.append(plain if len(prompts) % 3 else article(plain))
    words = dict.fromkeys(word for subcategory in _TRAINING_SUBCATEGORIES for word in SUBCATEGORY_WORDS[subcategory])
    broad = [text for word in words for text in (article(word), f"a picture of {article(word)}")]
    known = set(data.captions.texts)  # leaves out "a clothing" and the like
    unwanted = {variant for prompt in VALIDATION for variant in (prompt, prompt.removeprefix("a picture of "))}
    return [prompt for prompt in dict.fromkeys([*prompts, *broad]) if prompt in known and prompt not in unwanted]


def picture_of(prompt: str, data: DataSet) -> int:
    """The index of the one picture whose full name ``prompt`` is."""
    found = [i for i, picture in enumerate(data.pictures) if name_forms(picture.label)[0] == prompt]
    if len(found) != 1:
        raise ValueError(f"{prompt!r} names {len(found)} pictures, expected one")
    return found[0]
