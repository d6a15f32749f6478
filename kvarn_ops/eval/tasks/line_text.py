"""Line retrieval in words (after LongEval): one of many named numbers is asked for.

Prompts are made from a seed, so there is no data file. The first number of four digits or more in
an answer counts: models without a chat template go on with further lines after it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from .questions import Question, check_limit, without_thoughts

__all__ = ["LineText"]

_DEFAULT_COUNT = 100

_ADJECTIVES = """
    able amber ancient azure bitter bold brave brief bright broad calm careful cheap clean clever
    cloudy cold cosy crisp curly daring dark deep dense dusty eager early empty faint fancy fast
    fierce firm flat fresh gentle giant glad golden grand happy harsh heavy hollow humble icy idle
    jolly keen kind large lazy light lively lonely loud lucky mellow mighty mild modest narrow neat
    noble odd pale plain proud quick quiet rapid rare rough round rusty salty sharp shy silent
    silver simple sleepy slim smooth soft solid sour stable steep stiff strange sturdy subtle sweet
    swift tall tame tender thick thin tidy tiny tough vast vivid warm weary wide wild wise young
"""
_NOUNS = """
    acorn anchor apple arrow badger barrel basin beacon bell bench bird boat bottle branch bridge
    bucket button cabin camel candle canyon carpet castle cellar chair cherry cliff clock cloud
    coast comet copper cottage cradle crane cricket crown desert dolphin dragon drum eagle engine
    falcon feather fence ferry field flute forest fountain fox garden glacier goose guitar hammer
    harbor hedge heron hill island jacket kettle kitten ladder lantern lemon lizard maple marble
    meadow mirror monkey mountain needle oak ocean olive orchard otter owl paddle palace parrot
    pebble pepper piano pigeon pillow planet pocket pond quarry rabbit raven ribbon river rocket
    saddle salmon shadow shovel spider spoon squirrel stone summit table teapot temple thunder
    tiger tower trumpet tunnel turtle valley vessel violin wagon walnut whale window winter zebra
"""
_NAMES = tuple(f"{a}-{n}" for a in _ADJECTIVES.split() for n in _NOUNS.split())
_NUMBER = re.compile(r"\d{4,}")

_HEAD = (
    "Here is a list of lines. Every line has a name, and a number that is its REGISTER_CONTENT. "
    "After the list you are asked for one of the numbers.\n\n"
)
_TAIL = (
    "\nWhat is the REGISTER_CONTENT of line {name}? Answer with this line in the form in which it "
    "stands above, and nothing else.\n"
)


@dataclass(frozen=True)
class LineText:
    """Prompts of `lines` lines, about 20 tokens each.

    Raises
    ------
    InputError
        If there are not as many names.
    """

    name: str = "line_text"
    max_new_tokens: int = 64
    lines: int = 300

    def __post_init__(self) -> None:
        if not 1 <= self.lines <= len(_NAMES):
            raise InputError(f"lines must be from 1 to {len(_NAMES)}, not {self.lines}.")

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Make `limit` questions, 100 for None; a smaller limit gives the first of a larger one.

        Raises
        ------
        InputError
            If a path is given, or the limit is below 1.
        """
        check_limit(limit)
        if path is not None:
            raise InputError(f"{self.name} makes its own prompts: leave {str(path)!r} out.")
        count = _DEFAULT_COUNT if limit is None else limit
        return [self._question(seed, index) for index in range(count)]

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """`accuracy`: the first number of four digits or more is the one of the line."""
        found = _NUMBER.search(re.sub(r"(?<=\d),(?=\d{3})", "", without_thoughts(answer)))
        right = found is not None and found.group() == question.reference["number"]
        return {"accuracy": float(right)}

    def _question(self, seed: int, index: int) -> Question:
        draw = random.Random(f"{self.name}/{seed}/{index}")
        names = draw.sample(_NAMES, self.lines)
        numbers = [str(number) for number in draw.sample(range(10_000, 100_000), self.lines)]
        asked = draw.randrange(self.lines)
        listing = "".join(
            f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in zip(names, numbers)
        )
        return Question(
            id=f"{self.lines}/{seed}/{index}",
            prompt=_HEAD + listing + _TAIL.format(name=names[asked]),
            reference={"number": numbers[asked], "line": asked},
        )
