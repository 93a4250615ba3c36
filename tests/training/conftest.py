"""What all tests of trainings read."""

from pathlib import Path

import pytest

from tests.support.small import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Prepared images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder
