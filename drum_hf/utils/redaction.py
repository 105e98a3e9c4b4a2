"""What may be shown and published: texts, addresses, settings and commands, without secrets.

Errors, logs, manifests and reports go through these functions. Outputs are published, so commands also lose the
folders of this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

__all__ = ["HIDDEN", "address_secrets", "body_secrets", "redact", "redacted", "shown_command", "shown_path"]

#: What stands in place of a secret.
HIDDEN = "…"

#: Keys of the usual services, and what follows the scheme in an Authorization header.
_KEY = re.compile(r"\b(?:hf_\w{8,}|sk-[\w-]{8,}|AIza[\w-]{16,})|(?<=\bbearer )[\w.~+/=-]{8,}", re.IGNORECASE)
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
_JSON_SECRET = re.compile(r"(\"(?P<name>[\w-]+)\"\s*:\s*)\"[^\"]*\"")
_SECRET_WORDS = {
    *("key", "apikey", "secret", "password", "passwd", "pwd", "auth", "authorization"),
    *("credential", "credentials", "signature", "sig", "cookie"),
}
#: Words before "token" that make it a token of a text.
_TEXT_TOKENS = {"bos", "eos", "pad", "stop", "start", "end", "sep", "cls", "mask", "unk", "image"}
#: Values of an address's query that are no secret, and values too short to be one.
_OPEN_PARAMETER = re.compile(r"version|^v$|^alt$", re.IGNORECASE)
_SHORTEST_SECRET = 6


def _names_secret(name: str) -> bool:
    """Whether a field, an option or a query parameter of this name holds a secret.

    >>> [_names_secret(name) for name in ("api_key", "--hf-token", "X-Api-Key", "max_tokens", "eos_token", "seed")]
    [True, True, True, False, False, False]
    """
    words = re.split(r"[_\W]+", name.lower().strip("-"))
    return words[-1] in _SECRET_WORDS or (words[-1] == "token" and not _TEXT_TOKENS & set(words))


def _plain_address(match: re.Match[str]) -> str:
    start, mark, query = match[0].partition("?")
    scheme, _, rest = start.partition("://")
    host, slash, path = rest.partition("/")
    query, hash_mark, _ = query.partition("#")
    parameters = [name if not equals else f"{name}={HIDDEN}" for name, equals, _ in _parameters(query)]
    shown = "&".join(parameters) if "=" in query else HIDDEN
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{mark}{shown if mark else ''}{hash_mark}"


def _parameters(query: str) -> list[tuple[str, str, str]]:
    return [part.partition("=") for part in query.split("&")]


def redact(text: str, secrets: Iterable[str] = (), hidden: str = HIDDEN) -> str:
    """A text without these secrets, however they are cased or quoted, and without what looks like one.

    Addresses lose user name, password and the values of their query.

    Args:
        secrets: what must not be shown.
        hidden: what stands in their place.

    Example:
        >>> redact("POST https://me:pw@gw/v1?api-key=abc failed for HUNTER2", ["hunter2"])
        'POST https://gw/v1?api-key=… failed for …'
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        for spelling in {secret, quote(secret), quote(secret, safe="")}:
            text = re.sub(re.escape(spelling), lambda _: hidden, text, flags=re.IGNORECASE)
    return _KEY.sub(HIDDEN, _ADDRESS.sub(_plain_address, text))


def redacted(value: Any) -> Any:
    """JSON-ready settings in which secrets are hidden: fields of such a name, and texts as by `redact`.

    Example:
        >>> redacted({"api_key": "abc", "chat_template_kwargs": {"enable_thinking": False}})
        {'api_key': '…', 'chat_template_kwargs': {'enable_thinking': False}}
    """
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if _names_secret(str(name)) and isinstance(inner, str) else redacted(inner)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def address_secrets(address: str) -> set[str]:
    """Values of an address's query that may be secrets."""
    query = address.partition("?")[2].partition("#")[0]
    return {
        value or name  # a query may be the key alone
        for name, _, value in _parameters(query)
        if len(value or name) >= _SHORTEST_SECRET and not _OPEN_PARAMETER.search(name)
    }


def body_secrets(value: Any) -> set[str]:
    """Texts in a request's body whose field is named as a secret's."""
    if isinstance(value, Mapping):
        own = {inner for name, inner in value.items() if _names_secret(str(name)) and isinstance(inner, str)}
        return own.union(*map(body_secrets, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(body_secrets, value))
    return set()


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as it may be published: of an absolute one the last name alone.

    Example:
        >>> shown_path("/home/me/birds"), shown_path("runs/birds")
        ('birds', 'runs/birds')
    """
    given = os.fspath(path)
    if PureWindowsPath(given).drive and PureWindowsPath(given).is_absolute():
        return PureWindowsPath(given).name
    return Path(given).name if os.path.isabs(given) else given


def shown_command(words: Sequence[str]) -> str:
    """A command without secrets, and with the last name alone of what lies in a folder of this machine.

    Example:
        >>> shown_command(["/usr/bin/drum-hf", "eval", "--data", "/home/me/birds", "--api-token", "abc"])
        'drum-hf eval --data birds --api-token …'
        >>> shown_command(["drum-hf", "eval", "--retriever", "epr=/home/me/epr"])
        'drum-hf eval --retriever epr=epr'
    """
    shown: list[str] = []
    hide = False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        secret = (option or word).startswith("-") and _names_secret(option or word)
        if hide or (secret and equals):
            value = HIDDEN
        elif "://" not in value:
            value = re.sub(r"[^=,]+", lambda part: shown_path(part[0]), value)
        value = _JSON_SECRET.sub(lambda m: f'{m[1]}"{HIDDEN}"' if _names_secret(m["name"]) else m[0], value)
        shown.append(option + equals + redact(value))
        hide = secret and not equals
    return " ".join(shown)
