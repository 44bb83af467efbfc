"""What a client is told when something cannot be done, as OpenAI's JSON."""

from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A refusal: its status, its one line, and the parameter that it is about."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read an error from."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {401: {"WWW-Authenticate": 'Basic realm="lance-mlx", charset="UTF-8"'}, 429: {"Retry-After": "5"}}
        return JSONResponse(self.body, self.status, headers.get(self.status))
