"""Whether anything answers at an address, within seconds."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

PATIENCE = 2.5  # seconds for name look-up, connection and first answer together
# What a gateway answers when it cannot reach the host behind it, or wants a password first.
_GATEWAY_TROUBLE = (407, 502, 503, 504)


def why_no_answer(address: str, seconds: float = PATIENCE) -> str:
    """Return why nothing answers at an address within `seconds`; "" where something does.

    Goes through the proxies that the environment names, as the hub client does.
    """
    outcome: list[str] = []
    # A daemon, because a name look-up that hangs can be neither interrupted nor timed out.
    thread = threading.Thread(target=lambda: outcome.append(_ask(address, seconds + 1)), daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


class _AnyAnswer(urllib.request.HTTPErrorProcessor):
    """Takes every status as an answer, and follows no redirection."""

    def http_response(self, request, response):
        """The response as it is."""
        return response

    https_response = http_response


def _ask(address: str, seconds: float) -> str:
    """One HEAD request; the empty string for an answer, otherwise the trouble in words."""
    try:
        parts = urlsplit(address)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all", "")
        if proxy and urllib.request.proxy_bypass(parts.hostname or ""):
            proxy = ""
        if proxy.startswith("socks"):  # which urllib does not speak: the client decides
            return ""
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({parts.scheme: proxy} if proxy else {}), _AnyAnswer
        )
        with opener.open(urllib.request.Request(address, method="HEAD"), timeout=seconds) as response:
            return f"status {response.status}" if response.status in _GATEWAY_TROUBLE else ""
    except Exception as error:  # in a thread of its own, where nobody else would take it
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # The hub client may know certificates that this Python does not: it decides.
        return "" if isinstance(reason, ssl.SSLCertVerificationError) else str(reason) or type(reason).__name__
