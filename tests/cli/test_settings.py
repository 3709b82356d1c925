"""What follows from the common options."""

from backupfs.cli.settings import Settings
from backupfs.stores.passing import PassingStore
from backupfs.stores.s3 import S3Store


def test_only_packs_of_data_may_be_archived() -> None:
    store = Settings("s3://bucket/prefix", storage_class="GLACIER").store()
    assert isinstance(store, PassingStore)
    assert isinstance(store.inner, S3Store)
    assert store.inner._options.classes == (("packs/data/", "GLACIER"),)
    assert store.inner._options.thawable == "packs/data/"
