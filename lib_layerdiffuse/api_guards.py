"""What is checked before a HTTP route is called: who asks, how much comes, and whether it is what the route takes."""

import base64
from collections.abc import Callable, Mapping, Sequence
from secrets import compare_digest
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import HTTPBase
from fastapi.routing import APIRoute
from fastapi.security.base import SecurityBase

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import listed, nearest, shortened

MAX_BODY = 128 * 2**20  # bytes of a request: a picture of the largest size that PNG cannot compress, in base64
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


def check_length(request: Request) -> None:
    """Refuse a body that is too large before it is read."""
    length = request.headers.get("Content-Length", "")
    if not length.isdecimal() or "Transfer-Encoding" in request.headers:
        raise HTTPException(411, "The length of the request is not known. Send it with the header Content-Length.")
    if int(length) > MAX_BODY:
        raise HTTPException(413, f"The request has {int(length):,} bytes. Send up to {MAX_BODY:,}.")


def explained(error: Mapping[str, Any], body: Any) -> str:
    """A sentence for one of pydantic's errors, of its first or second version."""
    where = list(error["loc"][1:])  # after "body"
    if not where or "json" in error["type"]:
        return f"The body is not a JSON object sent as application/json: {error['msg']}."
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
    """Routes that ask who it is and how much will come, in this order, and whose errors are one sentence each."""

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Any:
                for guard in guards:
                    await guard(request)
                if self.body_field:
                    check_length(request)
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    body = self.endpoint.__annotations__.get("body")
                    raise HTTPException(422, explained(error.errors()[0], body)) from error
                except LayerDiffuseError as error:
                    raise HTTPException(422, str(error)) from error

            return checked

    return CheckedRoute
