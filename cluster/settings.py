"""Settings from the environment (`MERGEFLEET_*`) and a TOML file. Every name is checked; none has to be given.

The environment goes before the file. The file is the one named by `MERGEFLEET_CONFIG`, else `mergefleet.toml` in the
working directory when there is one.
"""

import difflib
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import InitSettingsSource

from cluster.logs import DEBUG_VARIABLE
from cluster.setting_types import AbsolutePath, Patterns, Port, Url, Webhook, names, read_token
from jobs.allowance import Allowance, Pattern
from jobs.errors import BadInputError, FailureClass
from jobs.ledger.shares import ShareRules
from jobs.policy import FailurePolicy, failure_policy
from jobs.sizes import NumBytes
from workers.merging.settings import WorkerSettings

ENV_PREFIX = "MERGEFLEET_"
CONFIG_VARIABLE = "MERGEFLEET_CONFIG"
CONFIG_NAME = "mergefleet.toml"

_SECRET = ("", "store", "server", "token", "webhooks")
"""Settings whose wrong values are not shown: a URL may hold a password."""

_VARIABLES_THAT_ARE_NO_SETTINGS = frozenset({CONFIG_VARIABLE, DEBUG_VARIABLE})


class Settings(BaseSettings):
    """What an operator can set. `MERGEFLEET_<NAME>` in the environment, `<name>` in the file."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True)

    home: AbsolutePath = Path("~/.mergefleet")
    """Where everything is kept that is not set to be elsewhere."""
    store: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+]*://")] = Field(
        default_factory=lambda known: f"sqlite:///{known['home']}/mergefleet.db"
    )
    """URL of the ledger."""
    cache: AbsolutePath = Field(default_factory=lambda known: known["home"] / "cache")
    """Fetched sources and quantized bases; may be shared by workers of one machine."""
    scratch: AbsolutePath = Field(default_factory=lambda known: known["home"] / "scratch")
    """Files on their way to a remote destination; needs room for the passes that run at one time."""
    reports: AbsolutePath = Field(default_factory=lambda known: known["home"] / "reports")
    """Parity reports, of releases and of merges that did not pass."""
    logs: AbsolutePath = Field(default_factory=lambda known: known["home"] / "logs")
    """Log files of drivers and workers, each on its own machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: workers on GPUs on the machines that have some, and on the CPU on those that have none. `cuda`: on GPUs
    alone. `cpu`: on the CPU of every machine."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Worker processes; by default one for each GPU, and one for every two cores of machines that have none. GPUs get
    theirs first."""
    spare_workers: Annotated[int, Field(ge=0)] = 2
    """Further workers on the CPU that stand by, with everything loaded, for when another one is lost."""
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Compute threads of each worker; by default the cores, divided among the workers."""
    resident_bytes: NumBytes = 4 * 1024**3
    """Most bytes of quantized bases that one worker keeps in memory between units."""
    uplink_bytes_per_second: Annotated[NumBytes, Field(gt=0)] | None = None
    """What each machine can send to remote stores: jobs that cannot be sent within `timeout_seconds` fail at once."""
    inert_adapter_fields: Annotated[frozenset[str], NoDecode, BeforeValidator(names)] = frozenset()
    """Fields of `adapter_config.json` that PEFT does not know and that change no merge: names with commas between."""

    allowed_sources: Patterns = None
    """Where bases and adapters may be read from; everywhere when it is not set."""
    allowed_destinations: Patterns = None
    """Where releases may be written to; everywhere when it is not set."""

    lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    """How long a job stays with a driver that no longer says that it lives."""
    poll_seconds: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How often the store is asked for work and the workers for progress."""
    unresponsive_seconds: Annotated[float, Field(ge=1)] = 60.0
    """How long a worker may answer nothing before it is ended and replaced."""
    max_jobs_per_pass: Annotated[int, Field(ge=1)] = 8
    """Most adapters merged in one read of a base."""
    max_units_of_other_bases: Annotated[int, Field(ge=0)] = 4
    """How many units of other bases may go before one that waits, for each worker of the fleet; bounds what residency
    and priority may cost a base."""

    share_label: str = ""
    """The label whose values share the fleet; without one, all jobs are one share."""
    shares: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """By value of `share_label`, its weight: with 3 and 1, three jobs of the one go for each of the other; 1 where it
    is not named."""
    quotas: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    """By value of `share_label`, most of its jobs that are claimed at one time."""

    max_attempts: Annotated[int, Field(ge=1)] = 5
    """Attempts before a failure that may go away is final."""
    max_worker_losses: Annotated[int, Field(ge=1)] = 2
    """Workers that a job costs while it runs alone before it is quarantined. A worker that is lost with several jobs is
    charged to none of them: each runs alone from then on."""
    retry_delay_seconds: Annotated[float, Field(ge=0)] = 2.0
    """Longest wait before the second attempt; doubles with each one."""
    max_retry_delay_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Longest wait before any attempt, and longest pause of a place."""
    policy: Mapping[FailureClass, Mapping[str, float | bool]] = {}
    """By class of failure, what differs from the table that `mergefleet policy` prints: attempts, delay_seconds,
    max_delay_seconds, pauses_place, alone."""
    stop_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a driver that was told to stop waits for releases that are being published; all else is given back at
    once."""

    server: Url | None = None
    """Where `mergefleet serve` is: commands about the queue then ask it, and not the ledger."""
    token: SecretStr | None = None
    """What the server asks for, and who asks it has to show."""
    token_path: AbsolutePath | None = None
    """A file with the token, in its place."""
    traces: Url | None = None
    """Where traces of jobs go, OTLP over HTTP, such as `http://127.0.0.1:4318`; nowhere when it is not set."""
    webhooks: Mapping[str, Webhook] = {}
    """By name, who is told of jobs that ended and of places that are paused: url, secret, kinds. Sent by
    `mergefleet serve`."""

    dashboard: bool = True
    """Whether the local Ray serves its dashboard."""
    dashboard_host: str = "127.0.0.1"
    """Address the local Ray's dashboard listens on."""
    dashboard_port: Port | None = None
    """Port of the local Ray's dashboard; by default the first free one from 8265."""
    metrics_port: Port | None = None
    """Port of the local Ray's Prometheus endpoint; by default a free one."""
    ray_directory: AbsolutePath = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"mergefleet-{os.getuid()}"
    )
    """Sessions and logs of the local Ray. Short: the sockets below it must fit 107 bytes."""

    @model_validator(mode="after")
    def _check_dashboard(self) -> Self:
        ignored = sorted({"dashboard_host", "dashboard_port"} & self.model_fields_set)
        if ignored and not self.dashboard:
            raise ValueError(f"dashboard is off, which would ignore {' and '.join(ignored)}")
        return self

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.token is not None and self.token_path is not None:
            raise ValueError("token and token_path are both set; only one can be meant")
        return self

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if not self.share_label and (self.shares or self.quotas):
            raise ValueError("shares and quotas are of values of share_label, which is not set")
        return self

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: Mapping[FailureClass, Mapping[str, Any]]) -> Mapping[FailureClass, Mapping[str, Any]]:
        failure_policy(overrides=value)
        return value

    @property
    def failure_policy(self) -> FailurePolicy:
        """What follows a failure, by its class."""
        return failure_policy(
            max_attempts=self.max_attempts,
            max_worker_losses=self.max_worker_losses,
            delay_seconds=self.retry_delay_seconds,
            max_delay_seconds=self.max_retry_delay_seconds,
            overrides=self.policy,
        )

    @property
    def share_rules(self) -> ShareRules:
        """How the fleet is shared."""
        return ShareRules(label=self.share_label, weights=self.shares, quotas=self.quotas)

    def read_token(self) -> str | None:
        """Return the token, or None where there is none.

        Raises:
            BadInputError: its file cannot be read, or it is no token.
        """
        return read_token(self.token, self.token_path)

    @property
    def allowance(self) -> Allowance:
        """The places that requests may name."""
        return Allowance(sources=_parsed(self.allowed_sources), destinations=_parsed(self.allowed_destinations))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings names its arguments
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment, then the file; no dotenv, no secrets directory."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_file())


