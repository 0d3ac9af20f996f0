"""The door for files from outside: what it opens, what it refuses, and that nothing makes it wait."""

import os
import socket

import pytest

from jobs.errors import BadInputError, NotFoundError
from workers.files.foreign import copy_foreign, foreign_sha256, open_foreign, read_foreign


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    (directory / "templates").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "templates" / "a.jinja").write_text("template")
    (tmp_path / "secret").write_text("a file of the service")
    return directory


def test_a_file_of_the_directory_is_read(base, tmp_path):
    assert read_foreign(base / "config.json") == b"{}"
    assert read_foreign(base / "templates" / "a.jinja", num_parts=2) == b"template"
    (tmp_path / "link").symlink_to(base)  # the operator's own way to it
    assert read_foreign(tmp_path / "link" / "config.json") == b"{}"
    (base / "other.json").symlink_to("config.json")
    assert foreign_sha256(base / "other.json") == foreign_sha256(base / "config.json")
    (base / "more").symlink_to("templates")
    assert read_foreign(base / "more" / "a.jinja", num_parts=2) == b"template"


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "templates/../../secret"])
def test_a_link_out_of_the_directory_is_refused(base, tmp_path, target):
    (base / "chat_template.jinja").symlink_to(target)
    with pytest.raises(BadInputError, match=r"chat_template\.jinja: expected a file of this directory, found a link"):
        copy_foreign(base / "chat_template.jinja", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_is_a_link_is_refused(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("secret")
    (base / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match="found a link to"):
        read_foreign(base / "more" / "a.jinja", num_parts=2)
    with pytest.raises(BadInputError, match=r"a\.jinja: expected a file of this directory"):
        read_foreign(base / ".." / "elsewhere" / "a.jinja", num_parts=3)
    assert read_foreign(base / ".." / "elsewhere" / "a.jinja") == b"secret"  # the operator says where


def test_the_links_of_the_hub_cache_are_followed_within_their_repository(tmp_path):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    (snapshot / "folder").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("content")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "folder" / "a.jinja").symlink_to("../../../blobs/hash")
    assert read_foreign(snapshot / "config.json") == b"content"
    assert read_foreign(snapshot / "folder" / "a.jinja", num_parts=2) == b"content"
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "hash").write_text("of another repository")
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/hash")
    with pytest.raises(BadInputError, match="found a link"):
        read_foreign(snapshot / "tokenizer.json")


def test_what_is_no_regular_file_is_refused_at_once(base):
    os.mkfifo(base / "fifo.json")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(base / "socket.json"))
        for name, kind in (("fifo.json", "a FIFO"), ("socket.json", "a socket"), ("templates", "a directory")):
            with pytest.raises(BadInputError, match=f"{name}: expected a regular file, found {kind}"):
                open_foreign(base / name)
    with pytest.raises(NotFoundError, match=r"none\.json"):
        open_foreign(base / "none.json")


def test_a_file_that_is_larger_than_its_kind_is_refused_unread(base):
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        with (base / name).open("wb") as file:
            file.truncate(1 << 40)  # a hole: it takes no disk, and all memory of a reader
        with pytest.raises(BadInputError, match=f"{name}: expected a file of at most [0-9]+ bytes, found {1 << 40}"):
            read_foreign(base / name)


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "model.safetensors", "adapter_model.bin"])
def test_a_pointer_of_git_lfs_is_not_taken_for_the_file(base, tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4241003\n"
    (base / name).write_text(pointer)
    for take in (read_foreign, foreign_sha256, lambda path: copy_foreign(path, tmp_path / "copy")):
        with pytest.raises(BadInputError, match=rf"{name}: expected this file, found a pointer .* run git lfs pull"):
            take(base / name)
    (base / name).write_text(pointer + "x" * 1000)  # text about pointers is none
    assert read_foreign(base / name).endswith(b"x")


def test_a_file_that_was_written_to_meanwhile_says_so(base):
    file = open_foreign(base / "config.json")
    assert not file.changed()
    (base / "config.json").write_text("{ }")
    assert file.changed()
    file.close()


def test_a_name_is_shown_without_what_acts_on_a_terminal(base):
    with pytest.raises(NotFoundError) as error:
        open_foreign(base / "a\x1b[31m\u202eb.json")
    assert "a\\x1b[31m\\u202eb.json" in str(error.value)
