"""Volumes encrypted with LUKS: against what cryptsetup and qemu encrypted, and headers that nobody would write."""

import hashlib
import json
import os
import random
import re
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from backupfs.codec.sectors import SectorCipher, decrypt
from backupfs.disks import luks
from backupfs.disks.filesystem import Unreadable
from backupfs.disks.layout import Layout, read_layout
from backupfs.disks.luks import open_luks, read_luks
from backupfs.disks.source import open_disk
from backupfs.snapshots.volumes import CRYPT
from backupfs.usecases.events import Event, FileSkipped, Remark
from tests.builders import File, build, new_repository, reopened, run_check
from tests.disks.test_layout import disk_of as lvm_disk_of
from tests.usecases.test_image import bytes_of, run_image
from tests.usecases.test_image_files import restored, volume_of
from tests.view.test_filesystem import Client

MIB = 1 << 20
PASSPHRASE = b"correct horse"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
ARGON = ("--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "2")
KINDS = {"luks1": (), "luks2": ("--sector-size", "512", *ARGON), "luks2 4096": ("--sector-size", "4096", *CHEAP)}


def encrypted(folder: Path, plain: bytes, kind: str = "luks2 4096") -> bytes:
    """Return a volume with some bytes in it: encrypted by qemu as LUKS1, or by cryptsetup as LUKS2."""
    (folder / "passphrase").write_bytes(PASSPHRASE)
    path = folder / "volume"
    path.write_bytes(plain)
    if kind == "luks1":
        secret = f"secret,id=s,file={folder / 'passphrase'}"
        options = ["--object", secret, "-o", "key-secret=s,iter-time=10"]
        command = ["qemu-img", "convert", "-f", "raw", "-O", "luks", *options, path, folder / "made"]
        # It measures how fast it can hash, which fails now and then beside much other work.
        if subprocess.run(command, check=False).returncode:
            subprocess.run(command, check=True)
        return (folder / "made").read_bytes()
    os.truncate(path, len(plain) + 32 * MIB)
    # Its locks lie where only root may write.
    command = ["cryptsetup", "reencrypt", "-q", "--disable-locks", "--encrypt", "--type", "luks2"]
    command += ["--reduce-device-size", "32M"]
    subprocess.run([*command, *KINDS[kind], "--key-file", folder / "passphrase", path], check=True)
    return path.read_bytes()


@pytest.fixture(scope="module", params=KINDS)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return plain bytes and the volume that holds them."""
    plain = random.Random(1).randbytes(3 * MIB)
    return plain, encrypted(tmp_path_factory.mktemp("luks"), plain, request.param)


def layout_of(path: Path, *passphrases: bytes) -> tuple[Layout, Callable[[int, int], bytes] | None]:
    layout = read_layout([open_disk(os.fsencode(path))], passphrases)
    return layout, layout.reader(len(layout.table) - 1).read if layout.volumes else None


def test_what_others_encrypted_is_read_from_any_place(volume: tuple[bytes, bytes], tmp_path: Path) -> None:
    plain, stored = volume
    path = tmp_path / "disk.raw"
    path.write_bytes(stored)
    layout, read = layout_of(path, b"not this one", PASSPHRASE)
    assert read is not None
    assert (layout.remarks, layout.volumes[0].name, layout.undivided) == ((), "disk_crypt", (1,))
    assert read(0, len(plain)) == plain
    chooser = random.Random(2)
    for _ in range(200):
        start, length = chooser.randrange(len(plain)), chooser.randrange(1, chooser.choice([5, 700, 9000]))
        assert read(start, length) == plain[start : start + length]
    assert len(read(layout.volumes[0].size - 5, 100)) == 5


@pytest.mark.parametrize(
    ("passphrases", "says"), [((), "as no passphrase was given"), ((b"wrong",), "none of the passphrases given opens")]
)
def test_without_its_passphrase_a_volume_is_named_and_stored(
    passphrases: tuple[bytes, ...], says: str, volume: tuple[bytes, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(volume[1])
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, report=events.append, luks_passphrases=passphrases).snapshot
    assert snapshot is not None
    # A passphrase that opens nothing is a fault: the run ends with exit code 3.
    [remark] = [event.text for event in events if isinstance(event, Remark)] or [
        f"disk: {event.reason}" for event in events if isinstance(event, FileSkipped)
    ]
    assert says in remark
    assert any(isinstance(event, FileSkipped) for event in events) == bool(passphrases)
    assert snapshot.statistics.files_skipped == len(passphrases)
    assert bytes_of(repository, snapshot, "/files/.unread").decode() == f"{remark}\n"
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == volume[1]
    assert len(snapshot.volumes) == 1


def test_an_image_shows_what_is_encrypted_however_it_is_read(volume: tuple[bytes, bytes], tmp_path: Path) -> None:
    plain, stored = volume
    path = tmp_path / "disk.raw"
    # At an odd place, so that a sector of 4096 bytes lies in two chunks, and with holes, which are no zeros within.
    with open(path, "wb") as file:
        file.truncate(63 * 512 + len(stored) + MIB)
        file.seek(63 * 512)
        file.write(stored)
    subprocess.run(
        ["sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path],
        input=f"label: dos\nstart=63,size={len(stored) // 512}\n".encode(), check=True,
    )  # fmt: skip
    repository = new_repository()
    snapshot = run_image(repository, path, name="secret", luks_passphrases=(PASSPHRASE,)).snapshot
    assert snapshot is not None
    repository = reopened(repository)
    [_, _, made] = snapshot.volumes
    assert (made.name, made.kind, made.data_size) == ("disk1_crypt", CRYPT, made.size)
    assert bytes_of(repository, snapshot, "/disks/disk.raw") == path.read_bytes()
    assert PASSPHRASE.decode() not in repr(snapshot)
    assert made.cipher is not None
    assert repr(made.cipher.key) not in repr(snapshot)
    whole = bytes_of(repository, snapshot, "/volumes/disk1_crypt.raw")
    assert whole[: len(plain)] == plain
    assert len(whole) == made.size
    _, read = layout_of(path, PASSPHRASE)
    assert read is not None
    assert whole == read(0, made.size)
    restored(repository, snapshot, "/volumes", tmp_path / "out")
    assert (tmp_path / "out/disk1_crypt.raw").read_bytes() == whole
    assert not run_check(repository, read_data=True).damaged

    async def look() -> None:
        client = Client(repository)
        seen = await client.walk(f"images/secret/{snapshot.time_name}/volumes/disk1_crypt.raw".encode())
        assert await client.read(seen.inode) == whole
        chooser = random.Random(3)
        for _ in range(100):
            start, length = chooser.randrange(len(whole)), chooser.randrange(1, chooser.choice([5, 700, 90_000]))
            assert await client.read(seen.inode, start, length) == whole[start : start + length]

    trio.run(look)


def test_files_on_lvm_in_an_encrypted_partition_are_shown(tmp_path: Path) -> None:
    tree = {"etc": {"shadow": File(b"root:*:\n" * 400)}, "big": File(os.urandom(3 * MIB + 5)), "tiny": File(b"t")}
    source = build(tree, tmp_path / "source")
    fs = volume_of(Path(os.fsdecode(source)), tmp_path / "fs.raw", "ext4", size=28 * MIB).read_bytes()
    (tmp_path / "lvm").mkdir()
    stored = encrypted(tmp_path, lvm_disk_of(tmp_path / "lvm", fs).read_bytes())
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(2 * MIB + len(stored))
        file.seek(MIB)
        file.write(stored)
    table = f"label: gpt\nstart=1M,size={len(stored) // 512}\n".encode()
    subprocess.run(["sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path], input=table, check=True)
    repository, events = new_repository(), list[Event]()
    snapshot = run_image(repository, path, report=events.append, luks_passphrases=(PASSPHRASE,)).snapshot
    assert snapshot is not None
    assert [event for event in events if isinstance(event, (FileSkipped, Remark))] == [
        Remark("vg0-data: no file system that is known")
    ]
    names = [volume.name for volume in snapshot.volumes]
    assert names == ["disk", "disk1", "disk1_crypt", "vg0-data", "vg0-root"]
    assert bytes_of(repository, snapshot, "/volumes/vg0-root.raw") == fs
    found = restored(repository, snapshot, "/files/vg0-root", tmp_path / "out")
    assert found.keys() >= {b"etc/shadow", b"big", b"tiny"}
    for name in ("etc/shadow", "big", "tiny"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    # The next image needs the passphrase, too; nothing is stored again.
    again = run_image(repository, path, luks_passphrases=(PASSPHRASE,))
    assert (again.data.chunks, again.snapshot is not None and again.snapshot.volumes) == (0, snapshot.volumes)


def test_the_volume_key_is_that_of_cryptsetup(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(PASSPHRASE)
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(20 * MIB)
    for options in (("--type", "luks1", "--hash", "sha512", "--key-size", "256", "--pbkdf-force-iterations", "1000"),
                    ("--type", "luks2", "--hash", "sha1", "--pbkdf", "argon2i", *ARGON[2:])):  # fmt: skip
        subprocess.run(
            ["cryptsetup", "luksFormat", "-q", *options, "--key-file", tmp_path / "passphrase", path], check=True
        )
        subprocess.run(
            ["cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", tmp_path / "key",
             "--key-file", tmp_path / "passphrase", path], check=True, capture_output=True,
        )  # fmt: skip
        data = path.read_bytes()

        def read(at: int, length: int, data: bytes = data) -> bytes:
            return data[at : at + length]

        header = read_luks(read, len(data))
        assert header is not None
        key = (tmp_path / "key").read_bytes()
        assert open_luks(read, header, [b"no", PASSPHRASE]).key == key
        assert open_luks(read, header, [], [bytes(64), b"", key]).key == key
        with pytest.raises(Unreadable, match="no passphrase was given"):
            open_luks(read, header, [], [key[::-1]])
        (tmp_path / "key").unlink()


def header_of(volume: bytes | bytearray, passphrase: bytes = PASSPHRASE) -> SectorCipher:
    def read(at: int, length: int) -> bytes:
        return bytes(volume[at : at + length])

    header = read_luks(read, len(volume))
    assert header is not None
    return open_luks(read, header, [passphrase])


def with_text(volume: bytes, change: Callable[[str], str]) -> bytearray:
    """Return a volume of LUKS2 whose first header says something else, with a right sum."""
    changed = bytearray(volume)
    text = change(volume[4096:16384].rstrip(b"\0").decode()).encode()
    changed[4096:16384] = text + bytes(16384 - 4096 - len(text))
    changed[448:512] = bytes(64)
    changed[448:480] = hashlib.sha256(changed[:16384]).digest()
    return changed


@pytest.fixture(scope="module")
def luks2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return encrypted(tmp_path_factory.mktemp("luks"), bytes(MIB))


def test_the_second_header_stands_in_for_the_first(luks2: bytes) -> None:
    wanted = header_of(luks2)
    changed = bytearray(luks2)
    changed[5000] ^= 1
    assert header_of(changed) == wanted
    changed[16384 + 5000] ^= 1
    with pytest.raises(Unreadable, match="headers of LUKS are damaged"):
        header_of(changed)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"encryption":"aes-xts-plain64","sector_size"', '"encryption":"serpent-xts-plain64","sector_size"', "serpent"),
        (
            '"encryption":"aes-xts-plain64","sector_size"',
            '"encryption":"\\u001b[2J","sector_size"',
            "with \\x1b[2J: only",
        ),
        ('"sector_size":4096', '"sector_size":513', "makes no sense"),
        ('"sector_size":4096', '"sector_size":"x"', "makes no sense"),
        ('"type":"crypt"', '"type":"crypt","integrity":{}', "integrity"),
        ('"offset":"16777216"', '"offset":"-512"', "larger than it is"),
        ('"offset":"16777216"', '"offset":"99999999999999"', "larger than it is"),
        ('"iv_tweak":"0"', '"iv_tweak":"-1"', "makes no sense"),
        ('"iterations":1000', '"iterations":999999999999', "more time"),
        ('"stripes":4000', '"stripes":400000000', "makes no sense"),
        ('"key_size":64', '"key_size":0', "makes no sense"),
        ('"type":"pbkdf2"', '"type":"scrypt"', "of no known kind"),
        ('"hash":"sha256"', '"hash":"md5"', "md5"),
        ('"config":{', '"config":{"requirements":{"mandatory":["online-reencrypt"]},', "being encrypted anew"),
        ('"segments":{"0"', '"segments":{"1":{"type":"crypt"},"0"', "being encrypted anew"),
    ],
)
def test_headers_that_are_not_read_say_why(old: str, new: str, says: str, luks2: bytes) -> None:
    changed = with_text(luks2, lambda text: text.replace(old, new))
    assert new.encode() in changed
    with pytest.raises(Unreadable, match=re.escape(says)):
        header_of(changed)


@pytest.mark.parametrize(
    ("cost", "says"),
    [
        ({"time": 4, "memory": 1 << 40, "cpus": 1}, "makes no sense"),
        ({"time": 1 << 40, "memory": 1 << 20, "cpus": 1}, "more time"),
        ({"time": 4, "memory": 1 << 14, "cpus": 1 << 20}, "makes no sense"),
        ({"time": 0, "memory": 0, "cpus": 0}, "makes no sense"),
    ],
)
def test_a_key_slot_that_costs_too_much_is_not_opened(cost: dict[str, int], says: str, luks2: bytes) -> None:
    def dearer(text: str) -> str:
        record = json.loads(text)
        kdf = record["keyslots"]["0"]["kdf"]
        record["keyslots"]["0"]["kdf"] = {"type": "argon2id", "salt": kdf["salt"], **cost}
        return json.dumps(record)

    with pytest.raises(Unreadable, match=says):
        header_of(with_text(luks2, dearer))


def test_a_key_slot_that_takes_more_memory_than_there_is_is_not_opened(
    luks2: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luks, "_memory_kib", lambda: 1000)

    def dearer(text: str) -> str:
        record = json.loads(text)
        kdf = record["keyslots"]["0"]["kdf"]
        record["keyslots"]["0"]["kdf"] = {
            "type": "argon2id",
            "salt": kdf["salt"],
            "time": 1,
            "memory": 1 << 20,
            "cpus": 1,
        }
        return json.dumps(record)

    with pytest.raises(Unreadable, match="1024 MiB of memory"):
        header_of(with_text(luks2, dearer))


def test_garbled_headers_end_with_a_reason(luks2: bytes, tmp_path: Path) -> None:
    chooser = random.Random(4)
    luks1 = encrypted(tmp_path, bytes(MIB), "luks1")
    wanted = header_of(luks2), header_of(luks1)
    started = time.monotonic()
    for number in range(30):
        if number % 2:
            changed = bytearray(luks1)
            for _ in range(chooser.randrange(1, 4)):
                at = chooser.randrange(104, 210)
                changed[at] = chooser.choice([0, 1, 127, 255, changed[at] ^ 1])
        else:

            def garbled(text: str) -> str:
                words = re.split(r'(["{}:,]+)', text)
                for _ in range(chooser.randrange(1, 4)):
                    at = chooser.randrange(len(words))
                    words[at] = chooser.choice(["0", "-1", "9" * 30, "null", "[]", "", "sha1", '":{"', "1e999"])
                return "".join(words)

            changed = with_text(luks2, garbled)
            changed[16384] ^= 1  # no second header
        try:
            found = header_of(changed)
        except Unreadable:
            continue
        assert found.key == wanted[number % 2].key
    assert time.monotonic() - started < 120


def test_a_part_of_a_sector_is_decrypted_like_the_whole() -> None:
    chooser = random.Random(5)
    data = chooser.randbytes(16384)
    for sector in (512, 4096):
        cipher = SectorCipher(chooser.randbytes(64), sector, 7)
        whole = decrypt(cipher, 0, data)
        assert len({whole[at : at + 16] for at in range(0, 16384, 16)}) == 1024
        for _ in range(50):
            start = chooser.randrange(1000) * 16
            length = chooser.randrange((16384 - start) // 16) * 16
            assert decrypt(cipher, start, data[start : start + length]) == whole[start : start + length]


def test_a_volume_of_luks1_says_where_its_slots_are(tmp_path: Path) -> None:
    stored = bytearray(encrypted(tmp_path, bytes(MIB), "luks1"))
    for place, value, says in (
        (104, 0xFFFFFFFF, "larger"),
        (208 + 40, 0xFFFFFFF, "behind its end"),
        (108, 16, "sense"),
    ):
        changed = bytearray(stored)
        struct.pack_into(">I", changed, place, value)
        with pytest.raises(Unreadable, match=says):
            header_of(changed)
