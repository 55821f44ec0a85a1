"""The store: written once, verified on every read, never replaced by accident."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitassay.cli.advice import worded
from bitassay.golden.errors import (
    CorruptError,
    GoldenError,
    MissingError,
    OutdatedError,
    StoreError,
)
from bitassay.golden.provenance import Confirmation
from bitassay.golden.storage import files, layout, store
from bitassay.golden.storage.store import Store, find_store

NAME = "made-up/sm_90"


@pytest.fixture
def kept(make_stream, provenance, tmp_path) -> Store:
    kept = Store(str(tmp_path / "store"))
    kept.publish(make_stream(), provenance, accept=True)
    return kept


def tree(kept: Store) -> dict[str, bytes]:
    root = Path(kept.root)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_what_is_read_is_what_was_published(kept, make_stream, provenance):
    golden = kept.read(NAME)
    assert golden.provenance == provenance
    assert np.array_equal(golden.stream.fingerprints, make_stream().fingerprints)
    assert golden.entry.directory == f"{NAME}/{golden.entry.digest}"
    assert golden.entry.bytes == sum(len(d) for p, d in tree(kept).items() if "sm_90" in p)


def test_one_flipped_bit_in_any_file_is_refused(kept):
    """Chunks, metadata and sums; at a dozen places or more in each, first byte included."""
    directory = Path(kept.root, kept.entry(NAME).directory)
    paths = [p for p in directory.rglob("*") if p.is_file()]
    assert {p.name for p in paths} >= {"c.0", "c.0.0", "c.0.0.0", "zarr.json", layout.SUMS}
    assert len(paths) == 2 * 8 + 2
    for path in paths:
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 12)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            with pytest.raises(CorruptError, match=rf"{NAME}: .*{path.name} is damaged: sha256"):
                kept.read(NAME)
        path.write_bytes(data)
    kept.read(NAME)


def test_a_flipped_byte_in_the_manifest_is_refused(kept):
    path = Path(kept.root, "manifest.jsonl")
    data = bytearray(path.read_bytes())
    for at in range(len(data)):
        damaged = data.copy()
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(GoldenError, match=r"manifest\.jsonl"):
            kept.read(NAME)


def test_a_missing_file_is_refused(kept):
    directory = Path(kept.root, kept.entry(NAME).directory)
    for path in [p for p in directory.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptError, match="is missing"):
            kept.read(NAME)
        path.write_bytes(data)
    shutil.rmtree(directory)
    with pytest.raises(CorruptError, match="SHA256SUMS is missing"):
        kept.read(NAME)


def test_another_goldens_files_under_this_name_are_refused(kept, make_stream, provenance):
    """All files fit each other here, and only the manifest tells that they are not these."""
    other = kept.publish(
        make_stream(1),
        replace(provenance, identity=replace(provenance.identity, arch="sm_89")),
        accept=True,
    )
    mine = kept.entry(NAME)
    shutil.rmtree(Path(kept.root, mine.directory))
    shutil.copytree(Path(kept.root, other.directory), Path(kept.root, mine.directory))
    with pytest.raises(CorruptError, match="SHA256SUMS is damaged"):
        kept.read(NAME)


def test_no_store_and_no_golden_are_told_apart(kept, tmp_path):
    with pytest.raises(MissingError, match="no store at .*BITASSAY_STORE"):
        Store(str(tmp_path / "absent")).read(NAME)
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="no store"):
        Store(str(tmp_path / "file")).entries()
    with pytest.raises(MissingError, match=r"no golden x/sm_90 .*it has made-up/sm_90.*record it"):
        kept.read("x/sm_90")


def test_the_command_that_is_advised_can_work(kept, tmp_path, provenance, make_stream):
    """One of a user's own model needs its options; a new one needs no --accept."""
    own = "bitassay record --model DIR --prompts FILE --max-tokens N --name x --arch sm_90"
    for target in (kept, Store(str(tmp_path / "absent"))):
        with pytest.raises(MissingError) as own_error:
            target.read("x/sm_90")
        assert worded(own_error.value).endswith(f": {own} --store {target.root}")
        with pytest.raises(MissingError) as suite_error:
            target.read("context-lm/sm_90")
        wanted = f": bitassay record context-lm/sm_90 --accept --store {target.root}"
        assert worded(suite_error.value).endswith(wanted)
    old = replace(kept.entry(NAME), schema=1)
    Path(kept.root, "manifest.jsonl").write_text(old.line + "\n")
    own = own.replace("--name x", "--name made-up")
    with pytest.raises(OutdatedError) as outdated:
        kept.read(NAME)
    assert worded(outdated.value).endswith(f": {own} --accept --store {kept.root}")


