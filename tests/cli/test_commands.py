"""The command line as users and scripts meet it: a real process, real files, exit codes and messages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from backupfs.cli.main import cli as cli_of_main
from tests.processes import runs

PASSWORD = "correct horse"


class Cli:
    """Runs backupfs on one repository."""

    def __init__(self, folder: Path, timeout_s: float = 60) -> None:
        self.repository = folder / "repository"
        self.timeout_s = timeout_s
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BACKUPFS_")},
            "BACKUPFS_REPOSITORY": str(self.repository),
            "BACKUPFS_PASSWORD": PASSWORD,
            "BACKUPFS_CACHE_DIR": str(folder / "cache"),
            "XDG_STATE_HOME": str(folder / "state"),
            "LC_ALL": "C.UTF-8",
        }

    def __call__(self, *words: str | bytes | Path, stdin: bytes = b"", code: int = 0, **environment: str) -> str:
        """Run a command, compare its exit code, and return what it printed, errors too."""
        done = self.run(*words, stdin=stdin, **environment)
        said = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
        assert done.returncode == code, said
        assert "Traceback" not in said, said
        return said

    def run(
        self, *words: str | bytes | Path, stdin: bytes = b"", **environment: str
    ) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [sys.executable, "-m", "backupfs", *words],
            input=stdin,
            capture_output=True,
            env={**self.environment, **environment},
            timeout=self.timeout_s,
            check=False,
        )

    def json(self, *words: str | bytes | Path, code: int = 0) -> list[dict]:
        done = self.run("--json", *words)
        assert done.returncode == code, done.stderr
        values = [json.loads(line) for line in done.stdout.splitlines()]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values

    def objects(self) -> set[str]:
        return {
            str(path.relative_to(self.repository))
            for path in self.repository.rglob("*")
            if path.is_file() and ".tmp" not in path.parts
        }


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    made = Cli(tmp_path)
    made("init")
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    (folder / "one").write_bytes(b"one")
    (folder / "below" / "two").write_bytes(os.urandom(100_000))
    (folder / "link").symlink_to("one")
    # A look at files this young would have to be repeated.
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    """Let every file be older than a tick of the clock."""
    newest = max(path.lstat().st_ctime_ns for path in [folder, *folder.rglob("*")])
    while time.time_ns() < newest + 30_000_000:
        time.sleep(0.005)


def test_an_unchanged_second_backup_adds_nothing_but_a_snapshot(cli: Cli, source: Path) -> None:
    cli("backup", source)
    before = cli.objects()
    cli("backup", source)
    assert [key.split("/")[0] for key in cli.objects() - before] == ["snapshots"]


def test_the_report_counts_new_changed_and_unchanged_files(cli: Cli, source: Path) -> None:
    (first,) = [event for event in cli.json("backup", source) if event["event"] == "summary"]
    assert (first["files"], first["files_new"], first["files_skipped"]) == (3, 3, 0)
    (source / "one").write_bytes(b"another")
    (source / "three").write_bytes(b"three")
    settle(source)
    (second,) = [event for event in cli.json("backup", source) if event["event"] == "summary"]
    assert (second["files_new"], second["files_changed"], second["files_unchanged"]) == (1, 1, 2)
    assert second["parent"] == first["snapshot"]["id"]


def test_a_link_to_a_folder_is_followed_where_its_name_ends_in_a_slash(cli: Cli, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "ly"
    link.symlink_to("source")
    for end in ("/", "/.", "//"):
        *_, summary = cli.json("backup", f"{link}{end}")
        assert (summary["snapshot"]["paths"], summary["files"]) == ([str(source)], 3)
    said = cli("backup", link)
    assert f"{link} is a symbolic link, and only the link is stored: name {link}/ for what it leads to" in said
    assert cli("ls", f"latest:{link}").split() == [str(link)]
    # What is stored anyhow needs no word, nor does a link to a file.
    assert "symbolic" not in cli("backup", link, source)
    assert "symbolic" not in cli("backup", source / "link", f"{source / 'link'}/")
    # No `..` goes through a link.
    *_, summary = cli.json("backup", f"{link}/..")
    assert summary["snapshot"]["paths"] == [str(tmp_path)]


def test_one_file_system_leaves_out_what_is_mounted_below_and_says_so(cli: Cli, source: Path) -> None:
    # A mount of our own, seen by nobody else: root needs no user namespace for it, everybody else does.
    alone = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    script = 'mount -t tmpfs none "$1" && echo there > "$1/other" && shift && exec "$@"'
    # Ubuntu forbids it to ordinary users, and a root directory that is no mount itself to everybody.
    probe = subprocess.run([*alone, "sh", "-c", script, "sh", str(source / "below"), "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"nothing can be mounted here: {probe.stderr.decode()}")
    backup = [sys.executable, "-m", "backupfs", "backup", str(source)]
    for options, seen in ([], 4), (["--one-file-system"], 3):
        done = subprocess.run(
            [*alone, "sh", "-c", script, "sh", str(source / "below"), *backup, *options],
            capture_output=True,
            env=cli.environment,
            timeout=60,
            check=True,
            text=True,
        )
        assert ("another file system" in done.stdout) == bool(options), done.stdout
        listed = cli("ls", "-R", f"latest:{source}").split()
        assert len(listed) == seen, listed


def test_what_is_left_out_is_reported_with_the_reason(cli: Cli, source: Path) -> None:
    (source / "junk.tmp").write_bytes(b"")
    said = cli("backup", source, cli.repository.parent, "--exclude", "*.tmp")
    assert "the repository or the cache itself" in said
    assert "excluded by a pattern" in said
    assert "junk.tmp" not in cli("ls", "-R", "latest")


def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_kept(cli: Cli, source: Path) -> None:
    said = cli("backup", source, source.parent / "missing", code=3)
    assert "missing: it does not exist" in said
    assert "below/two" in cli("ls", "-R", "latest")


def test_no_source_at_all_makes_no_snapshot(cli: Cli, tmp_path: Path) -> None:
    said = cli("backup", tmp_path / "missing", code=1)
    assert "missing" in said
    assert cli.json("snapshots") == []


def test_standard_input_becomes_a_file(cli: Cli) -> None:
    data = os.urandom(3_000_000)
    cli("backup", "--stdin", "dumps/database.sql", stdin=data)
    done = cli.run("dump", "latest:/dumps/database.sql")
    assert done.stdout == data


def test_paths_come_from_files_by_line_and_by_nul(cli: Cli, source: Path) -> None:
    cli("backup", "--files-from", "-", stdin=f"{source}/one\n\n# no\n".encode())
    assert "/one" in cli("ls", "-R", "latest")
    cli("backup", "--files-from", "-", stdin=f"{source}/one\0{source}/below\0".encode())
    assert "/below/two" in cli("ls", "-R", "latest")


def test_what_a_dry_run_would_delete_is_not_called_deleted(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    (tmp_path / "target/old").mkdir(parents=True)
    words = ("restore", f"latest:{source}", tmp_path / "target", "--delete", "-v")
    assert f"would delete {tmp_path}/target/old\n" in cli(*words, "--dry-run")
    assert f"\ndeleted {tmp_path}/target/old\n" in "\n" + cli(*words)


def test_a_dry_run_stores_nothing(cli: Cli, source: Path) -> None:
    before = cli.objects()
    assert "nothing was stored" in cli("backup", "-n", source)
    assert cli.objects() == before


def test_snapshots_are_found_by_prefix_host_tag_and_latest(cli: Cli, source: Path) -> None:
    cli("backup", source, "--host", "alpha", "--tag", "a", "--time", "2020-01-02T03:04:05Z")
    cli("backup", source, "--host", "beta", "--tag", "b")
    alpha, beta = cli.json("snapshots")
    assert (alpha["host"], alpha["name"]) == ("alpha", "2020-01-02T03-04-05Z")
    assert [one["id"] for one in cli.json("snapshots", "--host", "beta")] == [beta["id"]]
    assert [one["id"] for one in cli.json("snapshots", "--tag", "a")] == [alpha["id"]]
    assert [one["id"] for one in cli.json("snapshots", alpha["id"][:6])] == [alpha["id"]]
    assert [one["id"] for one in cli.json("snapshots", "alpha:latest")] == [alpha["id"]]
    assert [one["id"] for one in cli.json("snapshots", "latest")] == [beta["id"]]
    assert alpha["doubtful_time"]
    assert not beta["doubtful_time"]
    assert [("clock was off" in cli("snapshots", one["id"])) for one in (alpha, beta)] == [True, False]


def test_a_forgotten_snapshot_vanishes_and_the_others_stay(cli: Cli, source: Path) -> None:
    cli("backup", source)
    cli("backup", source)
    first, second = cli.json("snapshots")
    assert "would forget" in cli("forget", "-n", first["id"])
    assert len(cli.json("snapshots")) == 2
    cli("forget", first["short_id"])
    assert [one["id"] for one in cli.json("snapshots")] == [second["id"]]
    assert "no damage" in cli("check", "--read-data")


def test_forget_understands_all_names_before_the_first_is_forgotten(cli: Cli, source: Path) -> None:
    cli("backup", source)
    cli("forget", "latest", "ffffffff", code=1)
    assert len(cli.json("snapshots")) == 1


def test_dump_gives_a_folder_as_a_tar(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    done = cli.run("dump", f"latest:{source}")
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o751)
    subprocess.run(["tar", "-C", out, "-xpf", "-"], input=done.stdout, check=True)
    assert out.stat().st_mode & 0o7777 == 0o751
    subprocess.run(["diff", "-r", "--no-dereference", source, out], check=True)


def test_a_tar_has_attributes_of_any_name(cli: Cli, tmp_path: Path) -> None:
    file, out = tmp_path / "content/f", tmp_path / "out"
    file.parent.mkdir()
    out.mkdir()
    file.write_bytes(b"f")
    attributes = {"user.a": b"keep", "user.a=b": b"eq", "user.p%3Dq": b"pc", "user.c%25": b"x", "user.=": b"="}
    for name, value in attributes.items():
        os.setxattr(file, name, value)
    cli("backup", file.parent)
    archive = cli.run("dump", f"latest:{file.parent}").stdout
    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "-xf", "-", "-C", out], input=archive, check=True)
    assert {name: os.getxattr(out / "f", name) for name in os.listxattr(out / "f")} == attributes


@pytest.mark.parametrize("options", [["--acls"], ["--acls", "--xattrs", "--xattrs-include=*"], ["--xattrs-include=*"]])
def test_a_tar_has_acls_as_tar_wants_them(cli: Cli, tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "file").touch()
    subprocess.run(["setfacl", "-m", "u:1:r,g:70000:rx,m::rwx", source / "file"], check=True)
    subprocess.run(["setfacl", "-m", "u:2:wx", "-m", "d:u:3:rwx,d:g::-", source / "folder"], check=True)
    cli("backup", source)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        ["tar", "-C", out, *options, "-xpf", "-"], input=cli.run("dump", f"latest:{source}").stdout, check=True
    )
    asked = [
        subprocess.run(["getfacl", "-n", "file", "folder"], cwd=folder, check=True, capture_output=True).stdout
        for folder in (source, out)
    ]
    assert asked[0] == asked[1]
    assert b"group:70000:r-x" in asked[0]
    assert b"default:user:3:rwx" in asked[0]


def test_restore_puts_the_content_back(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    cli("restore", f"latest:{source}", tmp_path / "out", "--verify")
    subprocess.run(["diff", "-r", "--no-dereference", source, tmp_path / "out"], check=True)


def test_key_slots_open_are_listed_and_are_removed(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other password\n")
    cli("key", "add", "--name", "ann", "--new-password-file", other)
    assert len(cli.json("key", "list")) == 2
    cli("snapshots", BACKUPFS_PASSWORD="other password")
    assert "password in use" in cli("key", "remove", "first", code=1) or len(cli.json("key", "list")) == 1
    cli("key", "change", "--new-password-file", other, code=0)
    cli("snapshots", code=12)
    cli("snapshots", BACKUPFS_PASSWORD="other password")


def test_the_last_key_slot_cannot_be_removed(cli: Cli) -> None:
    assert "last key slot" in cli("key", "remove", "first", code=1)
    cli("snapshots")


@pytest.mark.parametrize(
    ("words", "environment", "code", "says"),
    [
        (["snapshots"], {"BACKUPFS_PASSWORD": "wrong"}, 12, "password opens no key slot"),
        (["snapshots"], {"BACKUPFS_PASSWORD": "", "BACKUPFS_PASSWORD_FILE": "/nowhere"}, 1, "/nowhere"),
        (["snapshots"], {"BACKUPFS_PASSWORD": ""}, 1, "password is needed"),
        (["snapshots"], {"BACKUPFS_PASSWORD": "", "BACKUPFS_PASSWORD_COMMAND": "false"}, 1, "failed with exit code 1"),
        (["snapshots"], {"BACKUPFS_REPOSITORY": "/nowhere/at/all"}, 10, "no repository"),
        (["snapshots"], {"BACKUPFS_REPOSITORY": "/etc/passwd"}, 1, "/etc/passwd"),
        (["snapshots"], {"BACKUPFS_REPOSITORY": ""}, 1, "BACKUPFS_REPOSITORY"),
        (["snapshots"], {"BACKUPFS_REPOSITORY": "ftp://x/y"}, 1, "ftp"),
        (["-r", "", "snapshots"], {}, 1, "-r was given an empty word"),
        (["snapshots", "-r", ""], {}, 1, "-r was given an empty word"),
        (["ls", ""], {}, 1, "a snapshot needs a name"),
        (["forget", ""], {}, 1, "a snapshot needs a name"),
        (["backup", "/etc", "--host", "a:/b"], {}, 1, "a:/b"),
        (["image", "/dev/null", "--host", "a:b"], {}, 1, "a:b"),
        (["init"], {}, 1, "holds a repository"),
        (["ls", "latest"], {}, 1, "no file snapshot"),
        (["ls", "abcdef"], {}, 1, "no snapshot abcdef"),
        (["ls", "latest:etc"], {}, 1, "starts with /"),
        (["backup"], {}, 1, "give a PATH"),
        (["backup", "/etc", "--stdin", "x"], {}, 1, "not both"),
        (["backup", "/etc", "--exclude", "[a"], {}, 1, "[a"),
        (["backup", "/etc", "--exclude-larger-than", "big"], {}, 1, "no size"),
        (["backup", "/etc", "--compression", "99"], {}, 1, "no compression"),
        (["backup", "/etc", "--compression", "²"], {}, 1, "no compression"),
        (["backup", "/etc", "--compression", "1" * 5000], {}, 1, "no compression"),
        (["backup", "/etc", "--time", "yesterday"], {}, 1, "no time"),
        (["backup", "/etc", "--time", "9999-12-31T23:59:59Z"], {}, 1, "between 1970 and 2262"),
        (["backup", "/etc", "--time", "1600-01-01"], {}, 1, "between 1970 and 2262"),
        (["backup", "--stdin", "/"], {}, 1, "cannot be the name of a file"),
        (["backup", "--stdin", "x" * 256], {}, 1, "more than 255 bytes"),
        (["b\x1b[32mx"], {}, 1, "no command b\\x1b[32mx"),
        (["backup", "/etc", "--parent", "nothing"], {}, 1, "no snapshot nothing"),
        (["restore"], {}, 1, "SNAP"),
        (["bakcup"], {}, 1, "Did you mean backup"),
        (["umount", "/"], {}, 1, "no backupfs is mounted"),
    ],
)
def test_bad_input_gets_one_message_and_its_exit_code(
    cli: Cli, words: list[str], environment: dict[str, str], code: int, says: str
) -> None:
    said = cli(*words, code=code, **environment)
    assert says in said


def test_a_log_file_in_a_folder_that_is_missing_makes_no_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    said = cli("mount", tmp_path / "mnt", "--log-file", tmp_path / "x" / "y" / "log", code=1)
    assert "its folder is missing" in said
    assert not (tmp_path / "x").exists()


def test_names_cannot_drive_the_terminal(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "\x1b]0;owned\x07\n").write_bytes(b"x")
    cli("backup", folder)
    for said in (cli("ls", "-lR", "latest"), cli("backup", folder, "--force", "-v")):
        assert "\x1b" not in said
        assert "\x07" not in said
    assert "\\x1b" in cli("ls", "-R", "latest")


def test_json_names_that_are_no_text_come_as_base64_too(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(b"x")
    cli("backup", folder)
    (entry,) = cli.json("ls", b"latest:" + os.fsencode(folder))
    assert entry["path_base64"]


@pytest.mark.parametrize(
    "words",
    [
        ["backup", "/nosuch", "--tag"], ["backup", "/nosuch", "--host"], ["image", "/nosuch", "--name"],
        ["init", "--slot-name"], ["key", "add", "--name"],
    ],
)  # fmt: skip
def test_a_name_that_is_no_text_is_refused_before_anything_is_done(cli: Cli, words: list[str]) -> None:
    before = cli.objects()
    said = cli(*words, b"\xff\x1b", code=1)
    assert "\\xff\\x1b is no UTF-8" in said
    assert "Traceback" not in said
    assert cli.objects() == before


def test_help_and_version_load_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from backupfs.cli.main import run\n"
        "for words in (['--version'], ['--help'], ['backup', '--help'], ['mount', '--help'], ['key', '--help']):\n"
        "    assert run(words) == 0\n"
        "heavy = {'trio', 'boto3', 'pyfuse3', 'cryptography', 'zstandard', 'msgpack', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"backupfs \d", done.stdout)


def test_everything_but_mount_works_where_pyfuse3_cannot_be_loaded(cli: Cli, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')\n")
    path = {"PYTHONPATH": f"{broken}"}
    cli("backup", source, **path)
    cli("restore", f"latest:{source}", tmp_path / "out", **path)
    cli("check", **path)
    (tmp_path / "mnt").mkdir()
    assert "fuse" in cli("mount", tmp_path / "mnt", code=1, **path).lower()


def test_an_interrupted_backup_ends_with_130_and_the_next_goes_on(cli: Cli, source: Path) -> None:
    with open(source / "large", "wb") as file:
        for _ in range(200):
            file.write(os.urandom(1 << 20))
    running = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "backup", source], env=cli.environment, stderr=subprocess.PIPE
    )
    while not any(key.startswith("packs/data") for key in cli.objects()):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert b"Traceback" not in said
    assert cli.json("snapshots") == []
    cli("backup", source)
    assert "no damage" in cli("check", "--read-data")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("of_shell", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_ends_a_backup_even_where_a_shell_made_it_ignore_ctrl_c(
    cli: Cli, number: signal.Signals, of_shell: signal.Handlers
) -> None:
    backup = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "backup", "--stdin", "endless"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli.environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, of_shell),
    )
    assert backup.stdin is not None
    assert backup.stderr is not None
    children = Path(f"/proc/{backup.pid}/task/{backup.pid}/children")
    while not (scanners := children.read_text().split()):
        assert backup.poll() is None
        time.sleep(0.01)
    backup.stdin.write(b"some bytes")
    backup.stdin.flush()
    backup.send_signal(number)
    backup.wait(30)
    said = backup.stderr.read()
    backup.stderr.close()
    backup.stdin.close()
    assert (backup.returncode, b"interrupted" in said) == (130, True), said
    # One that was being started at that moment ends with its leader, a moment after it.
    end = time.monotonic() + 10
    while any(runs(pid) for pid in scanners):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not json.loads(cli("--json", "snapshots"))


def test_paths_are_looked_at_by_the_verbs_and_not_by_the_parser() -> None:
    """One that this user may not read is named and the rest is kept; a mount whose server died can be ended."""
    group = cli_of_main
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                assert not parameter.type.readable, f"{name} {parameter.name}"


@pytest.mark.fuse
def test_others_in_a_mount_may_read_what_modes_and_acls_permit(cli: Cli, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can look as somebody else")
    stranger = 54321
    source, mountpoint = tmp_path / "s", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    for above in (source, tmp_path):
        above.chmod(0o755)
    for name, mode, acl in (
        ("denied", 0o644, f"u:{stranger}:---"), ("granted", 0o600, f"u:{stranger}:r"), ("open", 0o644, ""),
        ("closed", 0o600, ""),
    ):  # fmt: skip
        (source / name).write_bytes(name.encode())
        (source / name).chmod(mode)
        if acl:
            subprocess.run(["setfacl", "-m", acl, source / name], check=True)
    cli("backup", source)
    cli("mount", "--allow-other", mountpoint)
    try:
        # By way of the directory they stand in, as the way from the top is closed to strangers.
        script = (
            "import os,sys; os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
            "for name in sorted(os.listdir('.')):\n"
            "  try: print(open(name).read())\n"
            "  except PermissionError: pass"
        )
        inside = f"{mountpoint}/latest{source}"
        done = subprocess.run([sys.executable, "-c", script, inside], capture_output=True, timeout=60, check=True)
        assert done.stdout.split() == [b"granted", b"open"]
    finally:
        cli("umount", mountpoint)


def test_key_slot_names_cannot_drive_the_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("other\n")
    said = cli("key", "add", "--name", "a\x1b[31m\nb", "--new-password-file", tmp_path / "new")
    assert "\x1b" not in said + cli("key", "list")


def test_a_listener_that_goes_away_does_not_end_a_backup(cli: Cli, source: Path) -> None:
    for number in range(2000):
        (source / f"left-out-{number}").touch()
    reading, writing = os.pipe()
    running = subprocess.Popen(
        [sys.executable, "-m", "backupfs", "--json", "backup", "--exclude", "left-out-*", source],
        stdout=writing,
        env=cli.environment,
    )
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    running.wait(60)
    assert len(cli.json("snapshots")) == 1


@pytest.mark.parametrize("words", [["snapshots"], ["backup", "/etc/hostname"], ["stats"]])
def test_closed_streams_are_no_fault(cli: Cli, words: list[str]) -> None:
    command = " ".join([sys.executable, "-m", "backupfs", *words])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], env=cli.environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["--stdin", "dump"], ["--files-from", "-"]])
def test_a_closed_standard_input_that_is_to_be_read_is_told_in_one_line(cli: Cli, words: list[str]) -> None:
    command = " ".join([sys.executable, "-m", "backupfs", "backup", *words])
    done = subprocess.run(["sh", "-c", f"{command} <&-"], env=cli.environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"standard input is closed" in done.stderr


def test_a_repository_that_lost_its_config_is_not_told_to_be_made(cli: Cli, source: Path) -> None:
    cli("backup", source)
    (cli.repository / "config").unlink()
    said = cli("snapshots", code=10)
    assert "rest of a repository" in said
    assert "init" not in said


@pytest.mark.fuse
def test_a_mount_that_another_namespace_has_a_copy_of_is_ended_too(cli: Cli, source: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a namespace of mounts")
    cli("backup", source)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    script = f"grep -q {mountpoint} /proc/self/mountinfo && echo holds; exec sleep 100"
    holder = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        assert "unmounted" in cli("umount", mountpoint)
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.fuse
def test_a_mountpoint_may_be_a_symbolic_link(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for place in ("link", "real"):
        cli("mount", tmp_path / "link")
        try:
            assert "latest" in os.listdir(tmp_path / "real")
        finally:
            cli("umount", tmp_path / place)
        assert os.listdir(tmp_path / "real") == []


def test_what_is_lost_or_damaged_is_told_until_it_is_forgotten(cli: Cli, source: Path) -> None:
    ids = [cli.json("backup", source)[-1]["snapshot"]["id"] for _ in range(3)]
    lost, damaged = (cli.repository / "snapshots" / one for one in (ids[2], ids[0]))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = cli("snapshots", code=1)
    assert "snapshot 3 of the host" in said
    assert "name it to use it" in cli("ls", "latest", code=1)
    said = cli("check", code=1)
    assert f"`backupfs forget {ids[2][:8]}` once that is known" in said
    assert f"`backupfs forget {ids[0][:8]}` if no copy of it can be put back" in said
    assert "there is no snapshot ffff" in cli("forget", "ffff", ids[0][:8], code=1)
    said = cli("forget", "--dry-run", ids[0][:8], ids[2][:8])
    assert said.count("would forget ") == 2
    *_, summary = cli.json("forget", ids[0][:8], ids[2][:8])
    assert (summary["forgotten"], summary["broken"], summary["kept"]) == ([], [ids[0], ids[2]], 1)
    assert "no damage found" in cli("check")
    cli("snapshots")
    assert str(source) in cli("ls", "-R", "latest")


def test_forgetting_what_stands_for_several_says_which(cli: Cli, source: Path) -> None:
    ids = [cli.json("backup", source, "--host", "alpha")[-1]["snapshot"]["id"] for _ in range(4)]
    for one in ids[:3]:
        (cli.repository / "snapshots" / one).unlink()
    told = f"snapshots 1 to 3 of the host alpha, which are gone{os.linesep}"
    assert f"would forget {ids[2][:8]}, {told}" in cli("forget", "-n", ids[2][:8])
    *_, summary = cli.json("forget", "-n", ids[2][:8])
    [lost] = summary["lost"]
    assert (lost["id"], lost["host"], lost["first"], lost["last"]) == (ids[2], "alpha", 1, 3)
    assert f"forgot {ids[2][:8]}, {told}" in cli("forget", ids[2][:8])
    assert "no damage found" in cli("check")


@pytest.mark.fuse
def test_a_mount_without_a_cache_has_its_log_elsewhere(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("backup", source)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (tmp_path / "no-folder").write_bytes(b"")
    said = cli("mount", mountpoint, BACKUPFS_CACHE_DIR=str(tmp_path / "no-folder"), TMPDIR=str(tmp_path))
    try:
        log = Path(re.search("log: (.*)", said)[1])
        assert log.parent == tmp_path
        assert os.listdir(f"{mountpoint}/latest{source}")
    finally:
        cli("umount", mountpoint)
    assert "cannot be written" in log.read_text()
