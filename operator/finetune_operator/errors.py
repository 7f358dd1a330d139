"""Errors of the operator, in one tree.

OperatorError
├── SettingsError                 the environment, the command line or the credentials are incomplete or wrong
├── ApiError                      the API server refused; carries status, verb and path
│   ├── ForbiddenError            403: the operator's role lacks a verb
│   ├── NotFoundError             404
│   └── ConflictError             409: AlreadyExists, or the object changed since it was read
├── ApiUnavailableError           no answer, a temporary one (429, 5xx), or one that no API server gives
└── ReportRefusedError            a progress report was refused; carries the HTTP status of the answer
"""

from dataclasses import dataclass


class OperatorError(Exception):
    """Base of every error the operator raises itself."""


class SettingsError(OperatorError):
    """The environment, the command line or the credentials are incomplete or wrong; the message names each of them."""


class ApiError(OperatorError):
    """The API server refused a request."""

    def __init__(self, status: int, request: str, message: str) -> None:
        super().__init__(f"{request}: {status}: {message}")
        self.status = status
        self.request = request
        """Verb and path, such as `POST /api/v1/namespaces/team/configmaps`."""
        self.message = message


class ForbiddenError(ApiError):
    """The operator's role lacks a verb on a resource."""


class NotFoundError(ApiError):
    """The object does not exist, or no longer."""


class ConflictError(ApiError):
    """The object already exists, or changed since it was read."""


class ApiUnavailableError(OperatorError):
    """The API server did not answer, or answered that it cannot serve the request now; or what answered is none."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds for which the server asked not to be asked again; 0 if it did not say."""


@dataclass
class ReportRefusedError(OperatorError):
    """A progress report was refused."""

    status: int
    reason: str
    message: str
