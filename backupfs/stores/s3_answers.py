"""What servers of object storage answer, and what may be read out of it."""

import time
import traceback
from collections.abc import Mapping
from typing import Any

from backupfs.errors import BackupfsError, shown

# What servers answer, by what follows from it. Codes are those of S3 and of the servers that speak it.
NO_BUCKET = frozenset({"NoSuchBucket"})
NO_OBJECT = frozenset({"NoSuchKey", "404", "NotFound"})
EXISTS = frozenset({"PreconditionFailed", "412", "409"})
NOT_ABLE = frozenset({"NotImplemented", "501"})
ARCHIVED = frozenset({"InvalidObjectState"})
# An error of 503 that does not mend itself within minutes.
NOT_EXPEDITED = frozenset({"GlacierExpeditedRetrievalNotAvailable"})
FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507", "EntityTooLarge"})
NO_CLASS = frozenset({"InvalidStorageClass"})
NO_REGION = frozenset(
    {
        "InvalidLocationConstraint", "IllegalLocationConstraintException", "PermanentRedirect",
        "AuthorizationHeaderMalformed",
    }
)  # fmt: skip
CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
REFUSED = frozenset(
    {
        "AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "SignatureDoesNotMatch",
        "InvalidToken", "InvalidSecurity", "Forbidden", "403", "401", "Unauthorized", "MethodNotAllowed",
    }
)  # fmt: skip
ARCHIVE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
# A body that was garbled on its way: the next may not be.
GARBLED = frozenset({"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout"})
# What the server would rather do later; a conflict is another request for the same object, which may yet fail.
LATER = frozenset({"SlowDown", "Throttling", "OperationAborted", "ConditionalRequestConflict"})
LATER_STATUS = frozenset({408, 425, 429})

# What boto3 and whoever reads an answer raise where a part of it is missing, or is no number or time.
GARBLED_ANSWER = (KeyError, ValueError, TypeError, OverflowError, RuntimeError)


def code_of(error: Any) -> str:
    """Return the code of an error of boto3's; empty if there is none."""
    return str(error.response.get("Error", {}).get("Code") or "")


def status_of(error: Any) -> int:
    """Return the HTTP status of an error of boto3's; 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def clock_ahead_s(error: Any) -> float:
    """Return by how much this machine's clock is ahead of the server's, by the time of its answer; 0 if unknown."""
    date = date_of(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
    return time.time() - date if date is not None else 0.0


def date_of(headers: Mapping[str, str]) -> int | None:
    """Return when a server gave its answer, in seconds since 1970."""
    from email.utils import parsedate_to_datetime

    try:
        return int(parsedate_to_datetime(headers.get("date", "")).timestamp())
    except (TypeError, ValueError, OverflowError):
        return None


def location_of(error: Any) -> str:
    """Return where an error of boto3's sends on to; empty if it does not."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("location", "")) if 300 <= status_of(error) < 400 else ""


def is_page(error: Any) -> bool:
    """Tell whether an error of boto3's came with a body that is none of S3's; the answer to a look has no body."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    is_look = error.operation_name in ("HeadObject", "HeadBucket")
    has_code = code_of(error) not in ("", str(status_of(error)))
    return not is_look and not has_code and headers.get("content-length") != "0"


def said_by(error: Any) -> str:
    """Return status, code and words of an error of boto3's, for people."""
    message = str(error.response.get("Error", {}).get("Message", "")).strip().rstrip(".")
    status, code = str(status_of(error)), code_of(error)
    return shown(" ".join(dict.fromkeys((status, code or status))) + (f", {message}" if message else ""))


def text_of(error: Exception) -> str:
    """Return the words of any error in one line."""
    return shown(" ".join(str(error).split())).rstrip(".")


def is_distrust(error: BaseException) -> bool:
    """Tell whether an error of TLS says that the other end is not who it should be."""
    import ssl

    from urllib3.util.ssl_match_hostname import CertificateError

    return any(isinstance(one, (ssl.SSLCertVerificationError, CertificateError)) for one in causes_of(error))


def own_fault(error: BaseException) -> BaseException | None:
    """Return what among an error and its causes is a mistake of this program, not what an answer or a line is like."""
    for one in causes_of(error):
        # Where a part of an answer is missing or is no number, those who read it raise these.
        if isinstance(one, (OSError, BackupfsError, KeyError, ValueError, OverflowError)):
            continue
        if _module_of(one).startswith("backupfs.") or isinstance(one, RecursionError):
            return one
    return None


def _module_of(error: BaseException) -> str:
    """Return the name of the module that raised an error; empty if that is not known."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def is_see_other(error: BaseException) -> bool:
    """Tell whether urllib3 failed at a 303: it follows that unasked, and not with the headers that boto3 sends."""
    return any(isinstance(one, TypeError) and _module_of(one).startswith("urllib3.") for one in causes_of(error))


def causes_of(error: BaseException) -> list[BaseException]:
    """Return an error and all that it came from."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop()
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            # urllib3 wraps what it catches, sometimes as an argument only.
            waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    return seen
