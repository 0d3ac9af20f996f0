"""The kinds of values that settings have."""

import base64
import binascii
import urllib.parse
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from jobs.allowance import Pattern
from jobs.errors import BadInputError, InvalidValueError
from jobs.frozen import Frozen
from jobs.ledger.deliveries import MessageKind
from jobs.locations import normal_path

MIN_TOKEN = 16
"""Characters of a token: shorter ones are guessed."""
_MIN_SECRET_BYTES = 24
"""The Standard Webhooks convention asks for 24 to 64."""


def absolute(value: Any) -> Any:
    """Return text as a path: `~` is the user's home, a relative path is taken from the working directory."""
    return normal_path(Path(value).expanduser()) if isinstance(value, str | Path) else value


def names(value: Any) -> Any:
    """Return names with commas between them as a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


AbsolutePath = Annotated[Path, BeforeValidator(absolute)]
"""`~` is the user's home; a relative path is taken from the working directory."""


def _patterns(value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        if not value:
            raise InvalidValueError("at least one place; leave it out to allow all", "none")
        for text in value:
            Pattern.parse(text if isinstance(text, str) else "")
    return value


Patterns = Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_patterns)]
"""A list of places as `jobs.allowance.Pattern` reads them; in the environment separated by commas."""

Port = Annotated[int, Field(ge=1, le=65535)]


def _url(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parts = urllib.parse.urlsplit(value)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_plain = False
    # What a person may have put there is not shown: it may be a secret.
    if not is_plain or not value.isprintable() or value != value.strip():
        raise InvalidValueError("http://host:port or https://host", "something else")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidValueError("an address without a user, a query or a fragment: no secret belongs into it", "one")
    return value


Url = Annotated[str, BeforeValidator(_url)]
"""Of a server, with no secret in it."""


class Webhook(Frozen):
    """A receiver of messages."""

    url: Url
    secret: SecretStr
    """`whsec_` and base64 of 24 to 64 bytes, as the Standard Webhooks convention has it."""
    kinds: Annotated[frozenset[MessageKind], Field(min_length=1)] = frozenset(MessageKind)
    """What it is told; everything, when it is not said."""

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value().removeprefix("whsec_")
        try:
            length = len(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            length = 0
        if not _MIN_SECRET_BYTES <= length <= 64:
            raise InvalidValueError("whsec_ and base64 of 24 to 64 bytes", "something else")
        return value


def read_token(token: SecretStr | None, path: Path | None) -> str | None:
    """Return the token of the settings, or None where there is none.

    Raises:
        BadInputError: its file cannot be read, or it is no token.
    """
    if path is not None:
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no ASCII text"
            raise BadInputError(f"token: cannot read {path}: {reason}; MERGEFLEET_TOKEN_PATH names it") from error
    elif token is not None:
        text = token.get_secret_value()
    else:
        return None
    if len(text) < MIN_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise BadInputError(
            f"token: expected at least {MIN_TOKEN} printable ASCII characters without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return text
