r"""MATH500 and AIME 2024: find the final answer in a text, and compare it with the reference.

The last complete `\boxed{...}` is the answer; without one, what follows the last "answer is" or
"answer:"; without that, the last number. Answers are compared as text in a normal form (spaces,
`\left`, `\dfrac`, `\text`, units, degree, percent and dollar signs, commas between thousands), as
exact fractions if both are numbers (0.50, 1/2 and `\frac12` are equal, 0.33 and 1/3 are not), and
part by part if both are lists, tuples, intervals, sets or unions of them.

Not recognised: different expressions of one value, such as `x(x+1)` and `x^2+x`, `\frac{\sqrt2}{2}`
and `\frac{1}{\sqrt2}`, `\frac{2}{3}x` and `\frac{2x}{3}`, `2^{10}` and 1024; lists and sets in
another order; rounded decimals; number words; repeating decimals. Such an answer counts as wrong.
`50\%` counts as 50, and `1,234` as one number, not as two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ...errors import InputError
from .questions import Question, Row, load_questions, without_thoughts

__all__ = ["AIME24", "MATH500", "as_number", "final_answer", "normalize", "same_answer"]

_REQUEST = "\n\nSolve this step by step, and end with the final answer in \\boxed{}."

_LONGEST = 1000
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"^(-?)(?:(\d+)?\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}|({_DECIMAL}))$"
)
_NUMBER_IN_TEXT = re.compile(  # a minus after a letter, digit or bracket subtracts
    r"(?:(?<![\w)}\]])-)?"
    r"(?:\\[dtc]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?|\.\d+)"
)
_BOX = re.compile(r"\\f?boxed\s*")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[\s:=]*([^\n]+)", re.IGNORECASE)
_MATH_SPAN = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ",
        "°": "", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "\u00a0": " ", "\u202f": " ",
    }
)  # fmt: skip
_UNIT = (
    r"(?:(?:square|cubic|sq\.?|cu\.?)\s*)?(?:degrees?|units?|inch(?:es)?|f(?:oo|ee)t|ft|yards?"
    r"|miles?|mph|[ckm]m|(?:centi|kilo|milli)?met(?:er|re)s?|kg|(?:kilo)?grams?|pounds?|lbs?"
    r"|ounces?|lit(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?"
    r"|percent|points?|people|ways)(?:\s*\^\s*\{?[23]\}?)?"
)
# Applied in this order, to text that still has its spaces.
_SPACED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"\\!\s*|\{\}", ""),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
        (r"\\\\\[\d+[a-z]+\]", r"\\\\"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\{,\}", ","),
        (r"\\(?:cdot|times)(?![a-zA-Z])", "*"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", ""),
        (r"\\?[%$]", ""),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|operatorname)\b", r"\\text"),
        (r"(?<=[\d})])\s*\\text\s*\{\s*(?:[a-z]{2}[^{}]*|[mgs])\}\s*(?:\^\s*\{?[23]\}?)?$", ""),
        (r"\\text\s*\{([^{}]*)\}", r"\1"),
        (r"(?<=[\d})])\s*" + _UNIT + "$", ""),
        (r"\s*,?\s+(?:and|or)\s+", ","),
        (r"(?<![\d.,/])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    )
)
_BEFORE_RATIO = r"(?:(?<=matrix\})|(?<![\w}).^_/]))"
_UNSPACED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
        (r"(?<!\d)\*|\*(?!\d)", ""),
        (r"([\^_])\{(\w)\}", r"\1\2"),
        (_BEFORE_RATIO + r"(\d*\\?[a-zA-Z]+|\d+)/(\d+|[a-zA-Z])(?![\w{(.^/])", r"\\frac{\1}{\2}"),
        (r"(^|[(\[,])\\frac\{-([^{}+-]+)\}", r"\1-\\frac{\2}"),
        (r"(^|[(\[,])\+", r"\1"),
        (r"^[a-zA-Z]\\in(?![a-zA-Z])", ""),
        (r"^\(([A-Z])\)$", r"\1"),
    )
)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_SHORT_LEFT_SIDE = re.compile(r"(^|,)[a-zA-Z](?:_\w+)?(?:\([\w,]*\))?=")


def final_answer(text: str) -> str | None:
    """The final answer as it stands in a text, None if there is nothing like one.

    What is longer than 1000 characters is none.
    """
    answer = _find_answer(text)
    return answer if answer is not None and len(answer) <= _LONGEST else None


def _find_answer(text: str) -> str | None:
    boxes = [box for found in _BOX.finditer(text) if (box := _boxed(text, found.end()))]
    if boxes:
        return boxes[-1]
    text = text.replace("**", "").translate(_CHARACTERS)
    phrases = _ANSWER_IS.findall(text)
    if phrases:
        phrase = phrases[-1].strip()
        span = _MATH_SPAN.search(phrase)
        if span:
            return next(group for group in span.groups() if group)
        number = _NUMBER_IN_TEXT.search(phrase)
        if number and re.search(r"[a-zA-Z]{2}", phrase) and not re.search(r"[\\^]", phrase):
            return number.group()  # prose around a number
        return re.split(r"[.;](?:\s|$)", phrase, maxsplit=1)[0]
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def same_answer(given: str, wanted: str) -> bool:
    """Whether an answer equals the reference, as far as the module's text says.

    "x = 5" is 5 on either side; "2 + 3 = 5" is 5 only as the given answer.
    """
    one, other = normalize(given), normalize(wanted)
    if "=" in one and "=" not in other:
        one = _SHORT_LEFT_SIDE.sub(r"\1", one).rpartition("=")[2]
    elif "=" in other and "=" not in one:
        other = _SHORT_LEFT_SIDE.sub(r"\1", other)
    return _same(one, other)


def normalize(text: str) -> str:
    """The normal form in which answers are compared."""
    text = text.strip()
    span = _MATH_SPAN.fullmatch(text)
    if span:
        text = next(group for group in span.groups() if group)
    text = text.translate(_CHARACTERS).strip().rstrip(".;,").strip()
    for pattern, replacement in _SPACED:
        text = pattern.sub(replacement, text).strip()
    if text[:1] not in ("(", "[") and not text.startswith("\\{"):  # there, commas part
        text = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = _add_braces(re.sub(r"\s+", "", text))
    for pattern, replacement in _UNSPACED:
        text = pattern.sub(replacement, text)
    return text.casefold() if re.fullmatch(r"[a-zA-Z]{3,}", text) else text


def as_number(text: str) -> Fraction | None:
    """The exact value of a normal form that is an integer, decimal, fraction or mixed number."""
    found = _NUMBER.match(text)
    if not found or len(text) > _LONGEST:
        return None
    sign, whole, above, below, plain = found.groups()
    if plain is None and Fraction(below) == 0:
        return None
    value = Fraction(plain or above) / Fraction(below or 1) + int(whole or 0)
    return -value if sign else value


def _boxed(text: str, start: int) -> str:
    """What stands in the box that opens at `start`, "" if it is never closed."""
    if not text.startswith("{", start):
        bare = re.compile(r"[^\s$,.]+").match(text, start)
        return bare.group() if bare else ""
    end = _closing(text, start)
    return text[start + 1 : end].strip() if end else ""


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed, 0 if nowhere."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)  # "\{" is a sign, not a brace
        if depth == 0 and found.group() == "}":
            return found.start()
    return 0


def _add_braces(text: str) -> str:
    r"""Give every argument of `\frac` and `\sqrt` the braces that TeX lets one leave out."""
    result = ""
    while found := re.search(r"\\frac|\\sqrt(?:\[[^\]]*\])?", text):
        result += text[: found.end()]
        text = text[found.end() :]
        for _ in range(2 if found.group() == r"\frac" else 1):
            end = _closing(text, 0) if text.startswith("{") else 0
            if end:
                result, text = result + "{" + _add_braces(text[1:end]) + "}", text[end + 1 :]
            elif token := re.match(r"\\[a-zA-Z]+|\w", text):
                result, text = f"{result}{{{token.group()}}}", text[token.end() :]
    return result + text


def _same(one: str, other: str) -> bool:
    if one == other:
        return one != ""
    numbers = as_number(one), as_number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    first, second = _parts(one), _parts(other)
    if first is None or second is None:
        return False
    (kind, parts), (other_kind, other_parts) = first, second
    return (
        kind == other_kind
        and len(parts) == len(other_parts)
        and all(_same(a, b) for a, b in zip(parts, other_parts))
    )


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets of a list ("" for a set) and its parts, None for what is no list."""
    union = _split(text, r"\cup")
    if len(union) > 1:
        return r"\cup", union
    kind = ""
    opening = re.match(r"\\\{|[(\[]", text)
    closing = re.search(r"(?:\\\}|[)\]])$", text)
    if opening and closing and len(_split(text, ",")) == 1:
        text = text[opening.end() : closing.start()]
        kind = "" if opening.group() == r"\{" else opening.group() + closing.group()
    parts = _split(text, ",")
    return (kind, parts) if kind or len(parts) > 1 else None


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside all brackets."""
    parts, depth = [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\\.|.", text):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


@dataclass(frozen=True)
class MATH500:
    """500 problems of the MATH test set; fields `problem`, `answer` and `unique_id`."""

    name: str = "math500"
    max_new_tokens: int = 4096

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Read the problems; see `load_questions`."""
        return load_questions(self.name, path, limit, seed, self._question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """`accuracy`: the final answer equals the reference."""
        given = final_answer(without_thoughts(answer))
        right = given is not None and same_answer(given, question.reference["answer"])
        return {"accuracy": float(right)}

    def _question(self, row: Row) -> Question:
        return Question(
            id=str(row.get("unique_id")),
            prompt=row.text("problem").strip() + _REQUEST,
            reference={"answer": row.text("answer")},
        )


@dataclass(frozen=True)
class AIME24:
    """30 problems whose answers are integers from 0 to 999; `problem`, `answer` and `id`."""

    name: str = "aime24"
    max_new_tokens: int = 16384

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Read the problems, their fields in lower case or with a capital; see `load_questions`."""
        return load_questions(self.name, path, limit, seed, self._question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """`accuracy`: the final answer is the reference, leading zeros aside."""
        given = final_answer(without_thoughts(answer))
        value = as_number(normalize(given).rpartition("=")[2]) if given is not None else None
        return {"accuracy": float(value == question.reference["answer"])}

    def _question(self, row: Row) -> Question:
        answer = row.get("answer", "Answer")
        value = as_number(normalize(str(answer)))
        if value is None or value.denominator != 1 or not 0 <= value <= 999:
            raise InputError(
                f"{row.where}: the field 'answer' must be an integer from 0 to 999, it is "
                f"{answer!r}: give the file of AIME problems as it was published."
            )
        return Question(
            id=str(row.get("id", "ID")),
            prompt=row.text("problem", "Problem").strip() + _REQUEST,
            reference={"answer": int(value)},
        )
