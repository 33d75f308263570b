"""Fixtures that several test modules use; builders are in tiny.py, samples.py and members.py."""

import pytest
from hub_server import Hub


@pytest.fixture(scope="session")
def hub():
    """A Hub on this machine."""
    hub = Hub()
    yield hub
    hub.shutdown()
