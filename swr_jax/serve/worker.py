"""The thread that drives an engine, and how others hand it requests and get pieces back."""

import threading
import time
from collections.abc import Callable, Sequence

from swr_jax.generate.engine import Engine, EngineFull, Piece, Request


class Stopped(Exception):
    """The worker no longer serves."""


# Gets the pieces of a request one after the other, or the reason why no more will come. Called in
# the worker's thread: it must return at once.
Deliver = Callable[[Piece | Stopped], None]


class Worker:
    """Drives an engine in a thread of its own; every method may be called from any thread.

    Args:
        engine: nobody else may use it from `start` on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._deliveries: dict[object, Deliver] = {}
        self._tickets: dict[int, object] = {}
        self._deadline: float | None = None
        self._accepts = False
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        """Begin to serve."""
        self._accepts = True
        self._thread.start()

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return self._accepts

    def submit(self, requests: Sequence[Request], deliver: Sequence[Deliver]) -> list[object]:
        """Take requests, all or none; returns a ticket for each, to cancel it.

        Raises:
            EngineFull: there is no room for all of them.
            Stopped: the worker no longer serves.
            ValueError: the engine cannot serve one of them.
        """
        for request in requests:
            self.engine.check(request)
        tickets = [object() for _ in requests]
        with self._changed:
            if not self._accepts:
                raise Stopped("the server is shutting down")
            capacity = self.engine.slots + self.engine.max_waiting
            if len(self._deliveries) + len(requests) > capacity:
                raise EngineFull(
                    f"{len(self._deliveries)} of at most {capacity} requests are being answered "
                    f"or wait; there is no room for {len(requests)} more: try again later"
                )
            self._deliveries |= dict(zip(tickets, deliver, strict=True))
            for ticket, request in zip(tickets, requests, strict=True):
                self._inbox.append(lambda t=ticket, r=request: self._submit(t, r))
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[object]) -> None:
        """Drop requests; nothing happens for those that have ended."""
        with self._changed:
            self._inbox += [lambda t=ticket: self._cancel(t) for ticket in tickets]
            self._changed.notify()

    def stop(self, grace: float = 0.0) -> None:
        """Take no more requests; those that are not answered `grace` seconds from now are ended."""
        with self._changed:
            self._accepts = False
            deadline = time.monotonic() + grace
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._changed.notify()

    def join(self) -> None:
        """Wait until everything has been answered or ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_over():
                for piece in self.engine.step():
                    ticket = self._tickets[piece.request]
                    self._deliveries[ticket](piece)
                    if piece.finish:
                        self._forget(piece.request)
        finally:
            # Whatever ended the loop, nobody is left waiting.
            with self._changed:
                self._accepts = False
                left, self._deliveries = self._deliveries, {}
            for deliver in left.values():
                deliver(Stopped("the server shut down before the answer was complete"))

    def _is_over(self) -> bool:
        """Do what others asked for; wait if there is nothing to do."""
        with self._changed:
            while not self._inbox and not self.engine.busy and self._deadline is None:
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
        for command in inbox:
            command()
        if self._deadline is None:
            return False
        return not self._deliveries or time.monotonic() >= self._deadline

    def _submit(self, ticket: object, request: Request) -> None:
        if ticket in self._deliveries:
            self._tickets[self.engine.submit(request)] = ticket

    def _cancel(self, ticket: object) -> None:
        for number in [n for n, t in self._tickets.items() if t is ticket]:
            self.engine.cancel(number)
            self._forget(number)
        with self._changed:
            self._deliveries.pop(ticket, None)

    def _forget(self, number: int) -> None:
        with self._changed:
            self._deliveries.pop(self._tickets.pop(number), None)
