"""The HTTP side: Starlette routes over a `Worker`, and a uvicorn server that ends cleanly."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from swr_jax.generate.engine import EngineFull, Piece
from swr_jax.serve import replies
from swr_jax.serve.protocol import ApiError, Job, parse_chat, parse_completion
from swr_jax.serve.worker import Stopped, Worker

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        "the server needs the packages 'starlette' and 'uvicorn': pip install 'swr_jax[serve]'"
    ) from error

MAX_BODY = 2**22  # bytes
_RETRY_SECONDS = 1
# After the engine has ended all answers, time for their last bytes to go out.
_FLUSH_SECONDS = 2


def make_app(worker: Worker, name: str) -> Starlette:
    """Make the application.

    Args:
        worker: started; whoever started it stops it.
        name: of the model, which requests must ask for.
    """
    created = int(time.time())
    engine = worker.engine

    def answering(parse: Callable) -> Callable:
        async def endpoint(request: Request) -> Response:
            body = await _body(request)
            if isinstance(body, dict) and body.get("model") != name:
                raise ApiError(
                    404,
                    f"model={str(body.get('model'))[:64]!r} does not exist: must be {name!r}",
                    param="model",
                    code="model_not_found",
                )
            job = parse(body, engine.tokenizer, engine.max_length)
            return await _answer(worker, job, name, request)

        return endpoint

    async def list_models(_: Request) -> Response:
        return JSONResponse(replies.models(name, created))

    async def one_model(request: Request) -> Response:
        if request.path_params["model"] != name:
            raise ApiError(404, f"the only model is {name!r}", code="model_not_found")
        return JSONResponse(replies.model(name, created))

    async def health(_: Request) -> Response:
        status = {"running": engine.running, "waiting": engine.waiting}
        return JSONResponse(status, status_code=200 if worker.accepts else 503)

    return Starlette(
        routes=[
            Route("/v1/completions", answering(parse_completion), methods=["POST"]),
            Route("/v1/chat/completions", answering(parse_chat), methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", one_model),
            Route("/health", health),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
        },
    )


async def _api_error(_: Request, error: ApiError) -> Response:
    headers = {"Retry-After": str(_RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    reply = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(reply.body, status_code=error.status_code, headers=error.headers)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _body(request: Request) -> Any:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body has more than {MAX_BODY} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error


async def _answer(worker: Worker, job: Job, name: str, request: Request) -> Response:
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def deliver_to(index: int) -> Callable:
        def deliver(piece: Piece | Stopped) -> None:
            # The loop has closed where a second Ctrl-C ended everything: nobody waits then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, (index, piece))

        return deliver

    capacity = worker.engine.slots + worker.engine.max_waiting
    if len(job.requests) > capacity:
        raise ApiError(
            400, f"{len(job.requests)} choices: at most {capacity} are answered at once", param="n"
        )
    try:
        tickets = worker.submit(job.requests, [deliver_to(n) for n in range(len(job.requests))])
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition("=")[0].split()[0]) from error
    except EngineFull as error:
        raise ApiError(
            429, str(error), code="rate_limit_exceeded", kind="rate_limit_error"
        ) from error
    except Stopped as error:
        raise ApiError(503, str(error), kind="server_error") from error
    choices = [replies.Choice() for _ in job.requests]
    shapes = replies.Replies(job, name)
    pieces = _pieces(worker, tickets, arrived, choices)
    if job.stream:
        return StreamingResponse(
            _events(pieces, job, choices, shapes),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    try:
        await _unless_disconnected(request, _exhausted(pieces))
    except Stopped as error:
        raise ApiError(503, str(error), kind="server_error") from error
    return JSONResponse(shapes.whole(choices))


async def _pieces(
    worker: Worker, tickets: list[object], arrived: asyncio.Queue, choices: list[replies.Choice]
) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all choices as they come; requests that nobody waits for are dropped."""
    try:
        while any(choice.finish is None for choice in choices):
            index, piece = await arrived.get()
            if isinstance(piece, Stopped):
                raise piece
            choice = choices[index]
            choice.text += piece.text
            choice.tokens, choice.finish = piece.tokens, piece.finish
            yield index, piece
    finally:
        worker.cancel(tickets)


async def _exhausted(pieces: AsyncIterator) -> None:
    async with contextlib.aclosing(pieces):
        async for _ in pieces:
            pass


async def _unless_disconnected(request: Request, work: Any) -> None:
    """Wait for `work`, or cancel it when the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(
    pieces: AsyncIterator, job: Job, choices: list[replies.Choice], shapes: replies.Replies
) -> AsyncIterator[str]:
    """Server-sent events: pieces with text, the last of each choice, and the end."""
    begun: set[int] = set()
    async with contextlib.aclosing(pieces):
        try:
            async for index, piece in pieces:
                if piece.text or piece.finish:
                    first = index not in begun
                    begun.add(index)
                    yield _event(shapes.piece(index, piece.text, piece.finish, first=first))
        except Stopped as error:
            yield _event(ApiError(503, str(error), kind="server_error").body)
            return
    if job.include_usage:
        yield _event(shapes.usage(choices))
    yield "data: [DONE]\n\n"


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, then lets answers end for `grace` seconds.

    Args:
        worker: started here, and stopped at the end.
        name: of the model.
        host, port: to listen on; port 0 takes a free one.
        grace: seconds that running answers have left after a signal; those that need longer end
            with an error event. A second Ctrl-C ends at once.
        announce: called with the address once requests are taken.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        *,
        host: str,
        port: int,
        grace: float,
        announce: Callable[[str], object],
    ):
        super().__init__(
            uvicorn.Config(
                make_app(worker, name),
                host=host,
                port=port,
                log_level="warning",
                timeout_graceful_shutdown=int(grace) + _FLUSH_SECONDS,
            )
        )
        self._worker, self._grace, self._announce = worker, grace, announce

    async def startup(self, sockets: list | None = None) -> None:
        """Open the port and say so."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._announce(f"http://{shown}:{port}/v1")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take no more requests, and give those that run a while to end."""
        self._worker.stop(0.0 if self.should_exit else self._grace)
        super().handle_exit(sig, frame)

    def serve_until_signal(self) -> None:
        """Serve; returns after a signal, when everything has ended."""

        def known(*_: Any) -> None:
            """uvicorn raises the signal again when it is done; that has been dealt with."""

        before = {s: signal.signal(s, known) for s in (signal.SIGINT, signal.SIGTERM)}
        self._worker.start()
        try:
            self.run()
        finally:
            self._worker.stop()
            self._worker.join()
            for number, handler in before.items():
                signal.signal(number, handler)
