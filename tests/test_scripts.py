"""The scripts for people who have just cloned the repository."""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["scripts/prepare", "scripts/quickstart", "scripts/test", ".ci/run"]
# A stand-in for a command: `note` writes down how it was called.
STUB = "#!/bin/bash\nnote() { echo \"${0##*/} $*\" >>'%s'; }\n%s\n"
VENV_PYTHON = f"""case "$*" in
    *"-m pip"*) note "$@" ;;
    *"import backupfs"*) ;;
    *) exec '{sys.executable}' "$@" ;;
esac"""
# Asked for its path it gives its own, so that nothing but this stand-in could make a virtual environment.
SYSTEM_PYTHON = 'case "$*" in *"-m venv"*) note "$@"; exit 1 ;; *) cat >/dev/null; echo "$0" ;; esac'


class Checkout:
    """A copy of what scripts/prepare reads, with stand-ins for everything that would touch machine or network."""

    def __init__(self, path: Path) -> None:
        self.path = path / "a check out"
        self.bin = path / "bin"
        self.calls_file = path / "calls"
        (self.path / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/prepare", self.path / "scripts")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.path)
        venv = self.path / ".venv/bin"
        self.stub(venv / "python", VENV_PYTHON)
        self.stub(venv / "backupfs", "exit 1")
        (venv / "pip").write_text(f"#!{venv}/python\n")
        self.stub(self.bin / "python3", SYSTEM_PYTHON)
        self.stub(self.bin / "apt-get", 'note "$@"')
        self.stub(self.bin / "dpkg-query", 'for package in "${@:4}"; do echo "installed $package"; done')
        self.become(0)

    def stub(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB % (self.calls_file, body))
        path.chmod(0o755)

    def become(self, uid: int) -> None:
        self.stub(self.bin / "id", f"echo {uid}")

    def lack(self, package: str) -> None:
        body = f'for p in "${{@:4}}"; do [[ $p == {package} ]] || echo "installed $p"; done; exit 1'
        self.stub(self.bin / "dpkg-query", body)

    def prepare(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        command = [str(self.path / "scripts/prepare"), *arguments]
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        """Return the noted calls since last asked."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=10)


@pytest.mark.parametrize("script", ["scripts/prepare", "scripts/quickstart", "scripts/test"])
def test_help_sets_up_nothing(script: str, tmp_path: Path) -> None:
    copy = tmp_path / script
    copy.parent.mkdir()
    shutil.copy(ROOT / script, copy)
    answer = subprocess.run([copy, "--help"], capture_output=True, text=True, timeout=10, check=True)
    assert answer.stdout.startswith(f"Usage: {script}")
    assert sorted(tmp_path.rglob("*")) == [copy.parent, copy]


def test_prepare_installs_once(checkout: Checkout) -> None:
    first = checkout.prepare()
    assert (first.returncode, first.stderr) == (0, "")
    options = "--quiet --disable-pip-version-check --config-settings editable_mode=compat"
    assert checkout.calls() == [f"python -m pip install {options} -e .[images,test]"]

    second = checkout.prepare()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert checkout.calls() == []


def test_prepare_installs_again_when_the_dependencies_change(checkout: Checkout) -> None:
    checkout.prepare()
    checkout.calls()
    with (checkout.path / "setup.cfg").open("a") as settings:
        settings.write("\n# one more line\n")
    assert checkout.prepare().returncode == 0
    assert len(checkout.calls()) == 1


def test_prepare_names_who_made_what_it_cannot_bring_up_to_date(checkout: Checkout) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file another user's")
    checkout.prepare()
    os.chown(checkout.path / ".venv", 12345, 12345)
    assert (checkout.prepare().returncode, checkout.prepare().stderr) == (0, "")
    checkout.calls()
    with (checkout.path / "setup.cfg").open("a") as settings:
        settings.write("\n# one more line\n")
    answer = checkout.prepare()
    assert (answer.returncode, answer.stderr.count("\n"), checkout.calls()) == (1, 1, [])
    assert "sudo rm -rf" in answer.stderr


def test_prepare_says_that_it_waits_for_another(checkout: Checkout) -> None:
    checkout.prepare()
    folder = os.open(checkout.path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    threading.Timer(1, os.close, [folder]).start()
    done = checkout.prepare()
    assert (done.returncode, done.stdout.count("waiting")) == (0, 1), done


def test_prepare_as_root_installs_only_the_missing_package(checkout: Checkout) -> None:
    checkout.lack("acl")
    assert checkout.prepare("attr", "acl").returncode == 0
    update, install = (call for call in checkout.calls() if call.startswith("apt-get"))
    assert update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends acl")


def test_prepare_as_a_user_names_the_command_to_run(checkout: Checkout) -> None:
    checkout.become(1000)
    checkout.lack("acl")
    answer = checkout.prepare("attr", "acl")
    assert answer.returncode == 1
    assert "\n    sudo apt-get update && sudo apt-get install -y acl\n" in answer.stderr
    assert checkout.calls() == []


@pytest.mark.parametrize("code", [0, 7])
def test_the_tests_are_no_first_process_of_a_container(code: int, tmp_path: Path) -> None:
    """They would inherit the orphans that they make, and take them for children that nobody waited for."""
    for path, body in (
        ("scripts/prepare", ""),
        (".venv/bin/python", f"[[ $2 != pytest ]] || {{ echo $$; exit {code}; }}"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / path).chmod(0o755)
    shutil.copy(ROOT / "scripts/test", tmp_path / "scripts")
    script = subprocess.Popen([tmp_path / "scripts/test"], stdout=subprocess.PIPE, text=True)
    said, _ = script.communicate(timeout=10)
    assert script.returncode == code
    assert said.splitlines()[-1] != str(script.pid)


def machine_makers(checkout: Checkout, mmdebstrap: str = 'note "${@: -3}"') -> str:
    """Put stand-ins for what makes the machine into a checkout; return this release's name."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    sources = [f"deb http://mirror/ {name}" for name in (
        f"{release}-updates main", f"{release} main", f"{release} contrib", f"tools-{release} main", "other main",
    )]  # fmt: skip
    checkout.stub(checkout.bin / "dpkg", "echo amd64")
    checkout.stub(checkout.bin / "apt-get", f"printf '%s\\n' {shlex.join(sources)}")
    checkout.stub(checkout.bin / "mmdebstrap", mmdebstrap)
    checkout.stub(checkout.bin / "fakeroot", "touch boot/kernel boot/initrd root.ext4; rm -r root")
    for name in ("mkfs.fat", "mcopy", "syslinux", "sfdisk", "dd"):
        checkout.stub(checkout.bin / name, "cat >/dev/null")
    checkout.prepare()
    checkout.calls()
    return release


