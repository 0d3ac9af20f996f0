"""Drivers for the tests of this room."""

import pytest

from tests.unit.cluster.driving.scripted import Fleet


@pytest.fixture
def fleet(tmp_path):
    made = []

    def make(num_workers=1, **settings):
        made.append(Fleet(tmp_path, num_workers, **settings))
        return made[-1]

    yield make
    for each in made:
        each.store.close()
