"""A store in a bucket of object storage that speaks S3: AWS, Swift, Ceph, SeaweedFS, MinIO and their like.

Servers differ in what they check and what they refuse. What one can do is found out from its answers, never asked of
the user, and nothing rests on it: each put carries the MD5 of its bytes, which every real server checks, and whoever
reads checks seals and ids. One attempt is made of everything: trying again is `RetryingStore`'s.
One client is shared by all threads of a process. A forked process goes on with the client it has, but over connections
of its own.
"""

import calendar
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from backupfs.errors import (
    DamagedObject,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreMissing,
    StoreUnavailable,
    shown,
)
from backupfs.stores import s3_answers as answers
from backupfs.stores.pace import Pace, PacedBody
from backupfs.stores.requests import RequestCounts, Requests
from backupfs.stores.s3_client import S3Options, make_client
from backupfs.stores.s3_failures import Failures, not_s3
from backupfs.stores.s3_pages import Page, Pages
from backupfs.stores.store import MAX_KEY_LENGTH, ArchiveState, ObjectInfo, Store, range_length, validate_key

# No object of a repository comes near it: what is larger would only take up memory.
_MOST_SIZE = 1 << 30
_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)")
_KEY_START = re.compile(rf"[A-Za-z0-9._/-]{{0,{MAX_KEY_LENGTH}}}")


