"""A connection to Ray: a local one started here, reachable from this machine only, or a running cluster joined.

A local Ray listens on loopback, with token authentication, in its own directory, so that it neither meets nor stops
any other Ray of the machine.
"""

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.logs import LogFormat
from cluster.settings import Settings
from jobs.errors import AuthError, BadInputError, InternalError, NoCapacityError, NotFoundError
from workers.files.local import file_errors

if TYPE_CHECKING:
    from ray.job_config import JobConfig

_OBJECT_STORE_BYTES = 100 * 1024**2
"""Calls and their answers only: tensors never go through it."""
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name, "0" makes every process of a node listen on loopback only, on Linux too. Like the variables of
token authentication it is read when Ray is imported: nothing imports Ray before a session is opened."""
_RECONNECT_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""How long a process of Ray waits for a control service that is gone before it ends; a local one does not come back."""
_CONNECT_SECONDS = 5.0
_AUTO = "auto"
_ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Ray sets it in the entrypoint of a job; people set it for `ray job submit`, to the URL of a dashboard."""
_MAX_SOCKET_PATH = 107
_PRIVATE = "own/ray"
"""Below the directory: Ray opens its own one to all users (0777), so that it lies in one that is closed (0700)."""
_SOCKETS_BELOW_DIRECTORY = f"/{_PRIVATE}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LOCAL_ONLY = ("dashboard", "dashboard_host", "dashboard_port", "metrics_port", "ray_directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a person needs to look into Ray, and what the fleet can be made of."""

    address: str
    """Where another driver can join."""
    dashboard_url: str | None
    metrics_urls: tuple[str, ...]
    """Prometheus endpoints, one for each node."""
    token_path: Path | None
    """File with the token the dashboard asks for; None when it asks for none or the operator brought their own."""
    num_cpus: int
    num_gpus: int
    num_cpus_without_gpus: int
    """Cores of those machines that have no GPU."""


def open_session(settings: Settings, *, namespace: str, address: str | None, log_format: LogFormat) -> Session:
    """Start a local Ray, or join the cluster at `address`.

    Args:
        settings: of the dashboard, the metrics endpoint and the directory of a local Ray.
        namespace: unique to this driver; its actors are named in it.
        address: of a running cluster, `host:port`, or `auto` for the one that RAY_ADDRESS names, as in the entrypoint
            of `ray job submit`; None starts a local Ray that ends with this process.
        log_format: how the workers write their logs.

    Raises:
        BadInputError: a setting or RAY_ADDRESS would be ignored, a path is too long, or the dashboard would be open to
            all users.
        NotFoundError: no cluster answers at `address`.
        AuthError: the cluster wants another token.
    """
    address = _resolve(address)
    return (
        _start(settings, namespace, log_format) if address is None else _join(settings, namespace, address, log_format)
    )


def close_session() -> None:
    """Leave the cluster; a local Ray ends. Actors of this driver end either way."""
    import ray  # noqa: PLC0415 - see _start

    ray.shutdown()


def _resolve(address: str | None) -> str | None:
    """Return the address of the cluster to join, None for a local one.

    Raises:
        BadInputError: RAY_ADDRESS is asked for and not set, or set and not asked for.
    """
    given = os.environ.get(_ADDRESS_VARIABLE)
    if address == _AUTO:
        if not given:
            raise BadInputError(
                f"--address auto: expected {_ADDRESS_VARIABLE}, as `ray job submit` sets it for its jobs, found none; "
                "say --address host:port"
            )
        return given
    if address is None and given:
        raise BadInputError(
            f"{_ADDRESS_VARIABLE} is {given}, which a local Ray would ignore; say --address auto to join that cluster, "
            f"or unset {_ADDRESS_VARIABLE}"
        )
    return address


def _start(settings: Settings, namespace: str, log_format: LogFormat) -> Session:
    directory = _private_directory(settings.ray_directory)
    token_path = _enable_token_auth(settings.home)
    if not _token_auth_is_on() and not _is_loopback(settings.dashboard_host):
        raise BadInputError(
            f"dashboard_host is {settings.dashboard_host}, and RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} leaves the "
            "dashboard open to anyone who can reach it; unset RAY_AUTH_MODE, or let it listen on 127.0.0.1"
        )
    if "ray" in sys.modules and os.environ.get(_LOOPBACK_ONLY) != "0":
        raise InternalError("Ray was imported before its session was opened, and has read another environment")
    os.environ[_LOOPBACK_ONLY] = "0"
    os.environ.setdefault(_RECONNECT_SECONDS, "10")
    import ray  # noqa: PLC0415

    try:
        context: Any = ray.init(
            address="local",
            namespace=namespace,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=settings.dashboard,
            dashboard_host=settings.dashboard_host,
            dashboard_port=settings.dashboard_port,
            log_to_driver=False,
            logging_level=logging.WARNING,
            job_config=_job_config(log_format),
            _temp_dir=str(directory),
            _metrics_export_port=settings.metrics_port,
        )
    except ValueError as error:  # a port that is taken
        raise BadInputError(f"Ray refused to start: {error}") from error
    except (OSError, RuntimeError) as error:
        raise NoCapacityError(f"Ray did not start: {error}; its logs are in {directory}") from error
    return _describe(context.address_info["gcs_address"], context.dashboard_url, token_path)


