"""URIAL: a constant prompt of restyled examples under which a base model answers like an aligned one.

Source: Lin et al., The Unlocking Spell on Base LLMs, ICLR 2024 (arXiv 2312.01552), section 4, and its public code. What of that
code is followed where, is in docs/methods/urial.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raindecode.errors import PromptFileError
from raindecode.policy.prompt import ChatFormat, template

_FENCE = "```"
_HEADING = re.compile(r"#{1,3}[ \t]*(\S.*?)[ \t]*:?[ \t]*")
_STOPS = ("# Query", "# User")
_USUAL = {"# Instruction", "# Query:", "# Answer:", "# User:", "# Assistant:"}
_REMOVED = (_FENCE, "<|endoftext|>")
_MOST_BYTES = 1 << 20


class _Section(NamedTuple):
    """A heading with what stands under it."""

    line: int
    heading: str
    outside: str  # text before and behind its back-ticks
    text: str | None  # what stands between its first and its last triple back-ticks; None where there are none
    inline: bool  # whether that begins right behind the back-ticks, not on a line of its own


@dataclass(frozen=True)
class URIAL(ChatFormat):
    """A constant in-context prompt, and how queries and earlier turns are written behind it.

    Make one with `load`, `parse`, `default`, `of` or `testbed`.

    Attributes:
        instruction: the preamble.
        examples: queries with their answers.
    """

    instruction: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> URIAL:
        """Read a file in the published form: see `parse`.

        Raises:
            PromptFileError: it cannot be read, is no UTF-8 text, or not of that form; the message names the line.
        """
        try:
            with Path(path).expanduser().open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PromptFileError(
                f"the prompt file {str(path)!r} cannot be read ({reason}): give a file in URIAL's form (docs/methods/urial.md)"
            ) from error
        if len(data) > _MOST_BYTES:
            raise PromptFileError(
                f"the prompt file {str(path)!r} is larger than {_MOST_BYTES} bytes: check that it is one"
            )
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PromptFileError(
                f"the prompt file {str(path)!r} is not UTF-8 text: byte {data[error.start]:#04x} in line "
                f"{data.count(10, 0, error.start) + 1} begins no valid character; convert the file to UTF-8"
            ) from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "the prompt") -> URIAL:
        """Read the published form: "# Instruction" and text, then "# Query:" and "# Answer:" in turns, each with a text in triple
        back-ticks. Other words for the headings are kept, with any number of examples, none included.

        A query is written behind it as the file writes its own: on lines between the back-ticks, as the published code does now, or
        between them on one line, as it did at first.

        Args:
            name: what to call it in messages.

        Raises:
            PromptFileError: it is not of that form; the message names the line.
        """
        text = text.replace("\r\n", "\n").strip()
        if "\0" in text:
            raise PromptFileError(f"{name} holds a null character, so it is no text: give a text file in UTF-8")
        first, *others = _sections(text, name)
        if first.text is not None or not first.outside:
            raise PromptFileError(
                f"{name} does not begin with an instruction: its first heading is {first.heading!r} in line {first.line}; begin with "
                "'# Instruction' and the text of it"
            )
        examples = _examples(others, name)
        query, answer = (others[0].heading, others[1].heading) if others else ("# Query:", "# Answer:")
        inline = bool(others) and others[-2].inline
        return cls._made(text, first.outside, examples, query, answer, inline)

    @classmethod
    def of(cls, instruction: str, examples: Sequence[tuple[str, str]] = ()) -> URIAL:
        """A prompt of an instruction and pairs of a query and its answer.

        Raises:
            PromptFileError: a text is empty or holds triple back-ticks, which part the texts from each other.
        """
        parts = [f"# Instruction\n\n{instruction.strip()}"]
        for query, reply in examples:
            parts.append(
                f"# Query:\n{_FENCE}\n{query.strip()}\n{_FENCE}\n\n# Answer:\n{_FENCE}\n{reply.strip()}\n{_FENCE}"
            )
        if any(_FENCE in one for one in (instruction, *(text for pair in examples for text in pair))):
            raise PromptFileError(
                "a text of the prompt holds triple back-ticks, which part the texts from each other: drop them"
            )
        return cls.parse("\n\n".join(parts))

    @classmethod
    def default(cls) -> URIAL:
        """Our own prompt: three examples, about a thousand tokens."""
        return cls.parse(template("urial_default.txt"), name="the default prompt")

    @classmethod
    def testbed(cls) -> URIAL:
        """Kind exchanges in the form that the embedded model was trained on (raindecode.testbed.forms)."""
        from raindecode import testbed

        turn = testbed.format_prompt("{prompt}")
        return cls(turn, prefix=testbed.STYLE_PROMPTS["kind"], stop=("\n",))

    @classmethod
    def _made(
        cls, text: str, instruction: str, examples: tuple[tuple[str, str], ...], query: str, answer: str, inline: bool
    ) -> URIAL:
        if inline:
            turn = f"\n{query}\n{_FENCE}{{prompt}}{_FENCE}\n\n{answer}\n{_FENCE}\n"
        else:
            turn = f"\n\n{query}\n{_FENCE}\n{{prompt}}\n{_FENCE}\n\n\n{answer}\n{_FENCE}\n"
        return cls(
            turn=turn,
            prefix=text,
            stop=tuple(dict.fromkeys((*_STOPS, query.rstrip(": \t")))),
            reply=f"{{reply}}\n{_FENCE}\n",
            system="\n\n# Instruction\n\n{system}",
            removed=_REMOVED,
            instruction=instruction,
            examples=examples,
        )


def _sections(text: str, name: str) -> list[_Section]:
    """The file cut at its headings. Lines within back-ticks are never headings."""
    found: list[_Section] = []
    for number, heading, body in _cut(text, name):
        before, fence, rest = body.partition(_FENCE)
        within, _, behind = rest.rpartition(_FENCE)
        inline = bool(fence) and not within.lstrip(" \t").startswith("\n")
        found.append(_Section(number, heading, (before + behind).strip(), within.strip() if fence else None, inline))
    if not found:
        raise PromptFileError(
            f"{name} has no heading: begin with '# Instruction', then '# Query:' and '# Answer:' in turns"
        )
    return found


def _cut(text: str, name: str) -> list[tuple[int, str, str]]:
    """Line, heading and body of every section. Back-ticks are balanced in each.

    The second and the third heading are those of queries and answers; from there on only lines like these are headings, so that
    answers may hold code and headings of their own.
    """
    found: list[tuple[int, str, list[str]]] = []
    opened = 0  # line of the back-ticks that are open
    for number, line in enumerate(text.split("\n"), start=1):
        heading, known = line.strip(), {one[1] for one in found[1:]}
        begins = heading in known | _USUAL
        if len(known) < 2 and not opened:
            begins = _HEADING.fullmatch(line) is not None
        if begins and opened:
            break
        if begins:
            found.append((number, heading, []))
            continue
        if not found:
            if heading:
                raise PromptFileError(
                    f"{name} has text before its first heading, in line {number}: begin with '# Instruction'"
                )
            continue
        found[-1][2].append(line)
        if line.count(_FENCE) % 2:
            opened = 0 if opened else number
    if opened:
        raise PromptFileError(
            f"{name} has triple back-ticks in line {opened} that are not closed: put {_FENCE} behind the text they begin"
        )
    return [(number, heading, "\n".join(body)) for number, heading, body in found]


def _examples(sections: Sequence[_Section], name: str) -> tuple[tuple[str, str], ...]:
    """Queries with their answers."""
    texts: list[str] = []
    for i, section in enumerate(sections):
        where = f"{name}, line {section.line}: {section.heading!r}"
        repeated = i == 1 and section.heading == sections[0].heading
        if repeated or section.heading != sections[i % 2].heading:
            expected = "an answer" if repeated else repr(sections[i % 2].heading)
            raise PromptFileError(f"{where} stands where {expected} belongs: queries and answers take turns")
        if not section.text:
            raise PromptFileError(f"{where} has no text in triple back-ticks: put {_FENCE} before and behind it")
        if section.outside:
            raise PromptFileError(
                f"{where} has text beside its triple back-ticks ({section.outside[:40]!r}): put all of it between them"
            )
        texts.append(section.text)
    if len(texts) % 2:
        last = sections[-1]
        raise PromptFileError(f"{name}, line {last.line}: {last.heading!r} has no answer behind it: add one")
    return tuple(zip(texts[::2], texts[1::2], strict=True))
