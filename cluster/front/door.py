"""Who is let in: a token in the header of each request; for people's pages, a cookie that a token was exchanged for."""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers
from starlette.requests import Request

from cluster.front.problems import RefusedError
from jobs.errors import AuthError, BadInputError

COOKIE = "mergefleet"
SESSION_SECONDS = 12 * 3600
_SAFE = frozenset({"GET", "HEAD"})

HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of all answers; pages have a policy of their own."""


class Door:
    """Lets in who shows the token. Without one, only this machine under its own names.

    Args:
        token: what is asked for; None where the server listens on this machine alone.
        clock: seconds since 1970.
    """

    def __init__(self, token: str | None, clock: Callable[[], float] = time.time) -> None:
        self._token = token
        self._clock = clock
        # Sessions end with the server: nothing of them is kept.
        self._key = secrets.token_bytes(32)

    @property
    def is_locked(self) -> bool:
        """Whether a token is asked for."""
        return self._token is not None

    def check(self, request: Request) -> None:
        """Let a request in.

        Raises:
            RefusedError: it shows no token, a wrong one, or comes by a name that is not this machine's.
        """
        if self._token is None:
            # A page of another site may send what it likes to this address, and under a name that leads here.
            if not _is_local(request.headers):
                raise RefusedError(403, AuthError("expected Host localhost or a loopback address, found another name"))
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(shown.strip()):
            return
        if request.method in _SAFE and self.knows_session(request.cookies.get(COOKIE, "")):
            return
        found = "none" if not scheme else "another"
        raise RefusedError(
            401,
            AuthError(
                f"expected the token of this server in `Authorization: Bearer …`, found {found} (MERGEFLEET_TOKEN)"
            ),
            {"WWW-Authenticate": 'Bearer realm="mergefleet"'},
        )

    def knows(self, shown: str) -> bool:
        """Whether this is the token; takes as long whatever is shown."""
        assert self._token is not None
        digests = (hashlib.sha256(text.encode(errors="replace")).digest() for text in (self._token, shown))
        return hmac.compare_digest(*digests)

    def make_session(self) -> str:
        """Return what a cookie holds for who has shown the token: good for reading, for some hours."""
        expires = str(int(self._clock() + SESSION_SECONDS))
        return f"{expires}.{self._sign(expires)}"

    def knows_session(self, shown: str) -> bool:
        """Whether a cookie is one of this server's, and still good."""
        expires, _, signature = shown.partition(".")
        is_ours = hmac.compare_digest(self._sign(expires).encode(), signature.encode(errors="replace"))
        return is_ours and int(expires) > self._clock()

    def _sign(self, expires: str) -> str:
        return hmac.new(self._key, expires.encode(errors="replace"), hashlib.sha256).hexdigest()


def check_listening(host: str, token: str | None) -> None:
    """Check that no one but this machine is let in without a token.

    Raises:
        BadInputError: the address is another one, and there is no token.
    """
    if token is None and not is_loopback(host):
        raise BadInputError(
            f"serve: expected a token for {host}, which others reach; set MERGEFLEET_TOKEN or MERGEFLEET_TOKEN_PATH "
            "(`openssl rand -hex 32` makes one), or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether an address, or the name of one, is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_local(headers: Headers) -> bool:
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    return is_loopback(name)
