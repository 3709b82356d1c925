"""The scanning side of what makes snapshots of files: a process that reads some, and takes work from others."""

from collections.abc import Callable

from backupfs.codec.sealing import Kind
from backupfs.localfs import mounts
from backupfs.localfs.selection import Selection
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.repository.writer import ChunkSaver
from backupfs.usecases.archive_context import ArchiveContext
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.archive_parent import ParentTrees
from backupfs.usecases.archiver import Archiver
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.storing import WriteOptions


def file_scan(
    repository: Repository,
    options: WriteOptions,
    slots: Slots,
    selection: Selection,
    ordinals: dict[int, int],
    scanner: Scanner,
    archive: Callable[[Archiver], Root] | None,
) -> Root | None:
    """Be one scanning process: archive everything or nothing, then do tasks; return `/` for everything."""
    keyring = repository.keyring
    data = ChunkSaver(Kind.DATA_PACK, repository.data_index, slots, scanner.send, options.sizes.block)
    trees = ChunkSaver(Kind.TREE_PACK, repository.tree_index, slots, scanner.send, options.sizes.block)
    trees.distrusts = scanner.distrusts
    context = ArchiveContext(
        keyring.chunk_id_key(tree=True), keyring.page_cut_key(), trees, selection, scanner, ordinals
    )  # fmt: skip
    files = FileStorer(
        keyring.chunk_id_key(tree=False),
        keyring.file_cut_seed(),
        repository.config.cut_sizes,
        data,
        context.save_tree,
        scanner.send,
        mounts.unsized_devices(),
    )
    archiver = Archiver(context, files, ParentTrees(repository.trees.load, scanner.send, scanner.distrust))
    scanner.serve(archiver.archive_task)
    root = archive(archiver) if archive is not None else None
    if root is None:
        scanner.work_to_the_end()
    data.flush()
    trees.flush()
    context.tell_counts(at_once=True)
    return root
