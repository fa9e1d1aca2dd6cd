"""Translation of what the terminal shows: the user's language, and a catalogue made with gettext.

Texts stand in the code in English, values filled in, and are translated where they are printed: a msgid with places for
values is matched as a pattern. So exceptions, logs and JSON stay English, and what no msgid fits is shown as it is.
Bokmål is the only other language; scripts/catalogue.py compares its catalogue with the code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from gettext import GNUTranslations
from pathlib import Path
from string import Formatter

from normistral.errors import UsageError

VARIABLE = "NORMISTRAL_LANG"
_NORWEGIAN = ("nb", "nn", "no")
_UNTRANSLATED = ("en", "c", "posix")
_LOCALE = Path(__file__).parent / "locale"
_LONGEST = 4000  # characters; longer texts are somebody else's
_LEAST_FIXED = 3  # letters of a msgid outside of its values
_NO_BREAK = "\N{NO-BREAK SPACE}"


def is_norwegian(environment: Mapping[str, str]) -> bool:
    """Whether the user reads Norwegian: by NORMISTRAL_LANG, else as gettext decides by LANGUAGE and the locale.

    Raises:
        UsageError: NORMISTRAL_LANG names another language than English and Norwegian.
    """
    if asked := environment.get(VARIABLE):
        if _language(asked) not in _NORWEGIAN + _UNTRANSLATED:
            raise UsageError(f"{VARIABLE} names a language that there is not: {asked!r}", "say nb or en")
        return _language(asked) in _NORWEGIAN
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = _language(next((value for name in names if (value := environment.get(name))), "C"))
    if locale in ("c", "posix"):  # there LANGUAGE means nothing
        return False
    preferred = [_language(value) for value in environment.get("LANGUAGE", "").split(":") if value]
    known = (language for language in [*preferred, locale] if language in _NORWEGIAN + _UNTRANSLATED)
    return next(known, "en") in _NORWEGIAN


def translate(text: str) -> str:
    """The text in the user's language, or as it is."""
    catalogue = _catalogue()
    return text if catalogue is None else catalogue.translate(text)


def is_translated() -> bool:
    """Whether the user's language is another than the code's."""
    return _catalogue() is not None


def translate_number(text: str) -> str:
    """A number with its unit, 12,345.6 tokens/s, as the user's language writes it."""
    return _localise_number(text) if is_translated() else text


def translate_paragraphs(text: str) -> str:
    """A text of several paragraphs, each in one line."""
    if _catalogue() is None:
        return text
    return "\n\n".join(translate(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


def choose_language() -> None:
    """Look at the environment again; raises UsageError as `is_norwegian`."""
    _catalogue.cache_clear()
    is_norwegian(os.environ)


@cache
def _catalogue() -> Catalogue | None:
    """The catalogue of the user's language; None for English, in which a wrong NORMISTRAL_LANG is told too."""
    try:
        if not is_norwegian(os.environ):
            return None
    except UsageError:
        return None
    with (_LOCALE / "nb.mo").open("rb") as file:
        return Catalogue(GNUTranslations(file))


class Catalogue:
    """Messages by msgid, and those with values by what stands between these.

    Args:
        translations: a compiled catalogue.
    """

    def __init__(self, translations: GNUTranslations) -> None:
        self._texts: dict[str, str] = {
            msgid: text
            for msgid, text in vars(translations)["_catalog"].items()
            if msgid  # that of "" is the header
        }
        # Its longest fixed piece -> msgids, those with most fixed text first.
        fixed = [(self._fixed_pieces(msgid), msgid) for msgid in self._texts if "{" in msgid]
        fixed.sort(key=lambda entry: -sum(map(len, entry[0])))
        self._templates = [(max(pieces, key=len), msgid) for pieces, msgid in fixed if pieces]

    def translate(self, text: str) -> str:
        """The translation, or the text itself."""
        inner = text.strip()
        if not inner or len(text) > _LONGEST:
            return text
        found = self._texts.get(inner) or self._fill(inner)
        return text if found is None else text.replace(inner, found)

    def _fill(self, text: str) -> str | None:
        for piece, msgid in self._templates:
            if piece in text and (match := self._pattern(msgid).fullmatch(text)):
                values = match.groupdict()
                return "".join(
                    before + ("" if name is None else self._value(values[name], spec))
                    for before, name, spec, _ in Formatter().parse(self._texts[msgid])
                )
        return None

    def _value(self, value: str, spec: str | None) -> str:
        """A number as Norwegian writes it; a part of a sentence translated; anything else (a name, a path) as it is."""
        if spec == "n":
            return _localise_number(value)
        return self.translate(value) if " " in value else value

    @staticmethod
    @cache
    def _pattern(msgid: str) -> re.Pattern[str]:
        parts = []
        for before, name, _, _ in Formatter().parse(msgid):
            parts += [re.escape(before), "" if name is None else f"(?P<{name}>.*?)"]
        return re.compile("".join(parts), re.DOTALL)

    @staticmethod
    def _fixed_pieces(msgid: str) -> list[str]:
        parsed = list(Formatter().parse(msgid))
        pieces = [before for before, *_ in parsed]
        if any(name == "" for _, name, *_ in parsed):  # "{}" is typer's own, for a format of its
            return []
        return [] if sum(map(str.isalpha, "".join(pieces))) < _LEAST_FIXED else pieces


def _language(locale: str) -> str:
    """nb of nb_NO.UTF-8."""
    return re.split(r"[_.@-]", locale.lower())[0]


def _localise_number(text: str) -> str:
    """12,345.6 as 12 345,6, and a blank before the sign of per cent."""
    text = re.sub(r"\d[\d,]*(\.\d+)?", lambda number: number[0].translate({0x2C: _NO_BREAK, 0x2E: ","}), text)
    return re.sub(r"(?<=\d)%", f"{_NO_BREAK}%", text)
