"""The web application of a reward server: the token, the limits and the counts that stand before a `Batcher`."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.serving import wire
from mixgrpo_jax.rewards.serving.batching import Batcher, ScoreError

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import PlainTextResponse
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError("serving rewards needs FastAPI and uvicorn: pip install 'mixgrpo_jax[serve]'") from error


HEARD = 32 << 20  # bytes of a body that are heard out though they are not wanted: who is sending hears no answer
CLOSE = {"Connection": "close"}


class Refused(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str]):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def make_app(
    rewards: Mapping[str, Reward],
    token: str = "",
    max_batch: int = 64,
    max_queue: int = 64,
    max_bytes: int = 256 << 20,
    max_seconds: float = 60.0,
) -> FastAPI:
    """An application with /score, /health and /metrics.

    Args:
        rewards: by the names under which requests ask for them.
        token: what requests must bear; "" lets everyone in.
        max_batch: images scored at once, and the most that a request may hold.
        max_queue: requests in hand beyond which others are told to come again.
        max_bytes: of a request's body, and of its images once they are decoded.
        max_seconds: in which the whole of a body has to come.

    Raises:
        ValueError: no rewards, or a limit that lets nothing in.
    """
    if not rewards or min(max_batch, max_queue, max_bytes) < 1 or not max_seconds >= 1:
        raise ValueError(
            f"rewards={list(rewards)}, max_batch={max_batch}, max_queue={max_queue}, max_bytes={max_bytes}, "
            f"max_seconds={max_seconds}: name a reward, and let each limit be at least 1"
        )
    service = _Service(rewards, token, max_queue, wire.Limits(max_batch, max_bytes, seconds=max_seconds))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()

    app = FastAPI(title="mixgrpo_jax rewards", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.post("/score")(service.score)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics)
    return app


def serve(app: FastAPI, host: str, port: int) -> None:
    """Answer requests until the process is told to stop; those in hand are finished."""
    uvicorn.run(app, host=host, port=port, access_log=False)


class _Service:
    def __init__(self, rewards: Mapping[str, Reward], token: str, max_queue: int, limits: wire.Limits):
        self.batcher = Batcher(rewards, limits.images)
        self.token, self.max_queue, self.limits = token, max_queue, limits
        self.in_hand = 0  # requests: arriving, waiting, or being scored

    async def score(self, request: Request) -> Response:
        try:
            response = _json(await self._answer(request))
        except (Refused, wire.BadRequest, wire.TooLarge, ScoreError) as error:
            response, code = _failure(error)
            self.batcher.counters.add("failures_total", reason=code)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody hears it
            self.batcher.counters.add("failures_total", reason="hung_up")
        self.batcher.counters.add("requests_total", status=str(response.status_code))
        return response

    async def health(self, request: Request) -> Response:
        """Without a token, only that the server lives; with one, what it serves."""
        trusted = self._is_trusted(request)
        if not trusted and "authorization" in request.headers:
            return _failure(_unauthorized())[0]
        served = {
            "rewards": list(self.batcher.rewards),
            "max_batch": self.limits.images,
            "max_bytes": self.limits.bytes,
        }
        return _json({"status": "ok"} | (served if trusted else {}))

    async def metrics(self, request: Request) -> Response:
        if not self._is_trusted(request):
            return _failure(_unauthorized())[0]
        return PlainTextResponse(self.batcher.counters.text(self.in_hand))

    def _is_trusted(self, request: Request) -> bool:
        """Whether the request bears the token, if there is one; found out in the same time whatever it bears."""
        said = request.headers.get("authorization", "")
        return not self.token or hmac.compare_digest(said.encode(), f"Bearer {self.token}".encode())

    async def _answer(self, request: Request) -> dict[str, Any]:
        refusal = self._refusal(request)
        self.in_hand += refusal is None
        try:
            body = await self._body(request, keep=refusal is None)
            if refusal:
                raise refusal
            asked, digest = await asyncio.to_thread(self._decode, body, request.headers.get("content-type", ""))
            scores = await self.batcher.score(asked, digest)
        finally:
            self.in_hand -= refusal is None
        return {"id": asked.id, "scores": {name: values.tolist() for name, values in scores.items()}}

    def _refusal(self, request: Request) -> Refused | None:
        if not self._is_trusted(request):
            return _unauthorized()
        if self.in_hand >= self.max_queue:
            return Refused(503, "busy", f"{self.in_hand} requests are in hand: come again", {"Retry-After": "1"})
        return None

    async def _body(self, request: Request, keep: bool) -> bytes:
        """The body, read to its end where it is too long or not to be kept: a caller who is still sending hears no
        answer. One that goes on far beyond the limit, or does not end in time, is cut."""
        body, size, limit = bytearray(), 0, self.limits.bytes
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if keep and size <= limit:
                        body += chunk
                    if size > max(HEARD, limit if keep else 0):
                        message = f"the body has {size} bytes and more; the limit is {limit}"
                        raise Refused(413, "too_large", message, CLOSE)
        except TimeoutError:
            message = f"the body did not come within {self.limits.seconds:g} s, but {size} bytes of it"
            raise Refused(408, "too_slow", message, CLOSE) from None
        if keep and size > limit:
            raise wire.TooLarge(f"the body has {size} bytes; the limit is {limit}")
        return bytes(body)

    def _decode(self, body: bytes, kind: str) -> tuple[wire.Request, bytes]:
        asked = wire.decode(body, kind, self.limits)
        return asked, asked.digest()


def _unauthorized() -> Refused:
    return Refused(401, "unauthorized", "give the token: 'Authorization: Bearer ...'", {"WWW-Authenticate": "Bearer"})


def _failure(error: Exception) -> tuple[Response, str]:
    """The answer that tells of an error, and its code."""
    status, code = 500, ""
    details: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, Refused):
        status, code, headers = error.status, error.code, error.headers
    elif isinstance(error, wire.TooLarge):
        status, code = 413, "too_large"
    elif isinstance(error, wire.BadRequest):
        status, code, details = 400, "bad_request", {"field": error.field}
    elif isinstance(error, ScoreError):
        code, details = error.code, {"reward": error.reward, "sample": error.sample}
    return _json({"error": {"code": code, "message": str(error)} | details}, status, headers), code


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in ASCII: what a request holds, and an error repeats, need not be text that UTF-8 can write."""
    return Response(json.dumps(content), status, headers, "application/json")
