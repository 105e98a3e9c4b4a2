"""A small file from an address that a stranger may have written: bounded in bytes and time, and from public hosts."""

from __future__ import annotations

import ipaddress
import socket
import time
from urllib.parse import urlsplit

from ..errors import ImageError

__all__ = ["download"]

_MOST_REDIRECTS = 5


def download(url: str, *, timeout: float, max_bytes: int, private: bool = False) -> bytes:
    """Fetch an http(s) address.

    The host's name is looked up once, and the connection goes to the number that was checked. Proxies of the
    environment are not used.

    Args:
        timeout: seconds in all.
        max_bytes: a longer answer is refused.
        private: whether the host may be this machine, or one that the internet doesn't reach.

    Raises:
        ImageError: it can't be fetched within these bounds.
    """
    import httpx

    deadline = time.monotonic() + timeout
    target = _shown(url)
    try:
        with httpx.Client(trust_env=False, timeout=timeout) as client:
            for _ in range(_MOST_REDIRECTS + 1):
                at = httpx.URL(url)
                target = _shown(url)
                if at.scheme not in ("http", "https") or not at.host:
                    raise ImageError(f"expected an address that begins with http:// or https://, got {target}")
                number = _look_up(at.host, at.port or (443 if at.scheme == "https" else 80), private, target)
                request = client.build_request(
                    "GET",
                    at.copy_with(host=number),
                    headers={"Host": at.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
                    extensions={"sni_hostname": at.host},
                )
                answer = client.send(request, stream=True)
                try:
                    if answer.has_redirect_location:
                        url = str(at.join(answer.headers["location"]))
                        continue
                    if answer.status_code != 200:
                        raise ImageError(f"expected an image at {target}, got status {answer.status_code}")
                    data = bytearray()
                    for chunk in answer.iter_raw():
                        data += chunk
                        if len(data) > max_bytes:
                            raise ImageError(f"expected at most {max_bytes:,} bytes, {target} sends more; shrink it")
                        if time.monotonic() > deadline:
                            raise ImageError(f"{target} took more than {timeout:g} s; pass a larger timeout=")
                    return bytes(data)
                finally:
                    answer.close()
        raise ImageError(f"{target} leads to other addresses more than {_MOST_REDIRECTS} times")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{target} can't be fetched ({type(error).__name__}: {str(error)[:200]})") from error


def _look_up(host: str, port: int, private: bool, target: str) -> str:
    """A number of the host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    numbers = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    for number in numbers:
        inner = [getattr(number, name, None) for name in ("ipv4_mapped", "sixtofour")]
        if not private and not all(each.is_global and not each.is_multicast for each in (number, *inner) if each):
            raise ImageError(
                f'{target} is on this machine or its network ({number}); download it yourself, or pass urls="private"'
            )
    return str(min(numbers, key=lambda number: number.version))


def _shown(url: str) -> str:
    """Without password and query, which may hold a key."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]
    except ValueError:
        return "an address that can't be parsed"