def test_what_cannot_be_written_is_known_before_the_work(kept, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for root in ("file", "file/below"):
        with pytest.raises(StoreError, match=f"{tmp_path / 'file'} is no directory: name another"):
            Store(str(tmp_path / root)).require_writable(accept=True)
    Store(str(tmp_path / "new" / "below")).require_writable(accept=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for target in (kept, Store(str(tmp_path / "new" / "below"))):
        with pytest.raises(StoreError, match="is read-only: name another"):
            target.require_writable(accept=True)


def test_a_golden_of_an_earlier_schema_is_listed_not_read_and_replaced(
    kept, make_stream, provenance
):
    other = replace(provenance, identity=replace(provenance.identity, arch="sm_89"))
    kept.publish(make_stream(7), other, accept=True)
    entries = [replace(entry, schema=1) for entry in kept.entries().values()]
    Path(kept.root, "manifest.jsonl").write_text("".join(entry.line + "\n" for entry in entries))
    assert [entry.schema for entry in kept.entries().values()] == [1, 1]
    with pytest.raises(OutdatedError, match=f"{NAME}: recorded with schema 1, this build reads"):
        kept.read(NAME)
    kept.publish(make_stream(), provenance, accept=True)
    assert np.array_equal(kept.read(NAME).stream.tokens, make_stream().tokens)
    assert kept.entry("made-up/sm_89").schema == 1  # untouched


def test_a_newer_schema_is_refused(kept, make_stream, provenance):
    entry = kept.entry(NAME)
    Path(kept.root, "manifest.jsonl").write_text(replace(entry, schema=4).line + "\n")
    with pytest.raises(GoldenError, match="schema 4, this build reads up to 3"):
        kept.read(NAME)
    before = tree(kept)
    with pytest.raises(GoldenError, match="schema 4"):
        kept.publish(make_stream(1), provenance, accept=True)
    assert tree(kept) == before


def test_nothing_is_written_without_accept_or_under_ci(kept, make_stream, provenance, monkeypatch):
    before = tree(kept)
    with pytest.raises(StoreError, match="only where that is accepted"):
        kept.publish(make_stream(1), provenance, accept=False)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(StoreError, match="CI is set"):
        kept.publish(make_stream(1), provenance, accept=True)
    with pytest.raises(StoreError, match="CI is set"):
        kept.confirm(kept.read(NAME), Confirmation("g", "d", "t", "t", "now"))
    assert tree(kept) == before


def test_equal_content_is_not_written_again(kept, make_stream, provenance):
    before = tree(kept)
    entry = kept.publish(make_stream(), replace(provenance, date="later"), accept=True)
    assert tree(kept) == before
    assert entry == kept.entry(NAME)


def test_a_new_golden_replaces_the_old_and_leaves_others_alone(kept, make_stream, provenance):
    other = replace(provenance, identity=replace(provenance.identity, arch="sm_89"))
    kept.publish(make_stream(7), other, accept=True)
    old = kept.entry(NAME)
    new = kept.publish(make_stream(1), provenance, accept=True)
    assert new.digest != old.digest
    assert np.array_equal(kept.read(NAME).stream.tokens, make_stream(1).tokens)
    assert np.array_equal(kept.read("made-up/sm_89").stream.tokens, make_stream(7).tokens)
    assert not Path(kept.root, old.directory).exists()


def test_a_damaged_golden_is_mended_by_publishing_it_again(kept, make_stream, provenance):
    chunk = Path(kept.root, kept.entry(NAME).directory, "tokens", "c.0.0")
    chunk.write_bytes(b"")
    kept.publish(make_stream(), provenance, accept=True)
    assert np.array_equal(kept.read(NAME).stream.tokens, make_stream().tokens)
    assert not list(Path(kept.root).glob(f"{files.SCRATCH}*"))


def test_a_reader_overtaken_by_a_writer_reads_the_new_golden(
    kept, make_stream, provenance, monkeypatch
):
    """The golden it is about to read is replaced, and its files are gone."""
    read_file, overtaken = files.read_file, []

    def overtake(root: str, path: str) -> bytes:
        if path.endswith("tokens/c.0.0") and not overtaken:
            overtaken.append(path)
            kept.publish(make_stream(1), provenance, accept=True)
        return read_file(root, path)

    monkeypatch.setattr(files, "read_file", overtake)
    assert np.array_equal(kept.read(NAME).stream.tokens, make_stream(1).tokens)
    assert overtaken


def test_a_confirmation_changes_the_manifest_alone(kept):
    before = tree(kept)
    machine = Confirmation("NVIDIA H100", "570", "3.6.0", "2.11.0", "2025-01-01T00:00:00Z")
    kept.confirm(kept.read(NAME), machine)
    kept.confirm(kept.read(NAME), replace(machine, date="2025-02-02T00:00:00Z"))
    kept.confirm(kept.read(NAME), replace(machine, driver="580"))
    assert [(c.driver, c.date[5:7]) for c in kept.read(NAME).provenance.confirmed] == [
        ("570", "02"),
        ("580", "01"),
    ]
    after = tree(kept)
    assert {path for path in after if after[path] != before.get(path)} == {"manifest.jsonl"}


def test_a_golden_replaced_meanwhile_is_not_confirmed(kept, make_stream, provenance):
    golden = kept.read(NAME)
    kept.publish(make_stream(1), provenance, accept=True)
    with pytest.raises(StoreError, match="replaced meanwhile"):
        kept.confirm(golden, Confirmation("g", "d", "t", "t", "now"))


def test_a_url_is_read_and_never_written(kept, make_stream, provenance):
    pytest.importorskip("fsspec")
    remote = find_store(f"file://{kept.root}")
    assert np.array_equal(remote.read(NAME).stream.tokens, make_stream().tokens)
    with pytest.raises(StoreError, match="read-only: name another directory"):
        remote.publish(make_stream(1), provenance, accept=True)
    with pytest.raises(MissingError, match="no store"):
        find_store(f"file://{kept.root}/absent").entries()


def test_which_store_is_used(tmp_path, monkeypatch):
    assert find_store("a") == Store("a", writable=True)
    monkeypatch.setenv("BITASSAY_STORE", "b")
    assert find_store("a").root == "a"
    assert find_store().root == "b"
    monkeypatch.delenv("BITASSAY_STORE")
    assert find_store() == Store(str(store.PACKAGED), writable=True)
    monkeypatch.setattr(store, "in_checkout", lambda: False)
    assert find_store() == Store(str(store.PACKAGED), writable=False)


def test_a_packaged_store_is_read_only(kept, make_stream, provenance):
    packaged = replace(kept, writable=False)
    packaged.read(NAME)
    with pytest.raises(StoreError, match="read-only: name another directory"):
        packaged.publish(make_stream(1), provenance, accept=True)


def test_a_store_without_permission_is_read_and_not_written(make_stream, provenance):
    """Root may write anywhere, so the attempt is made by a child that gave root up."""
    folder = Path(tempfile.mkdtemp(prefix="bitassay-"))  # not under tmp_path, which is root's own
    folder.chmod(0o755)
    try:
        kept = Store(str(folder / "store"))
        kept.publish(make_stream(), provenance, accept=True)
        kept.read(NAME)
        Path(kept.root).chmod(0o555)
        before = tree(kept)
        assert _as_nobody(lambda: _refused(kept, make_stream(1), provenance)) == 0
        assert tree(kept) == before
    finally:
        Path(folder, "store").chmod(0o755)
        shutil.rmtree(folder)


def _refused(kept, stream, provenance) -> bool:
    golden = kept.read(NAME)
    try:
        kept.publish(stream, provenance, accept=True)
    except StoreError as error:
        return "read-only: name another directory" in str(error) and bool(golden)
    return False


def _as_nobody(action) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # zarr has threads; the child has none
        child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            os._exit(0 if action() else 1)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_is_an_error_and_harms_nothing(kept, make_stream, provenance, monkeypatch):
    before = tree(kept)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    message = r"cannot be written \(No space left on device\): free space there, or name another"
    full_disk = pytest.raises(StoreError, match=message)
    with monkeypatch.context() as patch, full_disk:
        patch.setattr(os, "fsync", full)
        kept.publish(make_stream(1), provenance, accept=True)
    assert tree(kept) == before  # what was written of it is gone
    kept.read(NAME)
    kept.publish(make_stream(), provenance, accept=True)
    assert tree(kept) == before
