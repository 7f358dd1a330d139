"""S3 credentials from a mounted Secret, read again when the kubelet swaps its files.

botocore asks its credentials object for keys whenever it signs a request, also for its own retries, so a rotated
Secret takes effect with the next request. botocore's RefreshableCredentials was rejected: it needs an expiry time, and
a Secret has none.
"""

import threading
from pathlib import Path

from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import PartialCredentialsError

KEY_ID_FILE = "AWS_ACCESS_KEY_ID"
KEY_FILE = "AWS_SECRET_ACCESS_KEY"
SESSION_FILE = "AWS_SESSION_TOKEN"
_FILES = (KEY_ID_FILE, KEY_FILE, SESSION_FILE)


def folder_has_keys(folder: Path | None) -> bool:
    """Returns True if the folder of a mounted Secret holds S3 keys."""
    return folder is not None and (folder / KEY_ID_FILE).is_file()


class FolderCredentials(Credentials):  # type: ignore[misc]  # botocore has no types
    """Credentials that follow the files of a folder.

    Raises botocore's PartialCredentialsError if a needed file is missing or empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[tuple[int, int] | None, ...] = ()
        self._frozen = ReadOnlyCredentials("", "", None, None)
        self._reload()
        super().__init__(self._frozen.access_key, self._frozen.secret_key, self._frozen.token, method="mounted-secret")

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Returns the keys that the files hold now."""
        with self._lock:  # requests are signed on several threads
            if self._state() != self._seen:
                self._reload()
            return self._frozen

    def _state(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_identity(self._folder / name) for name in _FILES)

    def _reload(self) -> None:
        seen = self._state()  # before the content: a file that changes meanwhile is read again
        key_id, key, session = (_content(self._folder / name) for name in _FILES)
        if not key_id or not key:
            raise PartialCredentialsError(provider="mounted-secret", cred_var=KEY_FILE if key_id else KEY_ID_FILE)
        self._frozen = ReadOnlyCredentials(key_id, key, session, None)
        self._seen = seen


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns  # the kubelet swaps a link, so that the inode changes


def _content(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
