"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version; "unknown" where the package is used from a folder, without an installation."""
    try:
        return version("perceiver-ray")
    except PackageNotFoundError:
        return "unknown"