class S3Store(Store):
    """Objects of a bucket whose keys begin with a prefix."""

    def __init__(self, bucket: str, prefix: str, options: S3Options) -> None:
        """Take the parts; no network is needed yet.

        prefix: empty, or segments of a key.
        """
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._options = options
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(max(1, options.connections))
        self._made: Any = None  # the client
        self._pid = 0  # of the process that the client's connections are of
        self._has_conditional_put = True  # until it says otherwise
        self._etag_is_md5: bool | None = None  # unknown until the first put
        self._requests = Requests()
        self._failures = Failures(bucket, self._prefix, options, self._requests, self._endpoint, self._look_at_bucket)
        self._up, self._down = Pace(options.limit_upload), Pace(options.limit_download)

    @property
    def url(self) -> str:
        """The bucket and what the keys begin with, as the user gave it."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def is_far(self) -> bool:
        """It is."""
        return True

    @property
    def requests(self) -> RequestCounts:
        """What was asked of the server, tries that failed included."""
        return self._requests.counts

    # The contract.

    def create(self) -> None:
        """Make the bucket if it is missing and the credentials allow that."""
        client = self._client()
        try:
            self._look_at_bucket()
            return
        except (StoreMissing, ObjectMissing):
            pass
        arguments: dict[str, Any] = {}
        region = client.meta.region_name
        if region not in ("us-east-1", "aws-global"):
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": region}
        what = f"make the bucket {shown(self._bucket)}"
        try:
            with self._asking(what), contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=self._bucket, **arguments)
        except StoreMissing as error:
            raise StoreError(
                f"cannot {what} at {shown(self._endpoint())}: it answers 404 to that, so it is no server of object "
                "storage: see --endpoint-url"
            ) from error

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Send an object with the MD5 of its bytes, and compare what the server has of it."""
        validate_key(key)
        if if_absent:
            # Asked first, as some servers take no condition and say nothing.
            self._require_absent(key)
        size = memoryview(data).nbytes
        digest = hashlib.md5(data, usedforsecurity=False)
        arguments = self._arguments_of(key)
        if if_absent and self._has_conditional_put:
            arguments["IfNoneMatch"] = "*"
        client = self._client()
        hint = "; a server that has no room left may say that, too"
        if self._options.encryption:
            hint += f", or it cannot do --encryption {shown(self._options.encryption)}: try without"
        new = key if "IfNoneMatch" in arguments else ""
        with (
            contextlib.closing(PacedBody(data, self._up)) as body,
            self._asking(f"store object {key}", hint=hint, new=new),
        ):
            try:
                answer = client.put_object(
                    Bucket=self._bucket, Key=self._prefix + key, Body=body,
                    ContentMD5=_base64(digest.digest()), **arguments,
                )  # fmt: skip
            except client.exceptions.ClientError as error:
                if "IfNoneMatch" not in arguments or answers.code_of(error) not in answers.NOT_ABLE:
                    raise
                self._has_conditional_put = False
                answer = None
        if answer is None:
            self.put(key, data)
            return
        self._requests.add_sent(size)
        self._compare_tag(key, data, digest.hexdigest(), str(answer.get("ETag", "")))

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a range of an object; a body that ends early is an error, as the next one may not."""
        validate_key(key)
        if start < 0 or (length is not None and length < 0):
            raise ValueError(f"a range has no negative start or length: {start}, {length}")
        if length == 0:
            range_length(key, self.size(key), start, length)
            return b""
        arguments: dict[str, Any] = {}
        if start or length is not None:
            arguments["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        client = self._client()
        about = f"cannot read object {key} in {shown(self.url)}"
        with self._asking(f"read object {key}", key):
            try:
                answer = client.get_object(Bucket=self._bucket, Key=self._prefix + key, **arguments)
            except client.exceptions.ClientError as error:
                if answers.status_of(error) != 416:
                    raise
                answer = None
            if answer is not None:
                # A server that knows no ranges gives the whole object.
                is_range = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
                with contextlib.closing(answer["Body"]):
                    if not answer.get("ETag"):
                        raise not_s3(about)
                    if is_range and length is not None:
                        body = self._received(answer, length, f"{about}: other bytes came than asked for")
                    else:
                        body = self._received(answer, _MOST_SIZE, f"{about}: the answer is garbled: it is too long")
                # A body of unknown length shows only by what is in it whether it is whole.
                announced = answer.get("ContentLength", len(body))
        if answer is None:
            # Nothing of the range is there: an error, but for what begins right at the end.
            if range_length(key, self.size(key), start, length):
                raise StoreUnavailable(f"{about}: the server says that it has no such range, and that it has")
            return b""
        self._requests.add_received(len(body))
        if len(body) != announced:
            raise StoreUnavailable(f"{about}: {len(body)} bytes came instead of {announced}")
        if not is_range:
            # The whole object, asked for or not.
            wanted = self._range_length(key, len(body), start, length)
            return body if wanted == len(body) else body[start : start + wanted]
        found = _RANGE.fullmatch(answer.get("ContentRange", ""))
        first, last = (int(found[1]), int(found[2])) if found is not None else (-1, -1)
        # A size may be unknown: then the range must be the very one that was asked for, whose end must have been said.
        size = int(found[3]) if found is not None and found[3] != "*" else start + (length or 0)
        wanted = self._range_length(key, size, start, length)
        if (first, last) != (start, start + wanted - 1) or len(body) != wanted:
            raise StoreUnavailable(f"{about}: other bytes came than asked for")
        return body

    def _received(self, answer: Mapping[str, Any], most: int, too_long: str) -> bytes:
        """Read a body, at a pace. Raises: StoreUnavailable, saying `too_long`, where it has more than `most` bytes."""
        parts = []
        size, begun = 0, self._down.stops
        if (announced := answer.get("ContentLength", 0)) > most:
            raise StoreUnavailable(too_long)
        # In one piece where that can be, which is faster.
        step = self._down.step if self._down.rate else max(self._down.step, announced)
        while part := answer["Body"].read(min(step, most + 1 - size)):
            size += len(part)
            if size > most:
                raise StoreUnavailable(too_long)
            self._down.pass_on(len(part), begun)
            parts.append(part)
        return b"".join(parts)

    def _range_length(self, key: str, size: int, start: int, length: int | None) -> int:
        """Return what `range_length` does; that an object is damaged is believed only where another answer says so."""
        try:
            return range_length(key, size, start, length)
        except DamagedObject:
            if (other := self.size(key)) == size:
                raise
        raise StoreUnavailable(
            f"cannot read object {key} in {shown(self.url)}: the server says that it has {size} bytes, and that it has "
            f"{other}"
        )

    def size(self, key: str) -> int:
        """Ask for an object's length."""
        validate_key(key)
        with self._asking(f"look at object {key}", key):
            answer = self._client().head_object(Bucket=self._bucket, Key=self._prefix + key)
            size = int(answer["ContentLength"])
            if size < 0:
                raise ValueError(size)
        if not answer.get("ETag"):
            raise not_s3(f"cannot look at object {key} in {shown(self.url)}")
        return size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield objects, a page of up to a thousand a request; times are to the second."""
        if not _KEY_START.fullmatch(prefix):
            return iter(())
        what = f"list the objects under {shown(prefix)}" if prefix else "list the objects"
        return Pages(lambda token: self._page(what, prefix, token), f"cannot {what} in {shown(self.url)}")

    def _page(self, what: str, prefix: str, token: str | None) -> Page:
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if token is not None:
            arguments["ContinuationToken"] = token
        with self._asking(what):
            page = self._client().list_objects_v2(**arguments)
            found = {info.key: info for info in map(self._entry, page.get("Contents", ()))}
            following = page.get("NextContinuationToken")
            # Every real answer says whether there is more, also where nothing is listed.
            if page.get("IsTruncated") != bool(following) or page.get("KeyCount", 0) > len(page.get("Contents", ())):
                raise StoreUnavailable(f"cannot {what} in {shown(self.url)}: the answer is no whole listing")
        return [info for info in found.values() if info.key.startswith(prefix)], following

    def _entry(self, entry: Mapping[str, Any]) -> ObjectInfo:
        moment, size = entry["LastModified"], int(entry["Size"])
        if size < 0 or not entry["Key"].startswith(self._prefix):
            raise ValueError(f"an entry of {size} bytes with the key {entry['Key']}")
        modified_ns = calendar.timegm(moment.utctimetuple()) * 10**9 + moment.microsecond * 1000
        return ObjectInfo(entry["Key"][len(self._prefix) :], size, modified_ns)

    def now(self) -> int:
        """Return the time that the server gives with its answers, to the second."""
        answer = self._look_at_bucket()
        date = answers.date_of(answer["ResponseMetadata"]["HTTPHeaders"])
        if date is None:
            raise StoreUnavailable(
                f"{shown(self.url)} does not tell the time: its answer has no Date line, or a garbled one; if that "
                f"stays so, look at what lies between, as a proxy, and at the server at {shown(self._endpoint())}"
            )
        return date * 10**9

    def delete(self, key: str) -> None:
        """Remove an object."""
        validate_key(key)
        # Some servers say so where there is none.
        with contextlib.suppress(ObjectMissing):
            with self._asking(f"delete object {key}", key):
                answer = self._client().delete_object(Bucket=self._bucket, Key=self._prefix + key)
            # What lies between may say "200" to anything.
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 204:
                self.size(key)
                raise StoreUnavailable(f"cannot delete object {key} in {shown(self.url)}: it is there after that")

    def archive_state(self, key: str) -> ArchiveState:
        """Ask for an object's class, and whether it is being thawed or was."""
        validate_key(key)
        with self._asking(f"look at object {key}", key):
            answer = self._client().head_object(Bucket=self._bucket, Key=self._prefix + key)
        storage_class = answer.get("StorageClass", "")
        restore = answer.get("Restore", "")
        is_cold = storage_class in answers.ARCHIVE_CLASSES or "ArchiveStatus" in answer
        is_thawing = 'ongoing-request="true"' in restore
        return ArchiveState(storage_class, is_cold and (is_thawing or not restore), is_thawing)

    def thaw(self, key: str, days: int, tier: str) -> None:
        """Request an object from its archive class; one that was requested already is fine."""
        validate_key(key)
        client = self._client()
        request = {"Days": days, "GlacierJobParameters": {"Tier": tier.capitalize()}}
        with self._asking(f"thaw object {key}", key):
            try:
                client.restore_object(Bucket=self._bucket, Key=self._prefix + key, RestoreRequest=request)
            except client.exceptions.ClientError as error:
                if answers.code_of(error) != "RestoreAlreadyInProgress":
                    raise

    def stop(self) -> None:
        """End transfers that go at a pace."""
        self._up.stop()
        self._down.stop()

    def close(self) -> None:
        """Close the connections of this process."""
        with self._lock:
            client, self._made = self._made, None
        if client is not None:
            client.close()

    # Parts of a put.

    def _arguments_of(self, key: str) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for start, storage_class in self._options.classes:
            if key.startswith(start):
                arguments["StorageClass"] = storage_class
        encryption = self._options.encryption
        if encryption.startswith("aws:kms:"):
            arguments |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": encryption.removeprefix("aws:kms:")}
        elif encryption:
            arguments["ServerSideEncryption"] = encryption
        return arguments

    def _require_absent(self, key: str) -> None:
        try:
            self.size(key)
        except ObjectMissing:
            return
        raise ObjectExists(f"object {key} is in {shown(self.url)} already")

    def _compare_tag(self, key: str, body: bytes | bytearray | memoryview, digest: str, tag: str) -> None:
        """Compare the server's word about what it stored with what was sent, where its word is an MD5.

        With some kinds of encryption it is not; what it means is found out once, by reading an object back.
        """
        if not tag:
            # Every server gives one to what it has stored; what lies between may say "200" to anything.
            raise StoreUnavailable(f"cannot store object {key} in {shown(self.url)}: the answer has no ETag")
        if self._etag_is_md5 is False:
            return
        if tag.removeprefix("W/").strip('"').lower() == digest:
            self._etag_is_md5 = True
            return
        if self._etag_is_md5 is None and self.get(key) == bytes(body):
            self._etag_is_md5 = False
            return
        raise StoreUnavailable(f"cannot store object {key} in {shown(self.url)}: the server has other bytes than sent")

    # The client.

    def _client(self) -> Any:
        if self._pid == os.getpid() and self._made is not None:
            return self._made
        with self._lock:
            if self._made is None:
                self._made = make_client(self._options, self._requests)
            elif self._pid != os.getpid():
                # Connections of the process that forked this one are not to be touched; closing lets go of them here.
                self._made.close()
            self._pid = os.getpid()
            return self._made

    @contextlib.contextmanager
    def _asking(self, what: str, key: str = "", hint: str = "", new: str = "") -> Iterator[None]:
        """Wait for a connection's turn; raise what a failure means. The arguments are those of `Failures.told`."""
        self._requests.begin_call()
        # boto3's pool makes more connections than it keeps, when more are wanted.
        with self._failures.told(what, key, hint, new), self._turns:
            yield

    def _look_at_bucket(self) -> Any:
        with self._asking(f"look at the bucket {shown(self._bucket)}"):
            return self._client().head_bucket(Bucket=self._bucket)

    def _endpoint(self) -> str:
        return str(self._client().meta.endpoint_url)


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()
