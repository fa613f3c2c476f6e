"""What needles are made of: keys of two words, numbers, identifiers."""

from __future__ import annotations

import functools
import uuid
from typing import Literal

import numpy as np

Kind = Literal["words", "numbers", "uuids"]

_ADJECTIVES = """
able aged amber ample angry arctic azure bitter blank blunt bold brave breezy brief bright brisk
broad bronze calm careful cheap cheerful civil clean clear clever cloudy coarse cold common cosy
crisp crooked cruel curious curly damp dark deep delicate dense distant divine double dreary dry
dull dusty eager early earnest easy elastic elegant empty endless equal exact faint fair faithful
famous fancy fast fertile fierce fine firm flat fluffy foggy formal fragile frank free fresh
friendly frosty full funny gentle giant gifted glad glossy golden graceful grand grateful gray
greedy green gruff handy happy hardy harsh hasty hazy heavy helpful hidden hollow honest huge
humble hungry icy idle jolly joyful keen kind large lavish lazy level light likely little lively
local lonely loose loud lovely loyal lucky lunar magnetic marine meek mellow merry mighty mild
misty modern modest moody muddy narrow neat nervous nimble noble noisy normal novel odd olive
orange ordinary pale patient pearly perfect plain playful pleasant plump polite prickly proud pure
purple quaint quick quiet rapid rare ready regal rich rigid ripe robust rocky rosy rough round
royal rugged rural rustic salty scarlet secret serene sharp shiny shy silent silky silver simple
skinny sleepy slim slow small smart smooth snowy sober soft solar solid sour sparse spicy square
steady steep stern sticky stiff stormy strange strict strong sturdy subtle sudden sunny sweet swift
tall tame tender tidy tiny tranquil tricky true twin urban useful vague vast velvet violet vivid
warm wary weary wild wise witty woolly worthy young zealous
"""
_NOUNS = """
acorn actor airport anchor antler apple apron arch armor arrow atlas attic badge badger bakery
balloon banana banjo barley barn barrel basin basket beach beacon beaver beetle bell bench berry
bishop blanket blossom boat bolt book bottle boulder bowl branch brick bridge brook broom bucket
buffalo builder button cabbage cabin cable cactus camel camera canal candle canoe canvas canyon
captain caravan carpet carrot castle cave cedar cellar chain chair chalk cherry chess chimney
cinema circle cliff clock cloud clover coach coast cobra comet compass copper coral cotton cottage
cradle crane crater creek cricket crown crystal curtain cushion cypress dagger daisy dancer deer
desert diamond doctor dolphin donkey door dragon drawer drum eagle easel elbow elephant elm ember
emerald engine falcon farmer feather fence fern ferry fiddle field finch fisher flag flame flask
flute forest fossil fountain fox galaxy garden garlic gate geyser ginger glacier glove goat goblet
granite grape guitar hammer hammock harbor harp hawk hazel hedge helmet heron hill hinge honey
horizon horse hotel island ivory jacket jaguar jewel jungle kettle kitten knight ladder lagoon lake
lamp lantern laurel lemon leopard lighthouse lily lizard lobster locket lotus magnet mango mantle
maple marble market meadow medal melon meteor mill mirror mitten monkey moon mosaic moth mountain
museum mustard napkin necklace needle nest nickel oak oasis ocean onion opera orchard orchid otter
owl oyster paddle painter palace panda parrot parsley pasture peach peacock pearl pebble pelican
pencil pepper piano pigeon pillow pilot pine pistol planet plank plaza plum pocket poem pond poppy
portrait potato pottery prairie prism puddle puffin pumpkin puzzle quarry quilt rabbit radish
rafter rainbow raven reef ribbon river robin rocket rope rose ruby saddle sailor salmon sandal
satin saturn sawmill scarf school scooter sculptor seal shadow shawl shell shepherd shovel sketch
sleigh spider spoon spruce squirrel stable statue stone stove sugar summit sunset swan table tailor
tapestry teapot temple theater thimble thistle throne thunder tiger timber toast tomato torch tower
trail train treasure tree trumpet tulip tunnel turnip turtle umbrella unicorn valley vase velodrome
village vineyard violin volcano wagon walnut walrus waterfall weaver whale wheat wheel willow
window winter wolf woodland workshop yacht zebra
"""


@functools.cache
def adjectives() -> tuple[str, ...]:
    """Common English adjectives, sorted."""
    return tuple(sorted(_ADJECTIVES.split()))


@functools.cache
def nouns() -> tuple[str, ...]:
    """Common English nouns, sorted."""
    return tuple(sorted(_NOUNS.split()))


@functools.cache
def keys() -> tuple[str, ...]:
    """Every ``adjective-noun``."""
    return tuple(f"{adjective}-{noun}" for adjective in adjectives() for noun in nouns())


def draw(kind: Kind, count: int, rng: np.random.Generator, without: str = "") -> list[str]:
    """``count`` different strings; a larger count from an equal ``rng`` begins with the same ones.

    ``"words"`` are keys as ``quiet-harbor``, ``"numbers"`` have seven digits, ``"uuids"`` are
    random identifiers of version 4. None of them occurs in ``without``.

    Raises:
      ValueError: if there are not as many keys.
    """
    if kind == "words" and count > len(keys()) // 2:
        raise ValueError(f"count={count} keys are more than half of the {len(keys())} there are")
    one = {"words": _key, "numbers": _number, "uuids": _identifier}[kind]
    found: dict[str, None] = {}
    while len(found) < count:
        string = one(rng)
        if string not in without:
            found[string] = None
    return list(found)


def _key(rng: np.random.Generator) -> str:
    return keys()[rng.integers(len(keys()))]


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def _identifier(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
