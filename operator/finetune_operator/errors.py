"""Errors of the operator, in one tree.

OperatorError
├── SettingsError            the environment is incomplete or wrong
├── ApiError                 the API server refused; carries status, verb and resource
│   ├── ForbiddenError            403: the operator's role lacks a verb
│   ├── NotFoundError             404
│   └── ConflictError             409: AlreadyExists, or the object changed meanwhile
├── ApiUnavailableError           no answer, or an answer that may be different in a moment (429, 5xx)
└── ReportRefusedError            a progress report was turned down; carries the HTTP status
"""

from dataclasses import dataclass


class OperatorError(Exception):
    """Base of every error the operator raises itself."""


class SettingsError(OperatorError):
    """The environment is incomplete or wrong; the message names every variable concerned."""


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
    """The object does not exist (any more)."""


class ConflictError(ApiError):
    """The object exists already, or changed since it was read."""


class ApiUnavailableError(OperatorError):
    """The API server did not answer, or asked to be left alone for a moment."""


@dataclass
class ReportRefusedError(OperatorError):
    """A progress report was turned down."""

    status: int
    reason: str
    message: str
