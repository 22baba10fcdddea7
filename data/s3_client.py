"""The only module that knows boto3: one client per process, and one rule for what is tried again and how long.

Endpoint, region, credentials and checksum behaviour come from the standard AWS environment and files alone. boto3's own
retries are off: they know neither of a body that breaks off nor of rotated credentials, and two loops multiply.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from data.errors import DataError

CONNECT_TIMEOUT_S = 10.0  # longest wait for a connection, and for the store to take the next bytes of a put
READ_TIMEOUT_S = 30.0  # longest silence on a connection that should answer
PATIENCE_S = 180.0  # from the first failure on: without one byte or answer for so long, an operation gives up
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0  # between attempts; each twice the last, then cut by up to a half at random
WRONG_ANSWERS = 5  # attempts after which an answer that contradicts the request (not: no answer) is an error
POOL_CONNECTIONS = 64  # kept open per process; more threads than that still work, each on a fresh connection

log = logging.getLogger(__name__)
T = TypeVar("T")


class WrongAnswer(Exception):
    """The store's answer is not what was asked for; its text goes on after "the store"."""


def current_client() -> Any:
    """Returns this process's client for its present AWS environment.

    A new one is made after a fork, which connections do not survive, and where `_forget` has dropped the last.
    """
    pid = os.getpid()
    key = (pid, hash(tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    client = _clients.get(key)
    if client is None:
        client = _new_client()
        for other in list(_clients):
            if other[0] == pid:  # a parent's client stays: another of its threads may have held a lock at the fork
                _clients.pop(other, None)
        _clients[key] = client
    return client


def call(client: Any, operation: str, passing: tuple[int, ...] = (), **parameters: Any) -> Any:
    """Runs an operation of boto3. None if the store answers with one of the HTTP statuses in `passing`."""
    from botocore.exceptions import ClientError

    try:
        return getattr(client, operation)(**parameters)
    except ClientError as error:
        if _status(error) in passing:
            return None
        raise


def persist(place: str, action: Callable[[Any], T], patience_s: float | None = None) -> T:
    """Calls `action(client)` until it succeeds or it is settled that it will not.

    No answer, a broken connection or a store that is overloaded: again after a random, growing wait, for PATIENCE_S
    (and AWS_MAX_ATTEMPTS times, if set). Wrong answers: WRONG_ANSWERS times; so often are credentials looked for, too,
    as the services that give them out may be busy. Refused credentials: once more, with those that the environment and
    files hold by now, as they may have been rotated. All else is settled at once.

    Args:
        place: the address for messages.
        action: does one thing whole or not at all.
        patience_s: instead of PATIENCE_S.

    Raises:
        DataError: one line with the place, the reason and the remedy.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    attempts, wrong, started, refused = 0, 0, 0.0, False
    while True:
        client = None
        try:
            client = current_client()
            return action(client)
        except DataError:
            raise
        except Exception as error:
            kind, text = _judge(error)
            if kind == "bug":
                raise
        if kind == "unarmed" or (kind == "refused" and not refused):
            _forget(client)
        if kind == "refused" and not refused:
            refused = True
            continue
        attempts += 1
        wrong += kind in ("wrong", "unarmed")
        now = time.monotonic()
        started = started or now
        # A generator of its own: forked workers that share one would wait equally long and come back together.
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(attempts - 1, 20), LONGEST_WAIT_S) * random.Random().uniform(0.5, 1)
        what, _, remedy = text.partition("; ")
        if kind in ("refused", "fatal"):
            raise DataError(f"{place}: {text}")
        if wrong >= WRONG_ANSWERS or attempts >= _most_attempts() or now + wait_s - started > patience_s:
            raise DataError(f"{place}: {what} ({attempts} attempts in {now - started:.0f} s); {remedy}")
        if attempts == 3:  # one or two failures are everyday life
            log.warning("%s: %s; trying on for up to %.0f s", place, what, patience_s)
        time.sleep(wait_s)


def part_checksum(client: Any) -> dict[str, Any]:
    """Returns the argument by which a multipart put announces its parts' checksums; a single put needs no word.

    CRC32, or nothing if the environment says that the store does not know S3's newer checksums.
    """
    required_only = client.meta.config.request_checksum_calculation == "when_required"
    return {} if required_only else {"ChecksumAlgorithm": "CRC32"}


_DENIED = "access denied; check the credentials and their rights on this bucket"
_REMEDIES = {
    "NoSuchBucket": "no such bucket; check its name and AWS_ENDPOINT_URL",
    "NoSuchKey": "no such object; check the address",
    "404": "no such object or bucket; check the address and AWS_ENDPOINT_URL",
    "403": _DENIED,
    "InvalidAccessKeyId": "the access key is unknown to the store; check the credentials",
    "SignatureDoesNotMatch": "the store refuses the signature; check the secret key and the region",
    "RequestTimeTooSkewed": "the clocks of this machine and the store differ; set this machine's clock",
    "ExpiredToken": "the credentials have expired; renew them",
    "501": "the store lacks this operation; use one with conditional writes (If-None-Match)",
    "BadDigest": "the store received other bytes than were sent; check the network",
    "SlowDown": "the store asks to slow down; lower the load (fewer workers or ranks)",
    "503": "the store is overloaded; lower the load or check the store",
    "500": "the store has an internal error; check its log",
}
_AGAIN = {408, 429, 500, 502, 503, 504, 509, "RequestTimeout", "OperationAborted", "ConditionalRequestConflict"}
_REFUSED = {401, 403, "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
_MANGLED = {"BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}


def _judge(error: Exception) -> tuple[str, str]:
    """Returns what an exception means ("again", "wrong", "refused", "unarmed", "fatal", "bug") and "what; the remedy".

    Texts of botocore and of the store may quote addresses and headers: only error codes and class names are passed on.
    """
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    name = type(error).__name__
    if isinstance(error, aws.ClientError):
        code, status = re.sub(r"\W", "", str(error.response.get("Error", {}).get("Code", "")))[:40], _status(error)
        unknown = f"the store answered {status} {code}; check the address, the rights and the store's log"
        text = _REMEDIES.get("BadDigest" if code in _MANGLED else code) or _REMEDIES.get(str(status)) or unknown
        kinds = (("refused", _REFUSED), ("wrong", _MANGLED), ("again", _AGAIN))
        return next((kind for kind, signs in kinds if signs & {code, status}), "fatal"), text
    if isinstance(error, WrongAnswer):
        return "wrong", f"the store {error}; check what stands between it and this machine"
    if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "fatal", "the store's certificate is not trusted; name its authority's file in AWS_CA_BUNDLE"
    lost = (aws.HTTPClientError, aws.ConnectionError, aws.ResponseStreamingError, HTTPError, OSError)
    if isinstance(error, (*lost, ResponseParserError)):
        return "again", f"no whole answer ({name}); check the network, the store and AWS_ENDPOINT_URL"
    if isinstance(error, aws.BotoCoreError):
        remedy = "check the AWS environment and files (AWS_ENDPOINT_URL, AWS_REGION, credentials)"
        unarmed = isinstance(error, (aws.NoCredentialsError, aws.CredentialRetrievalError))
        return "unarmed" if unarmed else "fatal", f"the store cannot be used ({name}); {remedy}"
    return "bug", ""


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _most_attempts() -> float:
    text = os.environ.get("AWS_MAX_ATTEMPTS") or "inf"
    try:
        return float(text)
    except ValueError:
        raise DataError(f"AWS_MAX_ATTEMPTS={text}: give a number, or unset it") from None


_clients: dict[tuple[int, int], Any] = {}


def _forget(client: Any) -> None:
    """Drops the client, unless another thread has replaced it: the next one reads the credentials anew."""
    for key, held in list(_clients.items()):
        if held is client:
            _clients.pop(key, None)


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    for name in ("boto3", "botocore", "urllib3"):  # at DEBUG they write session tokens and signatures
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=POOL_CONNECTIONS,
        tcp_keepalive=True,
        retries={"mode": "standard", "total_max_attempts": 1},
        response_checksum_validation="when_required",  # S3 has none for ranges, and all reads are ranges
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError:  # its text may quote what stands in the endpoint
        raise DataError("AWS_ENDPOINT_URL is no address; write https://HOST[:PORT]") from None
