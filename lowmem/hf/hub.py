"""Is the Hugging Face Hub within reach? Asked first, because its client retries for most of a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.constants import ENDPOINT


def hub_has_an_address() -> bool:
    """False when the Hub's host name cannot be resolved, so that only its local cache can help.

    Behind a proxy the answer is True: names are then resolved by the proxy.
    """
    host = urlsplit(ENDPOINT).hostname
    if host is None or getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except socket.gaierror:
        return False
    return True
