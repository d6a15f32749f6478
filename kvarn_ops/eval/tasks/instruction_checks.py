"""The 25 verifiable instructions of IFEval, and whether a text follows one.

Written after the published description; where its checks are plain rules, these are meant to
give the same verdict. They differ in three places, which need packages there:

- sentences: a full stop, question or exclamation mark ends one if a blank follows, not after common
  abbreviations, initials and the numbers of a list; line ends alone end nothing;
- the language of a text, also for "all in English capitals": see `language_guess`;
- words in capitals: letters and digits joined by `-`, `'`, `.` or `&` are one word.

Key words are text here, not regular expressions. Paragraphs that are blank count for nothing in
`nth_paragraph_first_word`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...errors import InputError
from .language_guess import LANGUAGES, likely_languages

__all__ = ["INSTRUCTIONS", "Instruction", "count_sentences"]

Arguments = Mapping[str, Any]
_RELATIONS = {"at least": int.__ge__, "less than": int.__lt__}
_FIXED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|e\\.g|i\\.e|inc|ltd|co|corp|dept|approx|u\\.s|u\\.k|a\\.m|p\\.m"
    "|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|[a-hj-z]"  # and initials
)
_NO_END = re.compile(rf"(?:^|[\s(\"'*])(?:{_ABBREVIATIONS})$|^\s*\d+$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?:[.!?]+[\"'”’)\]*_]*(?=\s)|[。！？।]+)")


class Instruction(NamedTuple):
    """A check, and the arguments that it needs with their types."""

    follows: Callable[[str, Arguments], bool]
    arguments: dict[str, type]

    def check_arguments(self, where: str, name: str, given: Arguments) -> None:
        """Refuse arguments that are missing or wrong, and say `where` they stand.

        Raises
        ------
        InputError
            If there are such.
        """
        for argument, kind in self.arguments.items():
            value: Any = given.get(argument)
            if not isinstance(value, kind):
                right, wanted = False, kind.__name__
            elif argument.endswith("relation"):
                right, wanted = value in _RELATIONS, " or ".join(_RELATIONS)
            elif argument == "language":
                right, wanted = _language(value) in LANGUAGES, ", ".join(sorted(LANGUAGES))
            else:
                right, wanted = kind is not list or _all_text(value), "a list of words"
            if not right:
                raise InputError(
                    f"{where}: the instruction {name!r} needs the argument {argument!r} "
                    f"({wanted}), it is {value!r}: correct this record, or remove it."
                )


def count_sentences(text: str) -> int:
    """Sentences of a text, by the rule in the module's text."""
    count, start = 0, 0
    for found in _SENTENCE_END.finditer(text):
        line = text[start : found.start()].rpartition("\n")[2]
        if re.match(r"\.(?![.!?])", found.group()) is None or not _NO_END.search(line):
            count += _says_something(text[start : found.start()])
            start = found.end()
    return count + _says_something(text[start:])


def _says_something(text: str) -> bool:
    return any(letter.isalnum() for letter in text)


def _all_text(words: list[Any]) -> bool:
    return all(isinstance(word, str) for word in words)


def _relation(name: str, count: int, limit: int) -> bool:
    return _RELATIONS[name](count, limit)


def _language(code: str) -> str:
    return code.split("-")[0].casefold()


def _is_english(text: str) -> bool:
    likely = likely_languages(text)
    return not likely or "en" in likely


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _has_keywords(text: str, arguments: Arguments) -> bool:
    return all(word.lower() in text.lower() for word in arguments["keywords"])


def _keyword_frequency(text: str, arguments: Arguments) -> bool:
    count = text.lower().count(arguments["keyword"].strip().lower())
    return _relation(arguments["relation"], count, arguments["frequency"])


def _forbidden_words(text: str, arguments: Arguments) -> bool:
    return not any(_has_word(text, word) for word in arguments["forbidden_words"])


def _letter_frequency(text: str, arguments: Arguments) -> bool:
    count = text.lower().count(arguments["letter"].strip().lower())
    return _relation(arguments["let_relation"], count, arguments["let_frequency"])


def _response_language(text: str, arguments: Arguments) -> bool:
    likely = likely_languages(text)
    return not likely or _language(arguments["language"]) in likely


def _number_sentences(text: str, arguments: Arguments) -> bool:
    return _relation(arguments["relation"], count_sentences(text), arguments["num_sentences"])


def _number_paragraphs(text: str, arguments: Arguments) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not parts[0]:  # a divider may stand at either end
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return all(parts) and len(parts) == arguments["num_paragraphs"]


def _number_words(text: str, arguments: Arguments) -> bool:
    return _relation(arguments["relation"], len(re.findall(r"\w+", text)), arguments["num_words"])


