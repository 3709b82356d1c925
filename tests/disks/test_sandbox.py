"""What a confined process cannot do, and what it still can."""

import subprocess
import sys
import textwrap

import pytest

_TRIES = {
    "open('/etc/passwd').read(9)": "done",
    "os.listdir('/')": "done",
    "os.preadv(os.open('/etc/passwd', os.O_RDONLY), [bytearray(9)], 3)": "done",
    "__import__('decimal')": "done",
    "bytearray(64 << 20)": "done",
    "open({folder!r} + '/new', 'w')": "PermissionError",
    "open({folder!r} + '/old', 'r+')": "PermissionError",
    "os.open({folder!r} + '/old', os.O_RDONLY | os.O_TRUNC)": "PermissionError",
    "os.unlink({folder!r} + '/old')": "PermissionError",
    "os.rename({folder!r} + '/old', {folder!r} + '/new')": "PermissionError",
    "os.chmod({folder!r} + '/old', 0)": "PermissionError",
    "os.mkdir({folder!r} + '/new')": "PermissionError",
    "os.fork()": "PermissionError",
    "os.execv('/bin/true', ['true'])": "PermissionError",
    "os.kill(os.getppid(), 0)": "PermissionError",
    "__import__('socket').socket()": "PermissionError",
    "bytearray(4 << 30)": "MemoryError",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("confined"))
    with open(f"{folder}/old", "w") as file:
        file.write("old")
    script = textwrap.dedent(
        """
        import os, sys
        from backupfs.disks import sandbox
        tries = {tries!r}
        sandbox.confine([])
        for one in tries:
            try:
                eval(one)
                outcome = "done"
            except Exception as error:
                outcome = type(error).__name__
            print(outcome, flush=True)
        """
    ).format(tries=[one.format(folder=folder) for one in _TRIES])
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    with open(f"{folder}/old") as file:
        assert file.read() == "old"
    return dict(zip(_TRIES, done.stdout.split(), strict=True))


@pytest.mark.parametrize("one", _TRIES)
def test_what_a_confined_process_may(one: str, outcomes: dict[str, str]) -> None:
    assert outcomes[one] == _TRIES[one]


def test_only_what_is_kept_stays_open() -> None:
    script = (
        "import os\nfrom backupfs.disks import sandbox\n"
        "kept, other = os.open('/', os.O_RDONLY), os.open('/', os.O_RDONLY)\nsandbox.confine([kept])\n"
        "os.fstat(kept)\ntry:\n    os.fstat(other)\nexcept OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout == "9\n"
