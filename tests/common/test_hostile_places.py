"""Links, other owners' files and leftovers at the guessable names beside an output: used only where they are one's own."""

import os
import threading
from pathlib import Path

import pytest

from wina_calib.common.atomic import (
    check_output,
    clear_leftovers,
    finish_staged,
    lock,
    output_folder,
    staged_files,
    write_file,
)
from wina_calib.common.own_folder import make_own, problem_of, refuse_foreign, remove
from wina_calib.errors import OutputError

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    return folder


def untouched(precious: Path) -> bool:
    return [path.name for path in precious.iterdir()] == ["letter.txt"] and (
        precious / "letter.txt"
    ).read_text() == "mine"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_at_a_working_name_is_removed_and_not_followed(
    name: str, overwrite: bool, tmp_path: Path, precious: Path
):
    (tmp_path / name).symlink_to(precious)
    with output_folder(tmp_path / "out", overwrite=overwrite) as folder:
        (folder / "a").write_text("1")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == ["out", "precious"]
    assert not (tmp_path / "out").is_symlink()
    assert untouched(precious)


@pytest.mark.parametrize("kind", ["dangling", "file", "loop", "pipe"])
def test_other_things_at_the_working_name_are_removed(kind: str, tmp_path: Path):
    place = tmp_path / ".out.partial"
    if kind == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.write_text("x")
    with output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["out"]


def test_a_finished_folder_has_the_mode_of_any_new_one(tmp_path: Path):
    (tmp_path / "any").mkdir()
    with output_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_what_is_no_lock_is_refused_and_left_alone(kind: str, tmp_path: Path, precious: Path):
    place = tmp_path / ".out.lock"
    if kind == "link":
        place.symlink_to(precious / "letter.txt")
    elif kind == "dangling":
        place.symlink_to(tmp_path / "made")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(OutputError, match=r"\.out\.lock is no lock file"), lock(tmp_path / "out"):
        pass
    assert untouched(precious)
    assert not (tmp_path / "made").exists()


def test_a_file_is_never_written_through_a_link(tmp_path: Path, precious: Path):
    target = tmp_path / "state.json"
    target.symlink_to(precious / "letter.txt")
    (tmp_path / f".state.json.{os.getpid()}-{threading.get_ident()}.partial").symlink_to(precious / "letter.txt")
    write_file(target, b"new")
    assert untouched(precious)
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["precious", "state.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "missing" / "file", b"")


def test_staged_files_are_not_taken_through_a_link(tmp_path: Path, precious: Path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".wina-staged").symlink_to(precious)
    with pytest.raises(OutputError, match="is a link"):
        finish_staged(folder)
    (folder / ".wina-staged").unlink()
    (folder / ".wina-staged").mkdir()
    (folder / ".wina-staged" / "README.md").write_text("of others")
    (folder / ".wina-staged").chmod(0o777)
    with pytest.raises(OutputError, match="may be written by others"):
        finish_staged(folder)
    (folder / ".wina-staged").chmod(0o700)
    (folder / ".wina-staged" / "README.md").unlink()
    (folder / ".wina-staged" / "config.json").symlink_to(precious / "letter.txt")
    with pytest.raises(OutputError, match="is no regular file"):
        finish_staged(folder)
    remove(folder / ".wina-staged")
    (folder / ".wina-staged.partial").symlink_to(precious)
    with staged_files(folder) as staged:
        (staged / "a").write_text("1")
    assert names(folder) == ["a"]
    assert untouched(precious)


def test_an_own_folder_is_made_and_found_again(tmp_path: Path, precious: Path):
    place = tmp_path / "state"
    make_own(place)
    assert place.stat().st_mode & 0o777 == 0o700
    (place / "phase").mkdir()
    (place / "phase" / "state.json").write_text("{}")
    make_own(place)
    for link in (place / "output", place / "phase" / "0001.safetensors"):
        link.symlink_to(precious)
        with pytest.raises(OutputError, match=rf"{link.name} is a link \(to .*precious\)"):
            refuse_foreign(place)
        link.unlink()
    place.chmod(0o777)
    with pytest.raises(OutputError, match=r"may be written by others \(mode 0777\)"):
        make_own(place)


def test_a_link_is_no_own_folder(tmp_path: Path, precious: Path):
    (tmp_path / "state").symlink_to(precious)
    with pytest.raises(OutputError, match="is a link"):
        make_own(tmp_path / "state")
    remove(tmp_path / "state")
    assert untouched(precious)


@as_root
def test_what_belongs_to_others_is_neither_used_nor_removed(tmp_path: Path):
    for name in (".out.old", ".out.partial", "state"):
        place = tmp_path / name
        place.mkdir()
        (place / "a").write_text("1")
        os.chown(place, NOBODY, NOBODY)
        assert problem_of(place) == f"belongs to another user (number {NOBODY})"
    for look in (make_own, refuse_foreign):
        with pytest.raises(OutputError, match="belongs to another user"):
            look(tmp_path / "state")
    for name in (".out.old", ".out.partial"):
        with pytest.raises(OutputError, match=rf"{name} belongs to another user"), output_folder(tmp_path / "out"):
            pass
        assert (tmp_path / name / "a").exists()
        os.chown(tmp_path / name, 0, 0)
        remove(tmp_path / name)
    assert names(tmp_path) == ["state"]
    os.chown(tmp_path / "state", 0, 0)
    os.chown(tmp_path / "state" / "a", NOBODY, NOBODY)
    with pytest.raises(OutputError, match="a belongs to another user"):
        refuse_foreign(tmp_path / "state")


def test_a_run_killed_after_its_rename_leaves_nothing_for_good(tmp_path: Path):
    """What `output_folder` leaves when it dies between giving the name and cleaning up."""
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.lock").touch()
    with pytest.raises(OutputError, match=r"out exists; what a stopped run had left beside it is removed\."):
        check_output(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == ["out"]
    assert not clear_leftovers(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out exists\. Give"):
        check_output(tmp_path / "out", overwrite=False)


def test_leftovers_of_a_run_under_way_are_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out", overwrite=True) as folder:
        with pytest.raises(OutputError, match="another process"):
            check_output(tmp_path / "out", overwrite=False)
        assert folder.is_dir()
