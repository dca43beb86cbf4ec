"""Text from tokens: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenInfo:
    """A generated token with its log probability and those of the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; the last one has a finish reason."""

    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: str | None = None  # stop; length, also at the deadline; expired: the deadline came first; error


@dataclass
class TextStream:
    """The text of an answer as its tokens come; it ends before the first stop string.

    >>> stream = TextStream(["###"])
    >>> [stream.push(TokenInfo(0, 0.0), data).text for data in (b"one#", b"#two##", b"#three")]
    ['one', '##two', '']
    >>> stream.stopped
    True
    """

    stop: Sequence[str] = ()
    stopped: bool = False
    held: str = ""  # may be the beginning of a stop string
    shown: int = 0  # characters
    pending: list[tuple[TokenInfo, int, int]] = field(default_factory=list)  # with the characters it begins and ends at

    def __post_init__(self) -> None:
        """Start with no part of a character."""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, info: TokenInfo, data: bytes) -> Piece:
        """Add a token and its bytes; return the text that is now certain, with the tokens that it is made of."""
        begin = self.shown + len(self.held)
        return self._release(self.decoder.decode(data), (info, begin))

    def finish(self, reason: str) -> Piece:
        """Return the rest of the text, with the finish reason."""
        piece = self._release(self.decoder.decode(b"", final=True), None)
        text = "" if self.stopped else self.held
        self.shown, self.held = self.shown + len(text), ""
        rest = () if self.stopped else tuple(info for info, _, _ in self.pending)
        self.pending.clear()
        return Piece(piece.text + text, piece.tokens + rest, "stop" if self.stopped else reason)

    def _release(self, new: str, token: tuple[TokenInfo, int] | None) -> Piece:
        if self.stopped:
            return Piece()
        text = self.held + new
        if token is not None:
            self.pending.append((*token, self.shown + len(text)))
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        kept = min(found) if found else len(text) - self._overlap(text)
        self.held = "" if found else text[kept:]
        self.shown += kept
        n = 0
        while n < len(self.pending) and self._certain(*self.pending[n][1:]):
            n += 1
        tokens, self.pending = tuple(info for info, _, _ in self.pending[:n]), self.pending[n:]
        return Piece(text[:kept], tokens)

    def _certain(self, begin: int, end: int) -> bool:
        return begin < self.shown if self.stopped else end <= self.shown

    def _overlap(self, text: str) -> int:
        """Return the length of the longest end of the text that a stop string begins with."""
        longest = min(len(text), max((len(stop) - 1 for stop in self.stop), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