def _nth_paragraph_first_word(text: str, arguments: Arguments) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    nth = arguments["nth_paragraph"]
    if len(paragraphs) != arguments["num_paragraphs"] or not 1 <= nth <= len(paragraphs):
        return False
    word = re.match(r"[\"']*([^\s.,?!\"']*)", paragraphs[nth - 1])
    return word is not None and word.group(1).lower() == arguments["first_word"].lower()


def _number_placeholders(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= arguments["num_placeholders"]


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = re.escape(arguments["postscript_marker"].strip().lower())
    return re.search(marker.replace(r"\.", r"\.\s?"), text.lower()) is not None


def _number_bullet_lists(text: str, arguments: Arguments) -> bool:
    bullets = re.findall(r"^[^\S\n]*(?:\*[^*\n]|-)", text, re.MULTILINE)
    return len(bullets) == arguments["num_bullets"]


def _constrained_response(text: str, arguments: Arguments) -> bool:
    return any(response in text for response in _FIXED_RESPONSES)


def _number_highlights(text: str, arguments: Arguments) -> bool:
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    count = sum(bool((bold or slanted).strip()) for bold, slanted in found)
    return count >= arguments["num_highlights"]


def _multiple_sections(text: str, arguments: Arguments) -> bool:
    mark = re.escape(arguments["section_spliter"].strip())
    return len(re.findall(rf"{mark}\s?\d+", text)) >= arguments["num_sections"]


def _json_format(text: str, arguments: Arguments) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, arguments: Arguments) -> bool:
    titles = (line[line.find("<<") : line.rfind(">>")] for line in text.split("\n") if "<<" in line)
    return any(title.strip("<> \t") for title in titles)


def _two_responses(text: str, arguments: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat_prompt(text: str, arguments: Arguments) -> bool:
    return text.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _end_checker(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _capital_word_frequency(text: str, arguments: Arguments) -> bool:
    words = re.findall(r"\w+(?:[-'’.&]\w+)*", text)
    count = sum(word.isupper() for word in words)
    return _relation(arguments["capital_relation"], count, arguments["capital_frequency"])


def _english_capital(text: str, arguments: Arguments) -> bool:
    return text.isupper() and _is_english(text)


def _english_lowercase(text: str, arguments: Arguments) -> bool:
    return text.islower() and _is_english(text)


def _no_comma(text: str, arguments: Arguments) -> bool:
    return "," not in text


def _quotation(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: dict[str, Instruction] = {
    "keywords:existence": Instruction(_has_keywords, {"keywords": list}),
    "keywords:frequency": Instruction(
        _keyword_frequency, {"relation": str, "keyword": str, "frequency": int}
    ),
    "keywords:forbidden_words": Instruction(_forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": Instruction(
        _letter_frequency, {"let_relation": str, "letter": str, "let_frequency": int}
    ),
    "language:response_language": Instruction(_response_language, {"language": str}),
    "length_constraints:number_sentences": Instruction(
        _number_sentences, {"relation": str, "num_sentences": int}
    ),
    "length_constraints:number_paragraphs": Instruction(
        _number_paragraphs, {"num_paragraphs": int}
    ),
    "length_constraints:number_words": Instruction(
        _number_words, {"relation": str, "num_words": int}
    ),
    "length_constraints:nth_paragraph_first_word": Instruction(
        _nth_paragraph_first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Instruction(
        _number_placeholders, {"num_placeholders": int}
    ),
    "detectable_content:postscript": Instruction(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Instruction(
        _number_bullet_lists, {"num_bullets": int}
    ),
    "detectable_format:constrained_response": Instruction(_constrained_response, {}),
    "detectable_format:number_highlighted_sections": Instruction(
        _number_highlights, {"num_highlights": int}
    ),
    "detectable_format:multiple_sections": Instruction(
        _multiple_sections, {"section_spliter": str, "num_sections": int}
    ),
    "detectable_format:json_format": Instruction(_json_format, {}),
    "detectable_format:title": Instruction(_title, {}),
    "combination:two_responses": Instruction(_two_responses, {}),
    "combination:repeat_prompt": Instruction(_repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": Instruction(_end_checker, {"end_phrase": str}),
    "change_case:capital_word_frequency": Instruction(
        _capital_word_frequency, {"capital_relation": str, "capital_frequency": int}
    ),
    "change_case:english_capital": Instruction(_english_capital, {}),
    "change_case:english_lowercase": Instruction(_english_lowercase, {}),
    "punctuation:no_comma": Instruction(_no_comma, {}),
    "startend:quotation": Instruction(_quotation, {}),
}