def load_settings(**arguments: Any) -> Settings:
    """Read the settings.

    Args:
        arguments: values that go before environment and file, for example from the command line.

    Raises:
        BadInputError: a name is unknown, a value is wrong, or the file cannot be read; all problems in one message.
    """
    _check_environment()
    try:
        return Settings(**arguments)
    except ValidationError as error:
        raise BadInputError("settings: " + "; ".join(_problems(error))) from error


def worker_settings(settings: Settings, *, device: str, num_threads: int | None) -> WorkerSettings:
    """Return what a worker needs to know."""
    return WorkerSettings(
        cache=settings.cache,
        scratch=settings.scratch,
        reports=settings.reports,
        device=device,
        num_threads=num_threads,
        resident_bytes=settings.resident_bytes,
        uplink_bytes_per_second=settings.uplink_bytes_per_second,
        inert_adapter_fields=settings.inert_adapter_fields,
        allowance=settings.allowance,
    )


def _parsed(texts: tuple[str, ...] | None) -> tuple[Pattern, ...] | None:
    return None if texts is None else tuple(Pattern.parse(text) for text in texts)


def _check_environment() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = {
        name: known
        for name in sorted(os.environ)
        if name.startswith(ENV_PREFIX) and name not in known | _VARIABLES_THAT_ARE_NO_SETTINGS
    }
    _refuse(unknown, "environment")


def _read_file() -> dict[str, Any]:
    path = _config_path()
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"settings: cannot read {path}: {error.strerror}; {CONFIG_VARIABLE} names it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"settings: {path} is no TOML: {error}") from error
    known = set(Settings.model_fields)
    _refuse({name: known for name in values if name not in known}, str(path))
    return values


def _config_path() -> Path | None:
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named).expanduser()
    here = Path.cwd() / CONFIG_NAME
    return here if here.is_file() else None


def _refuse(unknown: dict[str, set[str]], where: str) -> None:
    if not unknown:
        return
    parts = []
    for name, known in unknown.items():
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
        parts.append(f"{name} (nearest: {nearest[0]})")
    raise BadInputError(f"settings: unknown names in {where}: " + ", ".join(parts))


def _problems(error: ValidationError) -> list[str]:
    problems = []
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if detail["type"] == "default_factory_not_called":
            continue  # only says that another value is wrong, which has its own line
        found = "" if name in _SECRET else f", found {detail['input']!r}"
        problems.append(f"{_origin(name)}: {detail['msg']}{found}" if name else detail["msg"])
    return problems


def _origin(name: str) -> str:
    """Return where a person finds the value of `name`."""
    variable = ENV_PREFIX + name.upper()
    return variable if variable in os.environ else name
