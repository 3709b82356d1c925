"""What follows from the common options."""

import pytest

from backupfs.cli.settings import Settings
from backupfs.errors import UsageError
from backupfs.stores.passing import PassingStore
from backupfs.stores.s3 import S3Store


def test_only_packs_of_data_may_be_archived() -> None:
    store = Settings("s3://bucket/prefix", storage_class="GLACIER").store()
    assert isinstance(store, PassingStore)
    assert isinstance(store.inner, S3Store)
    assert store.inner._options.classes == (("packs/data/", "GLACIER"),)
    assert store.inner._options.thawable == "packs/data/"


@pytest.mark.parametrize("text", ["1", "2", "1023", "0.5", "0.9K", "0.0001M"])
def test_a_limit_that_lets_next_to_nothing_pass_is_refused(text: str) -> None:
    for name in ("limit_upload", "limit_download"):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(UsageError, match=f"{option} {text}: at least 1K"):
            Settings("s3://bucket/prefix", **{name: text}).store()  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "bytes_a_second"), [("0", 0), ("1K", 1024), ("1024", 1024), ("0.5M", 1 << 19)])
def test_limits_are_bytes_a_second(text: str, bytes_a_second: int) -> None:
    store = Settings("s3://bucket/prefix", limit_upload=text, limit_download=text).store()
    assert isinstance(store, PassingStore)
    assert isinstance(store.inner, S3Store)
    assert (store.inner._options.limit_upload, store.inner._options.limit_download) == (bytes_a_second,) * 2
