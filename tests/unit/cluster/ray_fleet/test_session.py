"""Which cluster is joined, as far as it is decided before there is any Ray."""

import os
import socket

import pytest

from cluster.ray_fleet.session import open_session
from cluster.settings import Settings
from jobs.errors import BadInputError, NotFoundError


@pytest.fixture
def connect(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    settings = Settings(home=tmp_path)

    def run(address, ray_address=None):
        if ray_address is not None:
            monkeypatch.setenv("RAY_ADDRESS", ray_address)
        return open_session(settings, namespace="test", address=address, log_format="text")

    return run


def test_auto_is_the_cluster_that_ray_address_names(connect):
    with socket.socket() as nothing_listens:
        nothing_listens.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nothing_listens.getsockname()[1]}"
        with pytest.raises(NotFoundError, match=f"no Ray cluster answers at {address}"):
            connect("auto", address)


@pytest.mark.parametrize("ray_address", [None, ""])
def test_auto_needs_ray_address(connect, ray_address):
    with pytest.raises(BadInputError, match="expected RAY_ADDRESS"):
        connect("auto", ray_address)


@pytest.mark.parametrize("ray_address", ["http://127.0.0.1:8265", "ray://head:10001", "ray", "auto", "127.0.0.1"])
def test_what_names_no_cluster_is_refused(connect, ray_address):
    """People set RAY_ADDRESS to the URL of a dashboard, for `ray job submit`."""
    with pytest.raises(BadInputError, match=r"expected host:port .*RAY_ADDRESS, found"):
        connect("auto", ray_address)


def test_a_local_ray_does_not_pass_ray_address_by_in_silence(connect):
    with pytest.raises(BadInputError, match="which a local Ray would ignore"):
        connect(None, "10.0.0.1:6379")


def test_an_address_that_is_given_goes_first(connect):
    with pytest.raises(BadInputError, match=r"found 'here'"):
        connect("here", "127.0.0.1:6379")
