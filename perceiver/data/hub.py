"""The Hugging Face hub: whether it can be reached."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def why_unreachable() -> str | None:
    """Why the hub cannot be reached, as far as that shows at once; None: it may be there.

    Without a network, the hub's own library tries for half a minute.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies():  # a proxy looks names up by itself
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return None
