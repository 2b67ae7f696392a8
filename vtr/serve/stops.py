"""Stop words of an answer that arrives piece by piece."""

from __future__ import annotations


class StopWords:
    """Cuts a text at the first stop word, which may be spread over several pieces.

    A piece that may be the beginning of a stop word is held back until the next one decides.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Take a piece; return the text that is certain to belong to the answer."""
        if self.found:
            return ""
        text = self.held + piece
        ends = [at for word in self.words if (at := text.find(word)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        kept = max((_overlap(text, word) for word in self.words), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Return the text that was held back when the answer has ended."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """Count the characters at the end of a text that a word begins with."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(word[:n])), 0)