def _join(settings: Settings, namespace: str, address: str, log_format: LogFormat) -> Session:
    ignored = sorted(set(_LOCAL_ONLY) & settings.model_fields_set)
    if ignored:
        raise BadInputError(
            f"{', '.join(ignored)}: only for a local Ray; the cluster at {address} has its own. Leave them out"
        )
    if _is_loopback(_reach(address)):
        os.environ[_LOOPBACK_ONLY] = "0"  # else Ray looks for it on this machine's other addresses
    import ray  # noqa: PLC0415

    try:
        context: Any = ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.WARNING,
            job_config=_job_config(log_format),
        )
    except ray.exceptions.AuthenticationError as error:
        raise AuthError(
            f"the Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH ({error})"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise NotFoundError(f"no Ray cluster answers at {address}: {error}") from error
    session = _describe(context.address_info["gcs_address"], context.dashboard_url, None)
    dashboard_host = urlsplit(session.dashboard_url or "").hostname
    if dashboard_host is not None and not _is_loopback(dashboard_host) and not _token_auth_is_on():
        ray.shutdown()
        raise BadInputError(
            f"the dashboard of the Ray cluster at {address} is open to anyone who can reach {dashboard_host}; "
            "start the cluster with RAY_AUTH_MODE=token"
        )
    return session


def _reach(address: str) -> str:
    """Return the host of an address that something listens on: Ray itself would try for minutes.

    Raises:
        BadInputError: it is no `host:port`.
        NotFoundError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():  # URLs are of a dashboard, or of a client
        raise BadInputError(
            f"expected host:port of a Ray cluster, in --address or {_ADDRESS_VARIABLE}, found {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise NotFoundError(f"no Ray cluster answers at {address}: {error}") from error
    return host


def _describe(address: str, dashboard_url: str | None, token_path: Path | None) -> Session:
    import ray  # noqa: PLC0415

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    endpoints = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes if node["Alive"]]
    return Session(
        address=address,
        dashboard_url=f"http://{dashboard_url}" if dashboard_url else None,
        metrics_urls=tuple(f"http://{host}:{port}/metrics" for host, port in endpoints if port > 0),
        token_path=token_path,
        num_cpus=int(resources.get("CPU", 1)),
        num_gpus=int(resources.get("GPU", 0)),
        num_cpus_without_gpus=int(
            sum(
                node["Resources"].get("CPU", 0)
                for node in nodes
                if node["Alive"] and not node["Resources"].get("GPU", 0)
            )
        ),
    )


def _job_config(log_format: LogFormat) -> "JobConfig":
    import ray  # noqa: PLC0415
    from ray.job_config import JobConfig  # noqa: PLC0415

    config = JobConfig()
    # Given here and not to ray.init, which would also take over the logging of this process.
    config.set_py_logging_config(
        ray.LoggingConfig(encoding=log_format.upper(), log_level="INFO", additional_log_standard_attrs=["name"])
    )
    return config


def _enable_token_auth(home: Path) -> Path | None:
    """Have Ray ask for a token, unless the operator decided otherwise; return the file of a token made here."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not _token_auth_is_on() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return None
    path = home / "ray_auth_token"
    with file_errors("keeping the token of Ray"):
        home.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make_token(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    return path


def _make_token(path: Path) -> None:
    """Write a token that this user alone can read; a file that is there is whole, and stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-") as file:  # 0600
        file.write(secrets.token_hex(32))
        file.flush()
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(file.name, path)


def _token_auth_is_on() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _private_directory(directory: Path) -> Path:
    """Make the directory that Ray may have, in one that no other user can enter.

    Raises:
        BadInputError: its path is too long, or a directory on the way belongs to another user.
    """
    longest = _MAX_SOCKET_PATH - len(_SOCKETS_BELOW_DIRECTORY)
    if len(os.fsencode(directory)) > longest:
        raise BadInputError(
            f"ray_directory: expected at most {longest} bytes, for the sockets below it, found {directory}; "
            "set MERGEFLEET_RAY_DIRECTORY to a shorter path"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = (directory / _PRIVATE).parent
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    for path in (directory, own):
        if path.stat().st_uid != os.getuid():
            raise BadInputError(f"ray_directory: {path} belongs to another user; set MERGEFLEET_RAY_DIRECTORY")
    if not stat.S_ISDIR(own.lstat().st_mode):
        raise BadInputError(f"ray_directory: {own} is no directory, or a link; set MERGEFLEET_RAY_DIRECTORY")
    own.chmod(0o700)  # its mode before does not count
    return directory / _PRIVATE
