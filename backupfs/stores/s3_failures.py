"""What a failure of a request to object storage means to the user, or to whoever tries again.

The store has its requests made inside `Failures.told`; nothing else decides what an error of boto3's becomes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from backupfs.errors import (
    AccessDenied,
    ObjectArchived,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    UsageError,
    shown,
)
from backupfs.stores import s3_answers as answers
from backupfs.stores.requests import Requests, TooManyRequests
from backupfs.stores.s3_client import S3Options

# What servers take of a difference between clocks.
_MOST_SKEW_S = 15 * 60


def not_s3(about: str) -> StoreUnavailable:
    """Return what an answer means that what lies between gives to anything: S3's have an ETag with what is there."""
    return StoreUnavailable(
        f"{about}: the answer is none of S3's, or was cut short: another server may answer, see --endpoint-url"
    )


class Failures:
    """What failures mean where a store is."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        options: S3Options,
        requests: Requests,
        endpoint: Callable[[], str],
        look_at_bucket: Callable[[], object],
    ) -> None:
        """Take what messages are made of.

        prefix: what keys begin with, with its slash. endpoint: tells the address of the server.
        look_at_bucket: asks for the bucket, and raises what that failed with.
        """
        self._bucket, self._prefix = bucket, prefix
        self._place = shown(f"s3://{bucket}/{prefix}".rstrip("/"))
        self._options = options
        self._requests = requests
        self._endpoint = endpoint
        self._look_at_bucket = look_at_bucket
        self._has_worked = False  # anything, ever

    @contextlib.contextmanager
    def told(self, what: str, key: str = "", hint: str = "", new: str = "") -> Iterator[None]:
        """Raise what a failure of a request made inside means.

        what: was to be done. key: of the object that must be there. new: of one that must not.
        hint: what else it may mean that the server is not able to do it now.
        """
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        about = f"cannot {what} in {self._place}"
        try:
            yield
            self._has_worked = True
        except boto.ClientError as error:
            raise self._meaning(error, about, key, hint, new) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
            raise AccessDenied(
                f"{about}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a "
                "profile of ~/.aws/credentials with --profile"
            ) from error
        except (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.UnauthorizedSSOTokenError) as error:
            raise AccessDenied(f"{about}: {answers.text_of(error)}; log in again") from error
        except TooManyRequests as error:
            raise self._elsewhere(about, error.location) from error
        except boto.SSLError as error:
            # A connection that is cut or garbled shows as an error of TLS, too, and the next may not be.
            if not answers.is_distrust(error):
                raise StoreUnavailable(f"{about}: {answers.text_of(error)}{self._doubt()}") from error
            raise StoreError(
                f"{about}: the connection is not to be trusted ({answers.text_of(error)}); for a certificate of your "
                "own give --ca-bundle FILE"
            ) from error
        except boto.ConnectionClosedError as error:
            raise StoreUnavailable(f"{about}: {answers.text_of(error)}{self._doubt()}") from error
        except boto.EndpointResolutionError as error:
            raise UsageError(f"object storage cannot be used, see --endpoint-url: {answers.text_of(error)}") from error
        except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError) as error:
            # boto3 wraps whatever happens while it sends.
            if (fault := answers.own_fault(error)) is not None:
                raise fault from None
            if answers.is_see_other(error):
                raise self._elsewhere(about, "") from error
            raise StoreUnavailable(f"{about}: {answers.text_of(error)}") from error
        except boto.BotoCoreError as error:
            raise StoreError(f"{about}: {answers.text_of(error)}") from error
        except MemoryError as error:
            raise StoreUnavailable(f"{about}: there is not enough memory for it") from error
        except (ResponseParserError, *answers.GARBLED_ANSWER) as error:
            if answers.own_fault(error) is not None:
                raise
            raise StoreUnavailable(f"{about}: the answer is garbled or cut short ({answers.text_of(error)})") from error

    def _meaning(self, error: Any, about: str, key: str, hint: str, new: str) -> StoreError:
        code, status = answers.code_of(error), answers.status_of(error)
        said = answers.said_by(error)
        if status >= 500 and 200 <= self._requests.last_status < 300 and (not code or code == str(status)):
            # boto3 makes a 500 of what it cannot read.
            return not_s3(about)
        if status == 404 and self._has_worked and answers.is_page(error):
            # Of what passes requests on, as while it begins; where nothing else ever came, the address is wrong.
            return not_s3(about)
        if (location := answers.location_of(error)) and code not in answers.NO_REGION:
            return self._elsewhere(about, location)
        if code in answers.NO_BUCKET or (status == 404 and not key):
            return StoreMissing(
                f"there is no bucket {shown(self._bucket)} at {shown(self._endpoint())}: "
                "check the name, or make it with `backupfs init`"
            )
        if code in answers.NO_OBJECT or status == 404:
            if code not in ("NoSuchKey",):
                # The answer to a look has no body: it may be the bucket that is missing.
                self._look_at_bucket()
            return ObjectMissing(f"object {key} is not in {self._place}")
        if new and (code in answers.EXISTS or status == 412):
            return ObjectExists(f"object {new} is in {self._place} already")
        if code in answers.ARCHIVED:
            storage_class = shown(str(error.response.get("Error", {}).get("StorageClass") or "an archive class"))
            thawable = self._options.thawable
            if thawable and not key.startswith(thawable):
                # What thaws must read it first.
                return ObjectArchived(
                    f"{about}: it is in {storage_class}, where it must not be: restore it with the provider's own "
                    f"tools, and let its lifecycle rules move only what begins with {self._prefix}{thawable}"
                )
            return ObjectArchived(
                f"{about}: it is in {storage_class}: `backupfs thaw SNAP:PATH` makes it readable again"
            )
        if code in answers.NOT_EXPEDITED:
            return StoreError(f"{about}: the provider cannot do that so fast now, take --tier standard ({said})")
        if code in answers.FULL or status == 507:
            return StoreFull(f"{about}: there is no room left: {said}")
        ahead_s = answers.clock_ahead_s(error)
        # The answer to a look has no body, so it does not say why.
        if code in answers.CLOCK or (status == 403 and abs(ahead_s) > _MOST_SKEW_S):
            way = (
                f"{abs(ahead_s) / 60:.0f} minutes {'ahead of' if ahead_s > 0 else 'behind'} that"
                if ahead_s
                else "not that"
            )
            return AccessDenied(
                f"{about}: the clock of this machine is {way} of the server, which refuses it: set the clock, as with "
                f"`timedatectl set-ntp true` ({said})"
            )
        if code in answers.NO_CLASS:
            return StoreError(f"{about}: the server has no such class of storage, see --storage-class ({said})")
        if code in answers.EXPIRED:
            return AccessDenied(f"{about}: the credentials have expired: get new ones ({said})")
        if code in answers.GARBLED or code in answers.LATER or status in answers.LATER_STATUS:
            return StoreUnavailable(f"{about}: {said}")
        if code in answers.NOT_ABLE or status == 501:
            see = ", see --encryption" if self._options.encryption else ""
            return StoreError(f"{about}: the server cannot do that{see} ({said})")
        if code in answers.NO_REGION:
            return StoreError(f"{about}: the server has another region, see --region ({said})")
        if status >= 500:
            return StoreUnavailable(f"{about}: {said}{hint}")
        if code == "400":
            # The answer to a look has no body. A server of TLS, too, says that to who does not speak it.
            see = "" if self._endpoint().startswith("https:") else "; does it speak https? see --endpoint-url"
            return StoreError(
                f"{about}: the server does not say why; see --region, or get new credentials ({said}){see}"
            )
        if code in answers.REFUSED or status in (401, 403):
            return AccessDenied(f"{about}: the server refuses it to these credentials: {said}")
        return StoreError(f"{about}: {said}")

    def _doubt(self) -> str:
        """What a failure may mean where the server has never yet answered."""
        return "" if self._requests.was_answered else "; does it speak https? see --endpoint-url"

    def _elsewhere(self, about: str, location: str) -> StoreError:
        to = f"to {shown(location)}" if location else "to another place"
        return StoreError(
            f"{about}: the server at {shown(self._endpoint())} sends on {to}: see --endpoint-url (https or http?) and "
            "--region"
        )
