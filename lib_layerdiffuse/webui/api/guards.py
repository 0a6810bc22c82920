"""What is checked before a HTTP route is called: who asks, how much comes, and whether it is what the route takes."""

import asyncio
import base64
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from secrets import compare_digest
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import HTTPBase
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security.base import SecurityBase
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import listed, nearest, shortened
from lib_layerdiffuse.webui.api.messages import MAX_LAYERS

log = logging.getLogger("layerdiffuse")

MAX_BODY = 128 * 2**20  # bytes of a request: a picture of the largest size that PNG cannot compress, in base64
MARKS = b"[{:,"  # one before each name and value of a JSON text; base64 has none
MAX_MARKS = 1000  # of a request; 32 layers have about 350
PATIENCE = 30  # seconds that a request may take to come, and one more for each SLOWEST of it
SLOWEST = 100_000  # bytes
LONGEST_INTEGER = 30  # digits; for millions of them, Python before 3.10.7 takes hours
AT_ONCE = 4  # requests at work, of a route that takes a body: all routes of the web UI share 40 threads
PIECE = 2**18  # bytes of an answer

READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing

# The scheme is known by this name in the web UI's own API documentation too.
BASIC_AUTH = "HTTPBasic"


class BasicAuth(SecurityBase):
    """Asks for one of these users, each `name:password`, as the web UI's own API does."""

    def __init__(self, users: Sequence[str]) -> None:
        self.scheme_name = BASIC_AUTH
        self.model = HTTPBase(scheme="basic")
        self._users = [user.encode() for user in users]

    async def __call__(self, request: Request) -> None:
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        try:
            given = base64.b64decode(text, validate=True)
        except ValueError:  # no base64
            given = b""
        matches = [compare_digest(given, user) for user in self._users]  # all of them, so that time does not tell
        if scheme.lower() != "basic" or not any(matches):
            raise HTTPException(
                401, "This needs a user and a password: those of --api-auth.", headers={"WWW-Authenticate": "Basic"}
            )


def check_origin(request: Request) -> None:
    """Refuse what a page of another server sends: browsers let it ask, though not read the answer.

    Programs that are no browser send neither header, and browsers the first only to https and to their own computer.
    Not refused: a page whose server has its name lead here (DNS rebinding); a web UI may have any name.
    """
    site, origin = (request.headers.get(name, "") for name in ("Sec-Fetch-Site", "Origin"))
    # The second is a proxy's, and no page can set it.
    hosts = [request.headers.get(name, "").lower() for name in ("Host", "X-Forwarded-Host")]
    own = site in ("same-origin", "none") if site else not origin or urlsplit(origin).netloc in filter(None, hosts)
    if request.method not in READING and not own and not allows(request.app, origin):
        raise HTTPException(
            403,
            f"A page of {shortened(origin or site)} may not do this. The option --cors-allow-origins of the web UI "
            "names pages that may.",
        )


def allows(app: Any, origin: str) -> bool:
    """Whether the web UI lets pages of that origin ask."""
    settings = [options for kind, *_, options in app.user_middleware if kind is CORSMiddleware]
    return any(CORSMiddleware(app, **options).is_allowed_origin(origin) for options in settings)


def length_of(request: Request) -> int:
    """Bytes of the body. Refuses one that is too large before it is read."""
    length = request.headers.get("Content-Length", "")
    if not length.isdecimal() or "Transfer-Encoding" in request.headers:
        raise HTTPException(411, "The length of the request is not known. Send it with the header Content-Length.")
    if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
        raise HTTPException(413, f"The request has {shortened(length)[1:-1]} bytes. Send up to {MAX_BODY:,}.")
    return int(length)


class Client(Request):
    """Who sent a body, which is looked at while it comes, and may leave before the answer."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.scope, request.receive)
        self._gone = threading.Event()

    async def stream(self) -> AsyncIterator[bytes]:
        """What is too much is received too, as a client hears nothing while it sends, but not kept."""
        marks = 0
        async for chunk in super().stream():
            marks += sum(map(chunk.count, MARKS))
            if marks <= MAX_MARKS:
                yield chunk
        if marks > MAX_MARKS:  # before parsing, which holds up the whole program
            raise HTTPException(
                413,
                f"The request has more than {MAX_MARKS:,} values. Send each picture as one text in base64, and up "
                f"to {MAX_LAYERS} layers.",
            )

    async def receive_all(self) -> None:
        """Wait for the body, but not for ever."""
        seconds = PATIENCE + length_of(self) / SLOWEST
        try:
            await asyncio.wait_for(self.body(), seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"The request did not come in {seconds:.0f} seconds. Send it again.") from error
        except ClientDisconnect:
            self._gone.set()

    async def json(self) -> Any:
        try:
            return json.loads(await self.body(), parse_int=integer)
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, not_json(error)) from error

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Hears when the client leaves; nothing else is received meanwhile."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    def go_on(self) -> None:
        """Ends what is done for the client, by raising, when it has left."""
        if self._gone.is_set():
            raise HTTPException(499, "The client has left.")


def integer(digits: str) -> float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def not_json(why: object) -> str:
    return f"The body is not a JSON object sent as application/json: {why}."


class AnswerInPieces(JSONResponse):
    """JSON that is sent in pieces: Forge compresses each in the thread that answers everybody."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE):
            await send({"type": "http.response.body", "body": self.body[start : start + PIECE], "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body"})


def explained(error: Mapping[str, Any], body: Any) -> str:
    """A sentence for one of pydantic's errors, of its first or second version."""
    where = list(error["loc"][1:])  # after "body"
    if not where:
        return not_json(error["msg"])
    if "extra" in error["type"]:
        names = names_at(body, where[:-1])
        near = listed(nearest(where[-1], names))
        return f"{dotted(where)} is unknown. Did you mean {near}? The names are {', '.join(names)}."
    return f"{dotted(where)}: {error['msg']}."


def names_at(model: Any, where: Sequence[str | int]) -> list[str]:
    """The names that a body of this model has at a place inside it."""
    for step in where:
        if isinstance(step, str):
            [model] = model.__annotations__[step].__args__
    return list(model.__annotations__)


def dotted(where: Sequence[str | int]) -> str:
    """A place in a body as one would type it: `layers[0].opacity`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{shortened(step)[1:-1]}" for step in where]
    return "".join(steps).lstrip(".")


def route_class(guards: Sequence[BasicAuth]) -> type[APIRoute]:
    """Routes that ask who it is, from which page and with how much, in this order; each error is one sentence."""

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()
            room = asyncio.Semaphore(AT_ONCE)

            async def checked(request: Request) -> Any:
                for guard in guards:
                    await guard(request)
                check_origin(request)
                if not self.body_field:
                    return await handle(request)
                client = Client(request)
                await client.receive_all()
                async with client.watched(), room:
                    client.go_on()
                    return await handle(client)

            async def explaining(request: Request) -> Any:
                try:
                    return await checked(request)
                except HTTPException as error:
                    refusal = error
                except RequestValidationError as error:
                    body = self.endpoint.__annotations__.get("body")
                    refusal = HTTPException(422, explained(error.errors()[0], body))
                except LayerDiffuseError as error:
                    refusal = HTTPException(422, str(error))
                except Exception as error:
                    log.exception("%s %s failed", request.method, request.url.path)
                    refusal = HTTPException(500, f"This failed with {type(error).__name__}. The log has more.")
                # Not raised: some web UIs answer to exceptions in a form of their own.
                return JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)

            return explaining

    return CheckedRoute
