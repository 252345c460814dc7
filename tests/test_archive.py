"""Archives of checkpoints: what is taken from them, and what is refused before anything is."""

import os
import tarfile
import tempfile
import zipfile

import pytest
import torch

from convai_fast.archive import unpacked
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel
from tests.helpers.old_checkpoints import LAYOUTS, pack, write_old_checkpoint


@pytest.fixture
def archive(tmp_path):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    (tmp_path / "old" / "model_training_args.bin").write_bytes(b"a pickle")
    pack(tmp_path / "old", tmp_path / "old.tar.gz")
    return tmp_path / "old.tar.gz"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where archives are extracted; nothing of ours is left after any test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("convai-fast-*"))  # torch may keep a cache of its own there


def write_tar(path, *members):
    """Members are (name, fields of TarInfo, content)."""
    with tarfile.open(path, "w") as tar:
        for name, fields, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))  # were its size a false one
            tar.fileobj.write(content.ljust(512 if content else 0, b"\0"))
    return path


def test_only_the_files_of_a_checkpoint_are_extracted(archive):
    with unpacked(archive) as source:
        names = sorted(os.listdir(source.path))
    assert names == [
        "config.json",
        "merges.txt",
        "pytorch_model.bin",
        "special_tokens.txt",
        "vocab.json",
    ]
    assert source.ignored == ["run/model_training_args.bin"]


@pytest.mark.parametrize("prefix", ["", "./", "a/b/"])
def test_a_checkpoint_may_lie_in_a_folder_of_the_archive(archive, prefix):
    pack(archive.parent / "old", archive, prefix)
    assert DoubleHeadsModel.from_pretrained(archive).config.vocab_size == 60
    assert len(load_tokenizer(archive)) == 60


def test_a_folder_is_used_where_it_is(tmp_path):
    (tmp_path / "events").write_text("")
    with unpacked(tmp_path) as source:
        assert source == (tmp_path, ["events", "temporary"])


def test_errors_name_the_archive_and_not_where_it_was_extracted(archive, temporary):
    (archive.parent / "old" / "pytorch_model.bin").write_bytes(b"damaged")
    pack(archive.parent / "old", archive)
    with pytest.raises(UserError, match=rf"^{archive}/pytorch_model\.bin cannot be read") as error:
        DoubleHeadsModel.from_pretrained(archive)
    assert str(temporary) not in str(error.value)


FILE = ("config.json", {}, b"{}")
SECRET = {"linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        (("/config.json", {}, b"{}"), "'/config.json' would be written outside"),
        (("../vocab.json", {}, b"{}"), "'../vocab.json' would be written outside"),
        (("a/../../vocab.json", {}, b"{}"), "would be written outside"),
        (("vocab.json", {"type": tarfile.SYMTYPE, **SECRET}, b""), "not an ordinary file but a"),
        (("vocab.json", {"type": tarfile.LNKTYPE, **SECRET}, b""), "not an ordinary file but a"),
        (("vocab.json", {"type": tarfile.FIFOTYPE}, b""), "not an ordinary file but a"),
        (("vocab.json", {"type": tarfile.CHRTYPE}, b""), "not an ordinary file but a"),
        (("vocab.json", {"type": tarfile.BLKTYPE}, b""), "not an ordinary file but a"),
        (("notes", {"type": tarfile.SYMTYPE, **SECRET}, b""), "'notes' is not an ordinary file"),
        (("./config.json", {}, b"{}"), "'./config.json' is there twice"),
        (("vocab.json", {"size": -512}, b""), "has a size below 0"),
        (("vocab.json", {"size": 2**60}, b""), "too much for a checkpoint in so small"),
        (("run/config.json", {}, b"{}"), "holds 2 files named config.json"),
    ],
)
def test_a_member_that_no_checkpoint_needs_is_refused(tmp_path, member, sentence):
    write_tar(tmp_path / "old.tar", FILE, member)
    with pytest.raises(UserError, match=sentence), unpacked(tmp_path / "old.tar"):
        pytest.fail("the archive was opened")


def test_an_archive_without_a_checkpoint_is_refused(tmp_path):
    write_tar(tmp_path / "old.tar", ("notes", {}, b""))
    with pytest.raises(UserError, match=r"holds no files named config.json"):
        load_tokenizer(tmp_path / "old.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_more_members_than_any_checkpoint_has_are_refused(tmp_path, kind):
    write_tar(tmp_path / "old.tar", *((str(i), {"type": kind}, b"") for i in range(10_001)))
    with pytest.raises(UserError, match="or more than 10,000 files"):
        load_tokenizer(tmp_path / "old.tar")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_an_archive_that_was_cut_off_is_refused(archive, kept):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"old\.tar\.gz cannot be unpacked as a tar archive"):
        DoubleHeadsModel.from_pretrained(archive)


def test_a_tar_that_ends_with_a_zip_is_no_zip(archive):
    folder = archive.parent / "old"
    torch.save({}, folder / "z.bin")  # a zip, and the last member
    with tarfile.open(archive, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    with unpacked(archive) as source:
        assert "config.json" in os.listdir(source.path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_a_gigabyte_is_refused_before_it_is_read(tmp_path, kind, monkeypatch):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 2**30
    with open(tmp_path / "old.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(header.size + 2048)  # which takes no room on the disk
    monkeypatch.setattr(tarfile.TarInfo, "_proc_gnulong", None)
    monkeypatch.setattr(tarfile.TarInfo, "_proc_pax", None)
    with pytest.raises(UserError, match="holds a name of 1,073,741,824 bytes"):
        load_tokenizer(tmp_path / "old.tar")


def test_a_name_longer_than_a_header_has_room_for_is_read(archive):
    pack(archive.parent / "old", archive, prefix="a long name/" * 20)
    with unpacked(archive) as source:
        assert "config.json" in os.listdir(source.path)


def test_nothing_is_used_that_python_3_11_0_lacks(archive, monkeypatch):
    for name in ("replace", "_get_filtered_attrs"):
        monkeypatch.delattr(tarfile.TarInfo, name, raising=False)
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with unpacked(archive) as source:
        assert "config.json" in os.listdir(source.path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "model").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(UserError, match="cannot be unpacked as a tar archive"):
        DoubleHeadsModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.bin is a file of weights: give the folder"):
        DoubleHeadsModel.from_pretrained(tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(UserError, match=r"old\.zip is a zip archive: unpack it"):
        DoubleHeadsModel.from_pretrained(tmp_path / "old.zip")


def test_a_store_of_dialogues_is_told_from_a_model(tmp_path):
    (tmp_path / "meta.json").write_text('{"format_version": 1, "sizes": {}}')
    for read in (DoubleHeadsModel.from_pretrained, load_tokenizer):
        with pytest.raises(UserError, match="is a store of dialogues, which `dataset_path` takes"):
            read(tmp_path)
