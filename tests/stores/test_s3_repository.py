"""The main job with a repository in a real server's bucket, by the command line."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders import Entry, File, Hardlink, Symlink, Tree, build, snapshot_of
from tests.cli.test_images import disk
from tests.fault_proxy import FaultProxy
from tests.hosts import runner, summary_of
from tests.servers import Server

__all__ = ["disk"]


def built(tree: Tree, path: Path) -> str:
    return os.fsdecode(build(tree, path))


@pytest.fixture(params=["swift", "swift_tls", "swift_old_tls", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def test_back_up_mount_restore_and_check(server: Server, tmp_path: Path) -> None:
    tree: dict[str, Entry] = {
        "a": File(os.urandom(3 << 20)),
        "d": {f"f{number}": File(os.urandom(3000)) for number in range(50)} | {"link": Hardlink("a")},
        "s": Symlink("a"),
    }
    source = built(tree, tmp_path / "source")
    run = runner(server, tmp_path, f"bucket-{server.endpoint_url.rpartition(':')[2]}")
    assert "there is no bucket" in run("snapshots", code=10).stderr
    run("init")
    assert "holds a repository" in run("init", code=1).stderr
    first = summary_of(run("--json", "backup", source))
    assert first["requests"]["put"] >= 5
    assert first["requests"]["sent"] >= first["stored_added"]
    second = summary_of(run("--json", "backup", source))
    assert (second["plain_added"], second["files_unchanged"]) == (0, first["files"])
    # Nothing is fetched that this machine has put: the config, a key slot, listings and the time.
    assert second["requests"]["put"] == 1
    assert second["requests"]["get"] + second["requests"]["list"] <= 10
    assert second["requests"]["received"] < 10_000
    assert "requests 1 put" in run("backup", source).stdout

    restored = summary_of(run("--json", "restore", f"latest:{source}", str(tmp_path / "restored"), "--verify"))
    assert (restored["errors"], restored["verified"]) == (0, restored["files"] + restored["directories"])
    assert snapshot_of(tmp_path / "restored") == snapshot_of(Path(source))
    mount = tmp_path / "mount"
    mount.mkdir()
    run("mount", str(mount))
    try:
        subprocess.run(["diff", "-r", source, f"{mount}/latest{source}"], check=True)
    finally:
        run("umount", str(mount))
    assert summary_of(run("--json", "check", "--read-data"))["damaged"] is False


def test_snapshots_are_changed_and_images_indexed_in_a_bucket(swift_tls: Server, tmp_path: Path) -> None:
    """Reading for a confined process is done by one that was forked twice, over connections of its own."""
    source = built({"d": {"a": File(os.urandom(5000)), "b": File(b"b")}}, tmp_path / "source")
    disk = tmp_path / "web.raw"
    disk.write_bytes(bytes(16 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-d", source, disk], check=True)
    run = runner(swift_tls, tmp_path, "changing")
    run("init")
    run("backup", source)
    run("put", f"latest:{source}/d/a", str(disk))
    run("rm", f"latest:{source}/d/b")
    assert run("ls", f"latest:{source}/d").stdout == "a\n"
    run("image", str(disk))
    [image] = [one for one in json.loads(run("--json", "snapshots").stdout) if one["kind"] == "image"]
    found = summary_of(run("--json", "index", "--force", image["short_id"]))
    assert (found["looked"], found["renewed"], found["files_skipped"]) == (True, [], 0)
    assert found["snapshot"]["statistics"]["files"] == 2
    assert summary_of(run("--json", "check", "--read-data"))["damaged"] is False


@pytest.mark.fuse
def test_images_are_verified_and_edited_in_a_bucket(swift_tls: Server, tmp_path: Path) -> None:
    """Scratch copies are served by forked processes, over connections of their own."""
    source = built({"hosts": File(b"127.0.0.1 localhost"), "large": File(os.urandom(3 << 20))}, tmp_path / "source")
    disk, new = tmp_path / "web.raw", tmp_path / "new"
    new.write_bytes(b"10.0.0.1 web")
    disk.write_bytes(bytes(16 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-d", source, disk], check=True)
    run = runner(swift_tls, tmp_path, "verifying")
    run("init")
    run("image", str(disk), "--name", "web")
    run("put", "web:latest:/files/web/hosts", str(new))
    assert run("dump", "web:latest:/files/web/hosts").stdout == "10.0.0.1 web"
    assert summary_of(run("--json", "verify", "web:latest"))["result"] == "passed"
    assert "2 passed  web: ext2/3/4" in run("snapshots", "--verbose").stdout


def test_what_is_kept_on_this_machine_hides_no_loss(swift: Server, tmp_path: Path) -> None:
    source = built({"d": {f"f{number}": File(os.urandom(700)) for number in range(9)}}, tmp_path / "source")
    run = runner(swift, tmp_path, "losing")
    run("init")
    run("backup", source)
    run("ls", "-R", "latest")
    client = swift.client()
    lost = [
        entry["Key"]
        for entry in client.list_objects_v2(Bucket="losing", Prefix="host/a/")["Contents"]
        if "/packs/tree/" in entry["Key"] or "/snapshots/" in entry["Key"]
    ]
    tree = next(key for key in lost if "/packs/tree/" in key)
    client.delete_object(Bucket="losing", Key=tree)
    found = run("check", code=1).stdout
    assert tree.removeprefix("host/a/") in found
    snapshot = next(key for key in lost if "/snapshots/" in key)
    client.put_object(Bucket="losing", Key=snapshot, Body=b"garbled")
    found = run("check", code=1).stdout
    assert snapshot.removeprefix("host/a/") in found


def test_packs_are_listed_once_a_day_and_their_loss_is_noticed_then(swift: Server, tmp_path: Path) -> None:
    source = built({f"f{number}": File(os.urandom(7000)) for number in range(9)}, tmp_path / "source")
    run = runner(swift, tmp_path, "daily")
    run("init")
    lists = [summary_of(run("--json", "backup", source))["requests"]["list"] for _ in range(3)]
    assert lists[0] == lists[1] + 2 == lists[2] + 2
    client = swift.client()
    for entry in client.list_objects_v2(Bucket="daily", Prefix="host/a/packs/data/")["Contents"]:
        client.delete_object(Bucket="daily", Key=entry["Key"])
    assert summary_of(run("--json", "backup", source))["plain_added"] == 0
    for path in (tmp_path / "cache").glob("*/listed-*"):
        os.utime(path, (1, 1))
    assert "missing or cut short" in run("backup", source).stderr
    restored = summary_of(run("--json", "restore", f"latest:{source}", str(tmp_path / "restored"), "--verify"))
    assert restored["errors"] == 0


@pytest.mark.parametrize("kind", ["packs/tree", "packs/data", "snapshots", "keys", "index/tree"])
def test_a_bit_that_is_flipped_on_its_way_once_does_no_harm(kind: str, swift: Server, tmp_path: Path) -> None:
    source = built(
        {f"d{n}": {f"f{number}": File(os.urandom(9000)) for number in range(9)} for n in range(3)}, tmp_path / "source"
    )
    bucket = "flipping-" + kind.replace("/", "-")
    first = runner(swift, tmp_path / "first", bucket)
    first("init")
    first("backup", source)
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        rule = proxy.rule("flip", method="GET", path=f"/{kind}/[0-9a-f]{{64}}", times=1)
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path / "second", bucket)
        run("restore", f"latest:{source}", str(tmp_path / "restored"), "--verify")
        assert rule.done == 1
        found, wanted = snapshot_of(tmp_path / "restored"), snapshot_of(Path(source))
        assert found.keys() >= {path for path in wanted if path.startswith(b"d")}
        # Nothing garbled was kept.
        run("ls", "-R", "latest")
        assert run("backup", source).stderr == ""
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("kind", "method"), [("twice", "PUT"), ("lose_answer", "PUT"), ("flip", "GET"), ("cut_download", "GET")]
)
def test_what_happens_to_one_request_of_an_init_does_not_spoil_the_repository(
    kind: str, method: str, swift: Server, tmp_path: Path
) -> None:
    source = built({"f": File(b"1")}, tmp_path / "source")
    bucket = f"init-{kind.replace('_', '-')}"
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        rule = proxy.rule(kind, method=method, path=r"/config$", times=1)
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, bucket)
        run("init")
        assert rule.done == 1
        run("backup", source)
        assert run("dump", f"latest:{source}/f").stdout == "1"
        run("snapshots")
    finally:
        proxy.close()


def test_a_pack_that_is_garbled_on_its_way_to_a_check_is_read_again(swift: Server, tmp_path: Path) -> None:
    source = built({f"f{number}": File(os.urandom(9000)) for number in range(9)}, tmp_path / "source")
    first = runner(swift, tmp_path, "checked")
    first("init")
    first("backup", source)
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, "checked")
        rule = proxy.rule("flip", method="GET", path="/packs/data/[0-9a-f]{64}", times=1)
        assert summary_of(run("--json", "check", "--read-data"))["damaged"] is False
        assert rule.done == 1
        # What is wrong each time is wrong in the store.
        rule.times = 3
        found = summary_of(run("--json", "check", "--read-data", code=1))
        assert (found["damaged"], found["noted_packs"]) == (True, 1)
    finally:
        proxy.close()
    assert "a check found damaged packs" in first("backup", source).stderr


def test_a_class_is_that_of_packs_of_data_and_of_nothing_else(seaweedfs: Server, tmp_path: Path) -> None:
    """What is read at every turn stays hot; a class that is dear to read must not slow down listings and mounts."""
    source = built({f"f{number}": File(os.urandom(1 << 20)) for number in range(9)}, tmp_path / "source")
    host, _, port = seaweedfs.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        run = runner(replace(seaweedfs, endpoint_url=proxy.endpoint_url), tmp_path, "classes")
        cold = ("--storage-class", "STANDARD_IA")
        run("init", *cold)
        run("backup", source, *cold)
        (tmp_path / "password").write_text("another")
        run("key", "add", "--new-password-file", str(tmp_path / "password"), *cold)
        run("forget", "latest", *cold)
        (Path(source) / "f0").write_bytes(b"new")
        run("backup", source, *cold)
        puts = [
            (path.partition("/host/a/")[2].rpartition("/")[0], headers.get("x-amz-storage-class"))
            for (method, path), headers in zip(proxy.seen, proxy.headers, strict=True)
            if method == "PUT" and "/host/a/" in path
        ]
    finally:
        proxy.close()
    assert {kind for kind, sent in puts if sent is not None} == {"packs/data"}
    assert all(sent == "STANDARD_IA" for kind, sent in puts if kind == "packs/data")
    others = {kind.partition("/")[0] or "config" for kind, sent in puts if sent is None}
    assert others == {"config", "keys", "packs", "index", "snapshots", "notes"}
    # And the server took it so.
    for entry in seaweedfs.client().list_objects_v2(Bucket="classes")["Contents"]:
        assert (entry["StorageClass"] == "STANDARD_IA") == ("/packs/data/" in entry["Key"]), entry


def test_a_server_without_such_a_class_says_which_option_is_wrong(swift: Server, tmp_path: Path) -> None:
    source = built({"f": File(os.urandom(9000))}, tmp_path / "source")
    run = runner(swift, tmp_path, "no-classes")
    run("init", "--storage-class", "STANDARD_IA")
    said = run("-q", "backup", source, "--storage-class", "STANDARD_IA", code=1).stderr
    assert "--storage-class" in said
    assert said.count("\n") == 1
    run("backup", source, "--storage-class", "STANDARD")


def test_a_key_slot_that_opened_before_is_fetched_at_once_and_alone(swift: Server, tmp_path: Path) -> None:
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    proxy.latency_s = 0.05
    run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, "slots")
    other = tmp_path / "password"
    other.write_text("another")

    def slots_fetched(*arguments: str, code: int = 0) -> list[str]:
        before = len(proxy.seen)
        run("snapshots", *arguments, code=code)
        return [path.rpartition("/")[2] for _, path in proxy.seen[before:] if "/host/a/keys/" in path]

    try:
        run("init")
        run("key", "add", "--new-password-file", str(other))
        (own,) = slots_fetched()
        # With another password, the others are fetched, too, and the one that opens is the known one then.
        both = slots_fetched("--password-file", str(other))
        assert both[0] == own
        assert len(both) == 2
        assert slots_fetched("--password-file", str(other)) == both[1:]
        wrong = tmp_path / "wrong"
        wrong.write_text("wrong")
        assert len(slots_fetched("--password-file", str(wrong), code=12)) == 2
        # One that is gone does no harm.
        swift.client().delete_object(Bucket="slots", Key=f"host/a/keys/{both[1]}")
        assert list(dict.fromkeys(slots_fetched())) == [both[1], own]
        assert slots_fetched() == [own]
        slots = list((tmp_path / "cache").glob("slot-*"))
        slots[0].write_bytes(bytes(32))
        assert slots_fetched()[-1] == own
    finally:
        proxy.close()


def test_no_secret_is_told_however_much_is(swift: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(swift, tmp_path, "silent")
    run("init")
    said = run("-vv", "snapshots").stderr
    assert "Signature" not in said
    assert "Authorization" not in said


@pytest.mark.fuse
def test_content_that_is_kept_on_disk_is_fetched_once(swift: Server, tmp_path: Path) -> None:
    content = os.urandom(5 << 20)
    source = built({"a": File(content), "b": File(os.urandom(5000))}, tmp_path / "source")
    run = runner(swift, tmp_path / "first", "kept")
    run("init")
    run("backup", source)
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path / "second", "kept")
    mount = tmp_path / "mount"
    mount.mkdir()

    def fetches() -> int:
        before = len(proxy.seen)
        run("mount", "--cache-data", "100M", str(mount))
        try:
            assert Path(f"{mount}/latest{source}/a").read_bytes() == content
        finally:
            run("umount", str(mount))
        return sum("/packs/data/" in path for _, path in proxy.seen[before:])

    try:
        assert fetches() > 0
        assert fetches() == 0
        kept = list((tmp_path / "second" / "cache").glob("*/blocks/*"))
        garbled = max(kept, key=lambda path: path.stat().st_size)
        garbled.write_bytes(garbled.read_bytes()[:-1] + b"!")
        assert fetches() == 1
        assert fetches() == 0
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", "AccessDenied"),
        (400, "ExpiredToken", "ExpiredToken"),
        (403, "InvalidObjectState", "archived"),
    ],
)
def test_packs_that_the_server_does_not_give_are_no_damage(
    swift: Server, tmp_path: Path, status: int, code: str, said: str
) -> None:
    source = built({f"f{number}": File(os.urandom(9000)) for number in range(9)}, tmp_path / "source")
    bucket = f"ungiven-{code.lower()}"
    first = runner(swift, tmp_path, bucket)
    first("init")
    for name in ("f1", "f2", "f3"):
        first("backup", f"{source}/{name}")
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, bucket)
        proxy.rule("status", method="GET", path="/packs/(data|tree)/[0-9a-f]{64}", status=status, code=code)
        if code == "InvalidObjectState":
            found = summary_of(run("--json", "check", "--read-data", code=3))
            assert (found["damaged"], found["unread"], found["archived"]) == (False, 6, 6)
            assert {finding["severity"] for finding in found["findings"]} == {"unread"}
            assert "unread: packs/data/: 3 objects are archived" in run("check", "--read-data", code=3).stdout
        else:
            done = run("check", "--read-data", code=1)
            assert "damage" not in done.stdout
            assert done.stderr.splitlines()[-1].startswith("backupfs: failed: ")
            assert said in done.stderr
        assert said in run("verify", "latest", "--level", "1", code=1).stderr
        proxy.rules.clear()
        assert all(not one["verifications"] for one in json.loads(run("--json", "snapshots").stdout))
    finally:
        proxy.close()


def test_a_report_has_the_requests_of_all_processes(swift: Server, disk: Path, tmp_path: Path) -> None:
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))

    def told(*arguments: str) -> tuple[int, int]:
        proxy.seen.clear()
        counts = summary_of(run("--json", *arguments))["requests"]
        return sum(counts[kind] for kind in ("put", "get", "list", "delete")), len(proxy.seen)

    try:
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, "counted")
        run("init")
        for arguments in (
            ["image", str(disk), "--name", "web"],
            ["index", "--force", "web:latest"],
            ["put", f"web:latest:/files/{disk.stem}p1/added", str(tmp_path / "content" / "hosts")],
            ["restore", "--image", "web:latest", str(tmp_path / "back")],
        ):
            counted, seen = told(*arguments)
            assert counted == seen, arguments
    finally:
        proxy.close()


@pytest.mark.fuse
@pytest.mark.parametrize("kind", ["files", "image"])
def test_what_the_server_does_not_give_of_content_is_no_failed_verification(
    kind: str, swift: Server, tmp_path: Path
) -> None:
    """Level 2 sees an error of a mount only, whoever is to blame for it."""
    source = built({f"f{number}": File(os.urandom(400_000)) for number in range(4)}, tmp_path / "source")
    disk = tmp_path / "web.raw"
    bucket = f"ungiven-content-{kind}"
    first = runner(swift, tmp_path, bucket)
    first("init")
    if kind == "image":
        disk.write_bytes(bytes(16 << 20))
        subprocess.run(["mkfs.ext4", "-q", "-d", source, disk], check=True)
        first("image", str(disk), "--name", "web")
    else:
        first("backup", source)
    name = "web:latest" if kind == "image" else "latest"
    listed = swift.client().list_objects_v2(Bucket=bucket, Prefix="host/a/packs/data/")
    host, _, port = swift.endpoint_url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    try:
        run = runner(replace(swift, endpoint_url=proxy.endpoint_url), tmp_path, bucket)
        # Level 1 gets each once.
        refusing = proxy.rule(
            "status", method="GET", path="/packs/data/[0-9a-f]{64}", skip=listed["KeyCount"], status=403,
            code="AccessDenied",
        )  # fmt: skip
        done = run("verify", name, code=1)
        assert refusing.done
        assert "nothing was recorded" in done.stderr
        assert "AccessDenied" in done.stderr
        proxy.rules.clear()
        assert all(not one["verifications"] for one in json.loads(run("--json", "snapshots").stdout))
        assert summary_of(run("--json", "verify", name))["result"] == "passed"
    finally:
        proxy.close()
