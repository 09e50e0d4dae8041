"""Passwords in URIs: what is named in a sweep is written to run folders, logged and printed."""

from __future__ import annotations

import re

# From a user's name to the last `@`, since a password may hold any character; a port is none. Or as a setting, also of
# several that are encoded as one.
PASSWORD = re.compile(
    r"""(://[^/?#:\[\s]*:)(?!\d+(?:[/?#&\s'"]|$))\S+(@)
    |((?:[?&]|%3B|=)(?:password|passwd|pwd|sslpassword|client_secret|secret_key|session_token|account_key|sig)(?:=|%3D))
    [^&\#\s]+()""",
    re.IGNORECASE | re.VERBOSE,
)


def require_no_password(uri: str) -> str:
    """Takes a URI that has no password; a user's name it may have.

    Raises:
        ValueError: It has one; does not say it.
    """
    if PASSWORD.search(uri):
        raise ValueError(
            "a password would be recorded; leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or write "
            "~/.aws/credentials), MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD (or ~/.pgpass)"
        )
    return uri


def masked(text: str) -> str:
    """A text to show, without the passwords of the URIs in it."""
    return PASSWORD.sub(r"\1\3***\2", text)