def test_prepare_makes_the_machine_of_this_release_once(checkout: Checkout) -> None:
    release = machine_makers(checkout)
    made = checkout.path / ".servers/debian"
    assert (checkout.prepare("--machine").returncode, sorted(os.listdir(made))) == (0, ["disk.raw", "installed"])
    wanted = [f"mmdebstrap root.tar deb http://mirror/ {release} main deb http://mirror/ {release}-updates main"]
    assert checkout.calls() == wanted
    again = checkout.prepare("--machine")
    assert (again.returncode, again.stdout, again.stderr, checkout.calls()) == (0, "", "", [])
    # Another recipe makes another machine.
    script = checkout.path / "scripts/prepare"
    script.write_text(script.read_text().replace("console=ttyS0", "console=ttyS1"))
    assert checkout.prepare("--machine").returncode == 0
    assert checkout.calls() == wanted


def test_prepare_tells_of_a_machine_that_could_not_be_made_and_tries_again(checkout: Checkout) -> None:
    machine_makers(checkout, "note failed; echo no such mirror >&2; exit 1")
    for _ in range(2):
        answer = checkout.prepare("--machine")
        assert answer.returncode == 1
        assert "no such mirror" in answer.stderr
        assert "could not be made" in answer.stderr
        assert checkout.calls() == ["mmdebstrap failed"]


def quickstart_in(checkout: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of the quick start in a checkout of its own, where everything is set up already."""
    (checkout / "scripts").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "scripts/quickstart", checkout / "scripts")
    prepare = checkout / "scripts/prepare"
    prepare.write_text("#!/bin/sh\n")
    prepare.chmod(0o755)
    binaries = checkout / ".venv/bin"
    binaries.mkdir(parents=True, exist_ok=True)
    if not (binaries / "backupfs").exists():
        (binaries / "backupfs").symlink_to(Path(sys.executable).with_name("backupfs"))
    command = [checkout / "scripts/quickstart", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)


def test_quickstart_refuses_what_it_makes_anew(tmp_path: Path) -> None:
    (tmp_path / ".quickstart/source").mkdir(parents=True)
    answer = quickstart_in(tmp_path, ".quickstart/source")
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert ".quickstart" in answer.stderr


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_quickstart_says_in_one_line_what_is_wrong_with_a_directory(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("x")
    if kind == "empty":
        place.mkdir()
    answer = quickstart_in(tmp_path / "checkout", place)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"scripts/quickstart: {place} ")
    assert answer.stderr.count("\n") == 1


def test_quickstart_names_the_user_of_an_earlier_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file another user's")
    (tmp_path / ".quickstart").mkdir()
    os.chown(tmp_path / ".quickstart", 12345, 12345)
    answer = quickstart_in(tmp_path)
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert f"sudo rm -rf {tmp_path}/.quickstart" in answer.stderr


@pytest.mark.fuse
def test_quickstart_backs_up_a_home_that_holds_the_checkout(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    (home / ".hidden").mkdir(parents=True)
    for number in range(30):
        (home / ".hidden" / str(number)).write_text("x")
    (home / "-a letter\nof two lines").write_text("kept")
    for _ in range(2):
        answer = quickstart_in(home / "check out", home)
        assert (answer.returncode, answer.stderr) == (0, "")
        source = home / "check out/.quickstart/source"
        # What is hidden comes last, and what an earlier run left there never.
        assert (source / "-a letter\nof two lines").is_file()
        assert not (source / "check out/.quickstart").exists()
        assert "/.quickstart/repository: the repository or the cache itself" in answer.stdout
        assert "\nIdentical: " in answer.stdout
