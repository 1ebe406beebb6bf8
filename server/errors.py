"""What a client gets that did something wrong, or came at the wrong time: OpenAI's error object, or Anthropic's."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with this HTTP status; `param` names the field of the body, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.text}}

    @property
    def text(self) -> str:
        # A message may quote the client's lone surrogates, which no UTF-8 can carry.
        return self.message.encode("utf-8", "replace").decode()
