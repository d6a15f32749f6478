"""IFEval: how many of a prompt's verifiable instructions an answer follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from .instruction_checks import INSTRUCTIONS
from .questions import Question, Row, load_questions, without_thoughts

__all__ = ["IFEval"]


@dataclass(frozen=True)
class IFEval:
    """541 prompts with one to three instructions each; `key`, `instruction_id_list`, `kwargs`.

    The published instruction accuracies are taken over all instructions. To get them out of the
    scores, weigh each question with the length of its reference's `instruction_id_list`.
    """

    name: str = "ifeval"
    max_new_tokens: int = 1280

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Read the prompts; see `load_questions`."""
        return load_questions(self.name, path, limit, seed, self._question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """All instructions followed (`prompt_`), or the share of them (`instruction_`).

        `strict` takes the answer as it is. `loose` also tries it without its first line, its last
        line and its asterisks, in every combination. An empty answer follows nothing.

        Raises
        ------
        InputError
            If there is no such instruction.
        """
        answer = without_thoughts(answer)
        names = question.reference["instruction_id_list"]
        arguments = question.reference["kwargs"]
        _check(f"question {question.id}", names, arguments)
        strict = _followed([answer], names, arguments)
        loose = _followed(_variants(answer), names, arguments)
        return {
            "prompt_strict": float(all(strict)),
            "instruction_strict": sum(strict) / len(strict),
            "prompt_loose": float(all(loose)),
            "instruction_loose": sum(loose) / len(loose),
        }

    def _question(self, row: Row) -> Question:
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not (names and _is_list_of(names, str) and _is_list_of(arguments, dict | None)):
            raise InputError(
                f"{row.where}: 'instruction_id_list' and 'kwargs' must be lists of names and "
                "of objects: give the file as it was published."
            )
        arguments = [given or {} for given in arguments]
        _check(row.where, names, arguments)
        return Question(
            id=str(row.get("key")),
            prompt=row.text("prompt"),
            reference={"instruction_id_list": names, "kwargs": arguments},
        )


def _is_list_of(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check(where: str, names: list[str], arguments: list[dict[str, Any]]) -> None:
    if len(names) != len(arguments):
        raise InputError(
            f"{where}: {len(names)} instructions have {len(arguments)} sets of arguments: give the "
            "file as it was published."
        )
    for name, given in zip(names, arguments):
        if name not in INSTRUCTIONS:
            raise InputError(
                f"{where}: there is no instruction {name!r}; the {len(INSTRUCTIONS)} of IFEval are "
                f"{', '.join(INSTRUCTIONS)}. Remove this record."
            )
        INSTRUCTIONS[name].check_arguments(where, name, given)


def _variants(answer: str) -> list[str]:
    lines = answer.split("\n")
    whole = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*whole, *(text.replace("*", "") for text in whole)]


def _followed(texts: list[str], names: list[str], arguments: list[dict[str, Any]]) -> list[bool]:
    texts = [text for text in texts if text.strip()]
    return [
        any(INSTRUCTIONS[name].follows(text, given) for text in texts)
        for name, given in zip(names, arguments)
    ]
