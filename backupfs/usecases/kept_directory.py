"""Store a directory of some small files that belong to no snapshot, as a verification leaves them."""

import io
import os
import stat
from collections.abc import Mapping

from backupfs.codec.sealing import Kind
from backupfs.ids import ChunkId
from backupfs.localfs.selection import Selection, SelectionRules
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.repository.writer import ChunkSaver
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW
from backupfs.usecases.archive_context import ArchiveContext
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.events import ignore
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.storing import StoringRun, WriteOptions


def store_directory(repository: Repository, files: Mapping[bytes, bytes], time_ns: int) -> ChunkId:
    """Store files by name and return their directory's tree, which some note must refer to.

    It forks, as `backup` does. Raises: StoreError, perhaps in a group.
    """
    options = WriteOptions()
    run = StoringRun(repository, options, ignore)

    def scan(scanner: Scanner, slots: Slots, _begins: bool) -> Root:
        keyring = repository.keyring
        data = ChunkSaver(Kind.DATA_PACK, repository.data_index, slots, scanner.send, options.sizes.block)
        trees = ChunkSaver(Kind.TREE_PACK, repository.tree_index, slots, scanner.send, options.sizes.block)
        context = ArchiveContext(
            keyring.chunk_id_key(tree=True), keyring.page_cut_key(), trees,
            Selection(SelectionRules(), frozenset(), frozenset()), scanner, {},
        )  # fmt: skip
        storer = FileStorer(
            keyring.chunk_id_key(tree=False), keyring.file_cut_seed(), repository.config.cut_sizes, data,
            context.save_tree, scanner.send,
        )  # fmt: skip
        builder = context.builder()
        for number, (name, content) in enumerate(sorted(files.items()), 1):
            stored, size = storer.store_stream(io.BytesIO(content).readinto)
            context.add_plain(builder, name, _row(size, number, time_ns), stored)
        root = Root(builder.finish(), b"", b"", b"", ())
        data.flush()
        trees.flush()
        return root

    return run.store({}, 1, scan).tree


def _row(size: int, number: int, time_ns: int) -> bytes:
    times = (time_ns // NANOSECONDS, time_ns % NANOSECONDS) * 2
    return STAT_ROW.pack(stat.S_IFREG | 0o600, os.getuid(), os.getgid(), 1, number, size, *times)
