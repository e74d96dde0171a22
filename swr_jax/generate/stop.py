"""Stop strings in a text that comes in pieces, none of which may show the beginning of one."""

from collections.abc import Sequence


class StopStrings:
    """Passes a text on up to the first stop string, holding back what may become one.

    Args:
        stops: strings at which the text ends: just before the one that is complete first, so that
            it does not matter in what pieces the text comes.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str] = ()):
        if any(not stop for stop in stops):
            raise ValueError("stop holds an empty string, at which every text would end at once")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What became certain with `text`; nothing more once a stop string was `found`."""
        if self.found:
            return ""
        self._held += text
        found = [
            (place + len(stop), place)
            for stop in self._stops
            if (place := self._held.find(stop)) >= 0
        ]
        if found:
            self.found = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back and became no stop string; call once, at the end."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Characters at the end of what is held that begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next(
            (n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])),
            0,
        )
