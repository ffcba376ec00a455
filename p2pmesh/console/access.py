"""Access to the console beyond the `WebPolicy`: pure decisions over request headers.

Rules: whoever can open the console may read the status, but no page from elsewhere calls its API;
only the holder of the token may change anything. Knows nothing of quart, sockets or the node.
"""

from __future__ import annotations

import hmac

from werkzeug.datastructures import Headers

BEARER = "Bearer "


def foreign_fetch(headers: Headers) -> bool:
    """Whether a browser says that another site's page makes this call; for API paths only.

    Opening the console itself from a link elsewhere is harmless, so pages do not ask this.
    """
    return headers.get("Sec-Fetch-Site", "none").lower() not in {"none", "same-origin"}


def holds_token(headers: Headers, token: str) -> bool:
    """Whether the request carries the control token; takes equally long for every wrong one."""
    given = headers.get("Authorization", "")
    if not token or not given.startswith(BEARER):
        return False
    return hmac.compare_digest(given[len(BEARER) :].encode(), token.encode())
