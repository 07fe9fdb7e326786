"""Files that a crash at any moment leaves old or new; folders that one process at a time writes to."""

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress

import pytest

pytest.importorskip("accelerate", reason="comes with the extra `train`")

import forks

from smoothie_kernels.diffusion import checkpoint, sample_file
from smoothie_kernels.diffusion.files import in_turn, locked, named, replaced
from smoothie_kernels.diffusion.metrics import Table


def taken(folder):
    """A lock as another process would have it; True where it cannot be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_one_process_at_a_time(tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"output must be written by one process at a time, got '.*' in use"):
        locked(tmp_path).__enter__()
    os.close(other)
    with locked(tmp_path):
        assert taken(tmp_path)
        with locked(tmp_path):  # the same process may ask twice
            pass
        assert taken(tmp_path)
    assert not taken(tmp_path)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    wait, go = os.pipe()
    begun, begin = os.pipe()
    with locked(tmp_path):
        worker = forks.start(lambda: os.write(begin, b".") and os.read(wait, 1) and 0)
        os.read(begun, 1)
    free = not taken(tmp_path)
    os.write(go, b".")
    assert forks.end(worker) == 0
    assert free


def test_a_folder_that_was_made_and_stays_empty_goes(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with locked(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
    assert (tmp_path / "c" / "file").exists()
    with pytest.raises(ValueError, match=r"output must be a folder, got the file '.*file'"):
        locked(tmp_path / "c" / "file").__enter__()


def test_a_folder_that_its_owner_removes_is_made_again(tmp_path, monkeypatch):
    """Between opening and locking it."""
    folder, flock = tmp_path / "x", fcntl.flock
    folder.mkdir()

    def late(*arguments):
        monkeypatch.undo()
        folder.rmdir()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(folder):
        assert taken(folder)


def test_file_systems_without_locks_are_told_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert "cannot be locked (Function not implemented)" in caplog.text


def test_processes_write_in_turn(tmp_path):
    """Lines that are written in two halves, each flushed, stay whole."""

    def write():
        for _ in range(50):
            with in_turn(tmp_path / "x", "ab") as file:
                for half in (b"12", b"34\n"):
                    file.write(half)
                    file.flush()
                    time.sleep(0)

    assert [forks.end(process) for process in [forks.start(write) for _ in range(3)]] == [0, 0, 0]
    assert (tmp_path / "x").read_bytes() == b"1234\n" * 150


def test_errors_name_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*x'"), named(tmp_path / "x"):
        raise OSError(28, "No space left on device")


def test_a_replaced_file_is_old_or_new(tmp_path):
    path = tmp_path / "x.txt"

    def write():
        with replaced(path) as file:
            file.write("new")

    path.write_text("old")
    for _ in forks.deaths(write):
        assert path.read_text() in ("old", "new")
        path.write_text("old")
    assert path.read_text() == "new"
    with pytest.raises(KeyError), replaced(path) as file:
        file.write({}["half"])
    assert path.read_text() == "new"


def test_a_checkpoint_is_there_or_not(tmp_path):
    def save(step):
        def write(folder):
            (folder / "model").write_text(str(step))

        checkpoint.save(tmp_path, step, write, {"step": step}, {"a": 1}, keep=1)

    save(1)
    for _ in forks.deaths(lambda: save(2)):
        there = checkpoint.found(tmp_path)
        assert there
        for folder in there:
            step = checkpoint.load_state(folder)["step"]
            assert folder.name == f"checkpoint-{step}"
            assert (folder / "model").read_text() == str(step)
            checkpoint.check_options(folder, {"a": 1}, set())
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        save(1)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-2"]
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_rows_of_a_table_are_old_or_new(tmp_path):
    def begin():
        path.unlink(missing_ok=True)
        for step in (2, 4, 6):
            Table(path, step).add({"step": step})
        return path.read_bytes()

    path = tmp_path / "t.csv"
    whole = begin()
    for _ in forks.deaths(lambda: Table(path, 4)):
        assert path.read_bytes() in (whole, whole[:-3])
        begin()
    assert path.read_bytes() == whole[:-3]
    path.write_bytes(whole + b"1")  # of 12: cut off by a kill
    Table(path, 8)
    assert path.read_bytes() == whole


ROWS = [{"source": f"s{k}"} for k in range(5)]


def sample(output, word, *, overwrite=False, rows=ROWS, batch_size=2, stop=None):
    """As the command does it, with texts that `word` decides."""
    file = sample_file.SampleFile(str(output))
    with file.locked():
        done = file.start({"word": word}, rows, 1, len(rows), batch_size=batch_size, overwrite=overwrite)
        for first in range(done, len(rows), batch_size):
            if first == stop:
                return done
            ids = range(first, min(first + batch_size, len(rows)))
            file.write([{"id": k, "text": f"{word} {k}", **rows[k]} for k in ids])
        file.finish()
    return done


def texts(word, rows=ROWS):
    return [{"id": k, "text": f"{word} {k}", **row} for k, row in enumerate(rows)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("before", ["other options", "fewer rows", "nothing"])
def test_samples_are_old_or_new(before, tmp_path):
    """And the same command ends what another began, whenever that died."""
    out = tmp_path / "o.jsonl"
    old = {"other options": texts("old"), "fewer rows": texts("new", ROWS[:3]), "nothing": None}[before]

    def begin():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if old is not None:
            sample(out, old[0]["text"].split()[0], rows=ROWS[: len(old)])

    def act():
        sample(out, "new", overwrite=before == "other options")

    begin()
    for _ in forks.deaths(act):
        now = read(out) if out.exists() else None
        assert now in (old, texts("new"))
        with suppress(ValueError):  # texts that are there are refused, or made with these options
            sample(out, "new")
            assert read(out) == texts("new")
        act()
        assert read(out) == texts("new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.jsonl.options.json"]
        sample(out, "new")  # the right command is not refused
        with pytest.raises(ValueError, match=r"options must be those of .*o.jsonl, or overwrite must be given"):
            sample(out, "old")
        begin()
    assert read(out) == texts("new")


def test_an_unfinished_file_goes_on(tmp_path):
    out = tmp_path / "o.jsonl"
    sample(out, "new", stop=4)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"options must be those of .*o.jsonl.partial/texts.jsonl, or overwrite"):
        sample(out, "other")
    with (tmp_path / "o.jsonl.partial" / "texts.jsonl").open("ab") as file:
        file.write(b'{"id": 4, "te')
    assert sample(out, "new", overwrite=True) == 4
    assert read(out) == texts("new")
    sample(out, "new", overwrite=True, stop=2)
    assert sample(out, "other", overwrite=True) == 0
    assert read(out) == texts("other")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: [lines[0], lines[1][:9], *lines[2:]], 0),  # torn
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 2),  # twice, as two processes once wrote
        (lambda lines: [*lines[:4], b"\xff\n"], 4),
        (lambda lines: [*lines[:4], b"[]\n"], 4),
        (lambda lines: [*lines[:4], b'{"id": 4}\n'], 4),
        (lambda lines: [*lines, lines[0]], 5),
        (lambda lines: [*lines, b"half"], 5),
    ],
    ids=["torn", "twice", "no text", "no object", "no key", "too many", "half"],
)
def test_damaged_lines_are_sampled_again(damage, kept, tmp_path):
    out = tmp_path / "o.jsonl"
    sample(out, "new")
    whole = out.read_bytes()
    out.write_bytes(b"".join(damage(whole.splitlines(keepends=True))))
    assert sample(out, "new") == kept
    assert out.read_bytes() == whole


def test_other_sources_are_refused(tmp_path):
    out = tmp_path / "o.jsonl"
    sample(out, "new")
    whole = out.read_bytes()
    with pytest.raises(ValueError, match=r"source of text 1 must be that of .*, or overwrite .*: it has 's1', got 'x'"):
        sample(out, "new", rows=[ROWS[0], {"source": "x"}, *ROWS[2:]])
    assert sample(out, "new", rows=ROWS[:3]) == 5  # fewer are there
    assert out.read_bytes() == whole


def test_what_is_no_file_is_refused(tmp_path):
    for output in (tmp_path, "/dev/null", tmp_path / "none" / "x"):
        with pytest.raises(ValueError, match="output must be a file in a folder that exists"):
            sample_file.SampleFile(str(output))
    (tmp_path / "real.jsonl").write_text("mine\n")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    sample(tmp_path / "link.jsonl", "new", overwrite=True)
    assert (tmp_path / "link.jsonl").is_symlink()
    assert read(tmp_path / "real.jsonl") == texts("new")


@pytest.mark.parametrize("notes", ["", "[]", "{"])
def test_damaged_options_are_those_of_another_file(notes, tmp_path):
    out = tmp_path / "o.jsonl"
    sample(out, "new")
    (tmp_path / "o.jsonl.options.json").write_text(notes)
    with pytest.raises(ValueError, match="output must be one of this command, or be overwritten"):
        sample(out, "new")
