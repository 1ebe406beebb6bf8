"""From the bytes of a body to a checked request.

request = read_body(body, ChatRequest)   # ApiError 400, which names the field
"""

import json
import re
import sys
from typing import Any, TypeVar

from pydantic import ValidationError

from server.errors import ApiError
from server.fields import settle
from server.schemas import CommonRequest

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Request = TypeVar("Request", bound=CommonRequest)


def parse_body(body: bytes) -> dict:
    """The JSON object in a body, in which every text is Unicode. Raises ApiError."""
    try:
        content = json.loads(body.decode("utf-8"))
        surrogate = _find_surrogate(content) if ESCAPED_SURROGATE.search(body) else None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except ValueError:  # Python's bound on what it reads as an integer
        raise ApiError(400, f"the body has an integer of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    if surrogate:
        path = _path(surrogate)
        raise ApiError(400, f"{path} has a lone surrogate, which is not a Unicode character", param=path)
    return content


def read_body(body: bytes, kind: type[Request]) -> Request:
    """The request in a body; ApiError 400 names what is wrong with it."""
    return check_request(parse_body(body), kind)


def check_request(content: dict, kind: type[Request]) -> Request:
    """As read_body(), of a body that has been parsed."""
    try:
        request = kind.model_validate(settle(content, kind.model_fields))
        request.check()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = _path(first["loc"])
        if first["type"] == "missing":
            raise ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter") from None
        said = first["msg"].replace(" after validation", "")
        raise ApiError(400, f"{path}: {said}", param=path, code="invalid_value") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    return request


def _path(loc: tuple) -> str:
    """messages[0].content; without the names that pydantic gives to the members of a union."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[\w-]{1,64}", part) and part not in ("str", "int"):
            path += f".{part}" if path else part
    return path


def _find_surrogate(value: Any, where: tuple = ()) -> tuple | None:
    """Where in a JSON value the first text with a lone surrogate is."""
    if isinstance(value, str):
        return where if LONE_SURROGATE.search(value) else None
    if isinstance(value, dict):
        if any(LONE_SURROGATE.search(key) for key in value):
            return where
        parts = value.items()
    else:
        parts = enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in parts if (found := _find_surrogate(part, (*where, key)))), None)
