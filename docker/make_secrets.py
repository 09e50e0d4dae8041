"""New secrets in a folder, for compose.yaml and local.py; those that are there already stay.

    python docker/make_secrets.py docker/secrets

Containers read the files as users of their own, so that the files are open and the folder is closed.
"""

import json
import secrets
import sys
from pathlib import Path


def make_secrets(folder: Path) -> None:
    """Writes the token of Ray, the password of PostgreSQL, and one S3 key as its server and its clients want it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    identity = {
        "name": "clnp",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    credentials = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    for texts in (
        {"ray_token": secrets.token_hex(32)},
        {"postgres_password": secrets.token_hex(16)},
        {"s3_credentials": credentials, "s3_identities": json.dumps({"identities": [identity]})},
    ):
        if not all((folder / name).exists() for name in texts):
            for name, text in texts.items():
                (folder / name).write_text(text)
                (folder / name).chmod(0o644)


if __name__ == "__main__":
    make_secrets(Path(sys.argv[1]))
