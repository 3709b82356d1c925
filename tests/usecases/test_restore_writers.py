"""The processes that write for a restore: what they raise, say and leave when they end early."""

import logging
import os
import signal
from pathlib import Path

import pytest
import trio

from backupfs.errors import BackupfsError, SourceError
from backupfs.repository import fetch
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases import restore as restore_module
from backupfs.usecases.restore import RestoreOptions, RestoreResult, restore
from backupfs.usecases.restore_range import RangeWriter, Work, Written
from tests.builders import Entry, File, back_up, build, new_repository, snapshot_of
from tests.processes import assert_that_children_end_with_their_parent


def saved(tmp_path: Path) -> tuple[Repository, Snapshot, bytes]:
    tree: dict[str, Entry] = {
        f"d{n}": {f"f{m}": File(os.urandom(3000)) for m in range(8)} | {"large": File(os.urandom(300_000))}
        for n in range(6)
    }
    source = build(tree, tmp_path / "source")
    repository = new_repository()
    return repository, back_up(repository, source), os.fsencode(source)


def run_restore(repository: Repository, snapshot: Snapshot, source: bytes, target: Path) -> RestoreResult:
    options = RestoreOptions(overwrite="if-changed")
    return trio.run(restore, repository, snapshot, source, os.fsencode(target), options, lambda event: None)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_writer_ends_the_run_with_one_message(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot, source = saved(tmp_path)
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "MOST_RANGE", 1)
        real = RangeWriter.write

        def dying(writer: RangeWriter, work: Work) -> Written:
            if len(os.listdir(target / "d0")) > 2:
                if when == "after":
                    real(writer, work)
                (target / "d0" / os.fsdecode(writer._target.temporary_name())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(writer, work)

        patch.setattr(RangeWriter, "write", dying)
        with pytest.raises(BackupfsError, match="a writing process ended before its work did"):
            run_restore(repository, snapshot, source, target)
    assert not [name for _, _, names in os.walk(target) for name in names if name.startswith(".backupfs-")]
    wanted = snapshot_of(Path(os.fsdecode(source)))
    for path, entry in snapshot_of(target).items():
        assert entry.kind == "directory" or entry == wanted[path]
    assert run_restore(repository, snapshot, source, target).errors == 0
    found = snapshot_of(target)
    assert found.pop(b"").kind == wanted.pop(b"").kind == "directory"
    assert found == wanted


@pytest.mark.parametrize("error", [SourceError("the target is gone"), ValueError("a bug")])
def test_what_a_writer_raises_is_raised_here(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, snapshot, source = saved(tmp_path)

    def failing(_writer: RangeWriter, _work: Work) -> Written:
        raise error

    monkeypatch.setattr(RangeWriter, "write", failing)
    with pytest.raises(type(error), match=str(error)) as caught:
        run_restore(repository, snapshot, source, tmp_path / "target")
    assert "in a forked process" in "".join(caught.value.__notes__)
    assert not [name for _, _, names in os.walk(tmp_path / "target") for name in names]


@pytest.mark.expected_log("WARNING backupfs.test: from a writer")
def test_what_a_writer_logs_is_logged_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository, snapshot, source = saved(tmp_path)
    monkeypatch.setattr(restore_module, "writer_count", lambda: 1)
    real = RangeWriter.write

    def logging_write(writer: RangeWriter, work: Work) -> Written:
        logging.getLogger("backupfs.test").warning("from a %s", "writer")
        return real(writer, work)

    monkeypatch.setattr(RangeWriter, "write", logging_write)
    run_restore(repository, snapshot, source, tmp_path / "target")
    assert {record.getMessage() for record in caplog.records} == {"from a writer"}


def test_writers_end_with_their_leader() -> None:
    """Kill -9 leaves no process that writes on."""
    assert_that_children_end_with_their_parent(
        """
        import time
        from backupfs.usecases.restore_range import SharedRanges
        from backupfs.usecases.restore_writers import Writers
        writers = Writers(SharedRanges(1, 1))
        writers.start(2, lambda number, line: time.sleep(60))
        print(*(member.process.pid for member in writers._members), flush=True)
        time.sleep(60)
        """,
        2,
    )
