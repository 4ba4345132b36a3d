"""What a scene shows, and how it moves, in words.

The two are kept apart: a prompt says the one, a reference gives the other.
"""

from __future__ import annotations

import math
from random import Random

from vmt_core.world.spec import Body, Camera, Object, Scene

#: Other words for the same things, for captions that do not all sound alike. The first is the usual one.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "stick figure": ("stick figure", "person", "figure"),
    "on": ("on", "over", "in front of", "against"),
    "gray": ("gray", "grey"),
    "navy": ("navy", "dark blue"),
    "purple": ("purple", "violet"),
}
_DIRECTIONS = ("right", "lower right", "bottom", "lower left", "left", "upper left", "top", "upper right")


def appearance(scene: Scene, variety: Random | None = None) -> str:
    """`a red circle and a white star on a striped navy background`: what is seen, without a word of motion.

    Args:
        variety: chooses among SYNONYMS and word orders; None: the usual words.
    """
    say = _usual if variety is None else variety.choice
    bodies = [
        f"{_article(body.colour)} {body.colour} {say(SYNONYMS.get(_noun(body), (_noun(body),)))}"
        for body in scene.bodies
    ]
    if variety is not None:
        variety.shuffle(bodies)
    background, on = scene.background, say(SYNONYMS["on"])
    colour = say(SYNONYMS.get(background.colour, (background.colour,)))
    return f"{_listed(bodies)} {on} a {background.pattern} {colour} background"


def vocabulary() -> list[str]:
    """Every word that `appearance` can say, sorted."""
    from typing import get_args

    from vmt_core.world.spec import BACKGROUNDS, COLOURS, Pattern, ShapeName

    words = {
        *get_args(ShapeName),
        *get_args(Pattern),
        *COLOURS,
        *BACKGROUNDS,
        "a",
        "an",
        "and",
        "background",
        "pendulum",
    }
    words |= {word for phrases in SYNONYMS.values() for phrase in phrases for word in phrase.split()}
    return sorted(words)


def motion_caption(scene: Scene) -> str:
    """`the red circle bounces from left to right`: who moves and how, with nothing of the background's looks."""
    sentences = [_moves(body) for body in scene.bodies if not (isinstance(body, Object) and body.path.kind == "still")]
    if scene.camera.kind != "still":
        sentences.append(_films(scene.camera))
    return ", ".join(sentences)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _usual(words: tuple[str, ...]) -> str:
    return words[0]


def _noun(body: Body) -> str:
    return body.shape if isinstance(body, Object) else {"figure": "stick figure"}.get(body.kind, body.kind)


def _listed(things: list[str]) -> str:
    return ", ".join(things[:-1]) + (" and " if len(things) > 1 else "") + things[-1]


def _moves(body: Body) -> str:
    who = f"the {body.colour} {_noun(body)}"
    if isinstance(body, Object):
        path = body.path
        match path.kind:
            case "line":
                return f"{who} moves in a straight line {_way(path.start, path.end)}"
            case "bounce":
                return f"{who} bounces {_way(path.start, path.end)}"
            case "arc" | "orbit":
                shape = "moves along an arc" if path.kind == "arc" else "circles"
                return f"{who} {shape} {_sense(path.angle_to - path.angle_from)}"
            case "spin":
                return f"{who} spins in place {_sense(path.turn)}"
            case "scale":
                return f"{who} {'grows' if path.factor > 1 else 'shrinks'} in place"
            case _:
                return f"{who} stays still"
    if body.kind == "pendulum":
        return f"{who} swings from side to side"
    return {
        "walk": f"{who} walks {_way(body.start, body.end)}",
        "wave": f"{who} waves both arms",
        "jump": f"{who} jumps up and down",
    }[body.action]


def _films(camera: Camera) -> str:
    match camera.kind:
        case "pan":
            return f"the camera pans {_way((0.0, 0.0), camera.shift, short=True)}"
        case "zoom":
            return f"the camera zooms {'in' if camera.factor > 1 else 'out'}"
        case "roll":
            return f"the camera rolls, the scene turns {_sense(camera.turn)}"
        case "orbit":
            side = "left" if camera.shift[0] > 0 else "right"
            return f"the camera orbits the scene, the background slides to the {side}"
        case _:
            return "the camera shakes"


def _way(start: tuple[float, float], end: tuple[float, float], short: bool = False) -> str:
    """`from left to right`, or `to the right` when short."""
    sector = round(math.atan2(end[1] - start[1], end[0] - start[0]) / (math.pi / 4)) % 8
    there, back = _DIRECTIONS[sector], _DIRECTIONS[(sector + 4) % 8]
    return f"to the {there}" if short else f"from {back} to {there}"


def _sense(angle: float) -> str:
    return "clockwise" if angle > 0 else "counterclockwise"
