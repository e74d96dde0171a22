"""The engine's thread serves whoever asks, ends with a grace, and leaves nobody waiting."""

import queue

import pytest
from generation_models import make_model

from swr_jax.data import ByteTokenizer
from swr_jax.generate import GREEDY, Engine, EngineFull, Request
from swr_jax.serve.worker import Stopped, Worker

SECONDS = 60  # far more than anything here takes


class Inbox(queue.SimpleQueue):
    """What was delivered for one request."""

    def answer(self):
        """Text of all pieces up to the last, and that one; or the reason why it never came."""
        text = ""
        while True:
            piece = self.get(timeout=SECONDS)
            if isinstance(piece, Stopped):
                return text, piece
            text += piece.text
            if piece.finish:
                return text, piece


@pytest.fixture
def worker():
    engine = Engine(
        make_model("phalanx", "attention"),
        ByteTokenizer(),
        slots=2,
        max_length=128,
        max_waiting=2,
        chunk_size=16,
    )
    worker = Worker(engine)
    worker.start()
    yield worker
    worker.stop()
    worker.join()


def request(*prompt: int, max_tokens: int = 12) -> Request:
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=GREEDY)


def test_answers_are_those_of_each_alone(worker):
    requests = [request(256, *range(n)) for n in (1, 9, 33, 4)]
    alone = []
    for each in requests:
        inbox = Inbox()
        worker.submit([each], [inbox.put])
        alone.append(inbox.answer()[0])
    inboxes = [Inbox() for _ in requests]
    worker.submit(requests, [inbox.put for inbox in inboxes])
    assert [inbox.answer()[0] for inbox in inboxes] == alone
    assert all(inbox.empty() for inbox in inboxes)


def test_there_is_room_for_so_many_and_no_more(worker):
    inboxes = [Inbox() for _ in range(5)]
    long = request(256, max_tokens=120)
    with pytest.raises(EngineFull, match=r"0 of at most 4 .* no room for 5 more"):
        worker.submit([long] * 5, [inbox.put for inbox in inboxes])
    tickets = worker.submit([long] * 4, [inbox.put for inbox in inboxes[:4]])
    with pytest.raises(EngineFull, match="4 of at most 4"):
        worker.submit([long], [inboxes[4].put])
    worker.cancel(tickets[:2])
    assert all(inbox.answer()[1].finish == "length" for inbox in inboxes[2:4])
    worker.submit([request(256)], [inboxes[4].put])
    assert inboxes[4].answer()[1].tokens == 12
    with pytest.raises(ValueError, match="max_tokens=200"):
        worker.submit([request(256, max_tokens=200)], [inboxes[4].put])


def test_stopping_lets_answers_end_within_the_grace(worker):
    inbox = Inbox()
    worker.submit([request(256, max_tokens=40)], [inbox.put])
    worker.stop(grace=SECONDS)
    with pytest.raises(Stopped):
        worker.submit([request(256)], [inbox.put])
    worker.join()
    assert inbox.answer()[1].tokens == 40


def test_stopping_without_grace_tells_who_waits(worker):
    inboxes = [Inbox() for _ in range(4)]
    worker.submit([request(256, max_tokens=120)] * 4, [inbox.put for inbox in inboxes])
    worker.stop()
    worker.join()
    assert all(isinstance(inbox.answer()[1], Stopped) for inbox in inboxes)


def test_a_failing_engine_leaves_nobody_waiting(worker, monkeypatch):
    def fail():
        raise MemoryError("no room on the device")

    monkeypatch.setattr(worker.engine, "step", fail)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    inbox = Inbox()
    worker.submit([request(256)], [inbox.put])
    assert isinstance(inbox.answer()[1], Stopped)
    worker.join()
    assert not worker.accepts
