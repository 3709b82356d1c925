"""Make a repository."""

from backupfs.chunking.cutter import CutSizes
from backupfs.codec.keys import KdfCost
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository, create_repository, require_no_repository
from backupfs.stores.store import Store


def init(
    store: Store,
    password: bytes,
    slot_name: str,
    folders: LocalFolders,
    cost: KdfCost | None = None,
    sizes: CutSizes | None = None,
) -> Repository:
    """Make a new repository in a store, which is made where it is missing.

    Raises: RepositoryExists; StoreError.
    """
    store.create()
    return create_repository(store, password, slot_name, cost or KdfCost(), sizes or CutSizes(), folders)


__all__ = ["init", "require_no_repository"]
