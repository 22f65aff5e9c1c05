"""Turns exceptions of botocore into a StoreError that says what it means and what to do. It holds no secrets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from visionloop.errors import StoreError


@dataclass(frozen=True)
class Meaning:
    """What an error code means. `{what}` is the operation, `{bucket}` the bucket. `transient`: a retry may help."""

    found: str
    expected: str
    todo: str
    transient: bool = False


PERMISSIONS = "Ask the owner of the bucket; infra/s3.md lists the permissions."
RETRY = "Try again in a while; what was done is kept."
KEYS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
LOG_IN = "Log in again, or unset AWS_SESSION_TOKEN."
REGION = "Set AWS_DEFAULT_REGION."

_BUSY = Meaning("is busy: it answers {code} to {what}", "an answer", RETRY, transient=True)
_DENIED = Meaning("access denied to {what}", "the permission to do it", PERMISSIONS)
_NO_BUCKET = Meaning(
    "there is no bucket {bucket}",
    "a bucket that exists",
    "{todo}",
)
_KEY_UNKNOWN = Meaning(
    "the access key is not known there",
    "credentials of this store",
    f"{KEYS} For a store that is not AWS, set AWS_ENDPOINT_URL.",
)
_EXPIRED = Meaning("the session token has expired or is wrong", "a valid one", LOG_IN)
_REGION = Meaning("bucket {bucket} is in another region{region}", "the region it is in", REGION)
_CLOCK = Meaning("the clock of this machine is off", "at most 15 minutes from the store's", "Set the clock (NTP).")
_UNABLE = Meaning(
    "the store cannot {what}", "an S3 store with conditional writes", "infra/s3.md names some that have all of it."
)
_FULL = Meaning("the store is full or over its quota", "free space", "Free some, or raise the quota.")
_DAMAGED = Meaning("bytes were damaged on their way ({what})", "the bytes that were sent", RETRY, transient=True)
BUSY_CODES = (
    *("RequestTimeout", "SlowDown", "ServiceUnavailable", "InternalError", "OperationAborted"),
    *("ConditionalRequestConflict", "409"),
)

MEANINGS = {
    **dict.fromkeys(("InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException"), _KEY_UNKNOWN),
    "SignatureDoesNotMatch": Meaning("the secret key does not fit the access key", "a pair that fits", KEYS),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "401"), _DENIED),
    **dict.fromkeys(("NoSuchBucket", "404"), _NO_BUCKET),
    "BucketAlreadyExists": Meaning("bucket {bucket} is somebody else's", "a name that is free", "{todo}"),
    **dict.fromkeys(
        (
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "TemporaryRedirect",
            "IllegalLocationConstraintException",
            "301",
            "307",
        ),
        _REGION,
    ),
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    **dict.fromkeys(("NotImplemented", "MethodNotAllowed", "501", "405"), _UNABLE),
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507"), _FULL),
    **dict.fromkeys(("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"), _DAMAGED),
    **dict.fromkeys(BUSY_CODES, _BUSY),
    "InvalidObjectState": Meaning(
        "{what}: it is in an archive storage class", "one that can be read at once", "Restore it from the archive."
    ),
}
UNKNOWN = Meaning("the store answers {code} to {what}", "success", "Run `visionloop store`: it says what is wrong.")

# Exceptions of botocore by name: importing them costs 0.1 s, and names are stable.
_UNREACHED = Meaning("cannot connect to {endpoint}", "a store that answers", "Check AWS_ENDPOINT_URL and the network.")
_BROKEN_OFF = Meaning("the connection to {endpoint} broke off ({what})", "a whole answer", RETRY, transient=True)
_NO_KEYS = Meaning(
    "no credentials found",
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
    "Set them, or AWS_PROFILE.",
)
_BAD_SETTINGS = Meaning("the AWS settings cannot be used ({detail})", "valid ones", "Check AWS_* and ~/.aws/config.")
EXCEPTIONS = {
    "NoCredentialsError": _NO_KEYS,
    "PartialCredentialsError": Meaning("half of the credentials is missing ({detail})", "both keys", KEYS),
    **dict.fromkeys(
        ("CredentialRetrievalError", "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
        Meaning("credentials cannot be had from their provider", "a valid login", "Log in again (`aws sso login`)."),
    ),
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionError"),
        Meaning(_UNREACHED.found, _UNREACHED.expected, _UNREACHED.todo, transient=True),
    ),
    "SSLError": Meaning(
        "no TLS connection to {endpoint}: its certificate is not trusted, or it speaks plain HTTP",
        "a trusted certificate",
        "Check AWS_ENDPOINT_URL (http or https); a CA of your own goes into AWS_CA_BUNDLE.",
    ),
    "ProxyConnectionError": Meaning(
        "cannot connect through the proxy", "a proxy that answers", "Check HTTPS_PROXY and NO_PROXY.", transient=True
    ),
    **dict.fromkeys(
        (
            "ReadTimeoutError",
            "ConnectionClosedError",
            "ResponseStreamingError",
            "IncompleteReadError",
            "HTTPClientError",
        ),
        _BROKEN_OFF,
    ),
    "ProfileNotFound": Meaning("the AWS profile is not there ({detail})", "one that is", "Check AWS_PROFILE."),
    "NoRegionError": Meaning("no region is set", "a region", REGION),
}


def translate_error(exc: Exception, where: str, what: str, *, bucket: str, endpoint: str, todo: str) -> StoreError:
    """Return the StoreError for an exception of botocore. `what` is the operation, as `put_object images/...`."""
    response: Mapping[str, Any] = getattr(exc, "response", None) or {}
    facts = {"what": what, "bucket": bucket, "endpoint": hide_credentials(endpoint), "region": "", "detail": ""}
    if response:
        code, status = read_code(response), read_status(response)
        facts["code"] = code
        if region := response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region"):
            facts["region"] = f" ({region})"
        busy = status >= 500 or status == 429
        meaning = MEANINGS.get(code) or MEANINGS.get(str(status)) or (_BUSY if busy else UNKNOWN)
    else:
        facts["detail"] = _first_line(exc)
        meaning = _find_by_class(exc)
    error = StoreError(where, meaning.found.format(**facts), meaning.expected, meaning.todo.format(todo=todo))
    error.transient = meaning.transient
    return error


def is_from_outside(exc: Exception) -> bool:
    """Say whether an exception comes from the network, the store or the settings. Any other is our bug."""
    return isinstance(exc, OSError | ValueError) or type(exc).__module__.startswith(("botocore.", "boto3."))


def read_status(answer: Mapping[str, Any]) -> int:
    """Return the HTTP status of an answer, good or bad."""
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def read_code(answer: Mapping[str, Any]) -> str:
    """Return the error code of an answer (where it names none: its status). Empty for a good answer."""
    if "Error" not in answer:
        return ""
    # A proxy's page, or an empty `<Code/>`: botocore says "" or None.
    return str(answer["Error"].get("Code") or read_status(answer))


def find_code(error: StoreError) -> str:
    """Return the error code of the answer that caused a translated error, "" if there was none."""
    return read_code(getattr(error.__cause__, "response", None) or {})


def hide_credentials(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.scheme}://{parts.hostname}{port}"


def _find_by_class(exc: Exception) -> Meaning:
    for kind in type(exc).__mro__:
        if meaning := EXCEPTIONS.get(kind.__name__):
            return meaning
    return _BAD_SETTINGS


def _first_line(exc: Exception) -> str:
    """Return the first line of an exception's text without URLs, which may hold credentials."""
    words = (str(exc).splitlines() or [type(exc).__name__])[0].split()
    return " ".join("(a URL)" if "://" in word or "@" in word else word for word in words)[:160]
