"""Checkpoints survive temporary failures, and damaged or removed files never restart a run."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import TINY_RUN, initial

from bdkd.cli import main
from bdkd.errors import DamagedFile, RunError
from bdkd.runs import checkpoint as checkpoints
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import RunFolder
from bdkd.runs.weights import load_weights

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def finished(without_figures, tmp_path_factory):
    """A run of 12 steps with checkpoints of steps 10 and 12."""
    run = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *TINY_RUN, "--train.epochs", "1", "--run-dir", str(run), "--quiet"])
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files(run: Path) -> dict[str, bytes]:
    """Return the content of every file of a run."""
    found = {p for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    return {str(p.relative_to(run)): p.read_bytes() for p in found}


def error_line(*arguments: str, capsys) -> str:
    """Run a command that fails, and return the only line that it prints to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1, said
    return said


# --- temporary failures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "Stale file handle"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "not enough memory"),
        (RuntimeError("something new of torch"), "cannot load it"),
    ],
    ids=lambda value: getattr(value, "strerror", None) or type(value).__name__,
)
@pytest.mark.parametrize("where", ["check_stored_zip", "torch.load"])
def test_a_temporary_failure_is_not_damage(finished, monkeypatch, failure, said, where):
    def fail(*_, **__):
        raise failure

    before = files(finished)
    owner = torch if where == "torch.load" else checkpoints
    monkeypatch.setattr(owner, where.removeprefix("torch."), fail)
    with pytest.raises(RunError, match=f"step-00000012.pt.*{said}") as refused:
        RunFolder(finished).newest_state(warn=pytest.fail)
    assert not isinstance(refused.value, DamagedFile)
    assert files(finished) == before


def test_a_resume_after_a_temporary_failure_continues(run, monkeypatch, capsys):
    """At first the checkpoint cannot be read, and then its folder."""
    resume = ("train", "--resume", "--run-dir", str(run), "--train.epochs", "2")
    before = files(run)

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    listing = Path.iterdir
    refused_folder = lambda p: refuse() if p.name == "checkpoints" else listing(p)  # noqa: E731
    for owner, name, replacement, said in (
        (checkpoints, "check_stored_zip", refuse, "Permission denied; the file was not changed"),
        (Path, "iterdir", refused_folder, "cannot read the folder"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            assert said in error_line(*resume, capsys=capsys)
        assert files(run) == before
    main(list(resume))
    assert "continuing at step 12" in capsys.readouterr().out


def test_too_little_memory_is_reported(run):
    """The operating system enforces the limit, which a shell or a scheduler may set."""
    script = (
        "import resource, sys; from pathlib import Path; import bdkd.runs.checkpoint as c\n"
        "from bdkd.errors import DamagedFile, RunError\n"
        "import torch; torch.zeros(4).sum()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))\n"
        "try: c.load_checkpoint(Path(sys.argv[1]))\n"
        "except DamagedFile as error: print('damaged', error)\n"
        "except RunError as error: print('passes', error)\n"
    )
    big = run / "checkpoints" / "step-00000099.pt"
    text, state = load_checkpoint(run / "checkpoints" / "step-00000012.pt")
    state["networks"]["large"] = torch.zeros(2**24)
    checkpoints.save_checkpoint(big, text, state)
    done = subprocess.run([sys.executable, "-c", script, str(big)], capture_output=True, text=True)
    assert done.stdout.startswith("passes"), (done.stdout, done.stderr[-500:])
    assert "not enough memory" in done.stdout or "Cannot allocate memory" in done.stdout


def test_too_many_open_files_are_reported(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(RunError, match="Too many open files") as refused:
            load_checkpoint(run / "checkpoints" / "step-00000012.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(refused.value, DamagedFile)


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_any_tensor_is_found(run):
    """``torch.load`` verifies no checksum, so it would load wrong weights without an error."""
    path = run / "checkpoints" / "step-00000012.pt"
    whole = path.read_bytes()
    for place in range(len(whole) // 20, len(whole), len(whole) // 20):
        path.write_bytes(whole)
        flip(path, place)
        try:
            load_checkpoint(path)
        except DamagedFile as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # the bit is in the padding between members, which has no content
            assert torch.load(path, weights_only=True).keys() == {"format", "recipe", "state"}
    path.write_bytes(whole)
    middle = whole.find(b"archive/data/") + 2000
    flip(path, middle)
    with pytest.raises(DamagedFile, match="CRC-32"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_truncated_checkpoint_is_renamed_and_the_previous_one_resumes(run, share, capsys):
    path = run / "checkpoints" / "step-00000012.pt"
    shutil.copy(path, run / "kept.pt")
    for kind in ("step", "best"):
        damaged = run / "checkpoints" / f"{kind}-00000012.pt"
        damaged.write_bytes(damaged.read_bytes()[: int(share * damaged.stat().st_size)])
    main(["train", "--resume", "--run-dir", str(run), "--train.select", "last"])
    said = capsys.readouterr().out
    assert "step-00000012.pt is damaged: " in said
    assert "renamed to step-00000012.damaged" in said
    assert "continuing at step 10" in said
    assert (run / "checkpoints" / "step-00000012.damaged").exists()
    assert load_checkpoint(path)[1]["position"]["step"] == 12  # trained again


def test_weights_with_a_flipped_bit_are_refused(run):
    path = run / "weights.pt"
    network = torch.nn.Linear(100, 10)
    torch.save(network.state_dict(), path)
    load_weights(torch.nn.Linear(100, 10), "student", initial(path))
    flip(path, path.read_bytes().find(network.weight.detach().numpy().tobytes()) + 1000)
    with pytest.raises(RunError, match="CRC-32"):
        load_weights(torch.nn.Linear(100, 10), "student", initial(path))


def test_weights_in_the_format_before_torch_1_6_load(run):
    torch.save(
        torch.nn.Linear(3, 2).state_dict(), run / "old.pt", _use_new_zipfile_serialization=False
    )
    load_weights(torch.nn.Linear(3, 2), "student", initial(run / "old.pt"))


def rezip(path: Path, **options) -> None:
    """Pack the members of a checkpoint again, as another program might."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def comment(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"copied by somebody"


FOREIGN = {
    "compressed": lambda path: rezip(path, compression=zipfile.ZIP_DEFLATED),
    "a comment": comment,
    "torch before 1.6": lambda path: torch.save(
        {"weights": torch.zeros(3)}, path, _use_new_zipfile_serialization=False
    ),
    "text": lambda path: path.write_text("a note"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_intact_file_of_another_program_is_refused_and_not_renamed(run, kind, capsys):
    FOREIGN[kind](run / "checkpoints" / "step-00000012.pt")
    before = files(run)
    line = error_line(
        "train", "--resume", "--run-dir", str(run), "--train.epochs", "2", capsys=capsys
    )
    assert "is not a checkpoint that bdkd wrote" in line
    assert files(run) == before


@pytest.mark.parametrize(("offset", "bit"), [(38, 0x10), (34, 1), (35, 1)])
def test_a_flipped_bit_in_the_directory_is_found(run, offset, bit):
    """With the DOS attribute of a folder, torch returned uninitialised memory as weights. With
    another disk number, torch refused the file."""
    path = run / "checkpoints" / "step-00000012.pt"
    whole, place, tried = path.read_bytes(), 0, 0
    while (place := whole.find(b"PK\1\2", place + 1)) >= 0:
        name = whole[place + 46 :][: int.from_bytes(whole[place + 28 : place + 30], "little")]
        if b"/data/" not in name:
            continue
        content = bytearray(whole)
        content[place + offset] ^= bit
        path.write_bytes(content)
        with pytest.raises(DamagedFile):
            load_checkpoint(path)
        tried += 1
    assert tried > 50


def test_a_read_error_at_the_end_of_a_file_is_not_damage(run, monkeypatch):
    """zipfile reports an OSError there as "File is not a zip file"."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "_EndRecData", fail)
    with pytest.raises(RunError, match="Input/output error") as refused:
        load_checkpoint(run / "checkpoints" / "step-00000012.pt")
    assert not isinstance(refused.value, DamagedFile)


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_pipe_is_refused_at_once(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe.pt")
    path = tmp_path / "pipe.pt"
    load = {
        "checkpoint": partial(load_checkpoint, path),
        "weights": partial(load_weights, torch.nn.Linear(1, 1), "student", initial(path)),
    }
    with pytest.raises(RunError, match="not a regular file"):
        load[kind]()


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(run):
    path = run / "checkpoints" / "step-00000012.pt"
    (run / "checkpoints" / "step-00000012.damaged").write_bytes(b"the first")
    path.write_bytes(path.read_bytes()[:500])
    RunFolder(run).newest_state(warn=print)
    assert (run / "checkpoints" / "step-00000012.damaged").read_bytes() == b"the first"
    assert (run / "checkpoints" / "step-00000012.damaged.2").stat().st_size == 500


# --- a resume never starts an older run over ------------------------------------------------------


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(run, capsys):
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    resume = ("train", "--resume", "--run-dir", str(run), "--train.epochs", "2")
    for _ in range(2):  # the first attempt renames them
        assert "put one back" in error_line(*resume, capsys=capsys)
    assert (run / "summary.json").exists()
    assert len(list((run / "checkpoints").glob("*.damaged"))) == 3


@pytest.mark.parametrize("kept", ["summary", "mark", "metrics"])
def test_a_run_whose_checkpoints_were_removed_does_not_start_over(run, kept, capsys):
    """Any one of summary.json, the mark ``.saved`` and metrics.jsonl is enough to find the run.

    Runs of older versions have no mark.
    """
    shutil.rmtree(run / "checkpoints")
    last = 12
    if kept != "metrics":
        first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
        (run / "metrics.jsonl").write_text(first)
        last = 1
    if kept != "summary":
        (run / "summary.json").unlink()
    if kept != "mark":
        (run / ".saved").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    for resume in ("require", "auto"):
        line = error_line(
            "train", TINY_RUN[0], "--resume", resume, "--run-dir", str(run), capsys=capsys
        )
        assert f"the run had reached step {last}," in line
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_without_its_config_is_not_overwritten(run, capsys):
    (run / "config.toml").unlink()
    before = files(run)
    for resume in ("never", "auto"):
        line = error_line(
            "train", TINY_RUN[0], "--resume", resume, "--run-dir", str(run), capsys=capsys
        )
        assert "no config.toml" in line
    assert files(run) == before


def test_a_run_resumes_from_its_best_checkpoint_if_that_is_the_newest(run, capsys):
    """The run was killed after an evaluation and before the next checkpoint."""
    for path in (run / "checkpoints").glob("step-*"):
        path.unlink()
    (run / "summary.json").unlink()
    main(["train", "--resume", "--run-dir", str(run), "--train.epochs", "2"])
    said = capsys.readouterr().out
    assert "continuing at step 12, from" in said
    assert "best-00000012.pt" in said


def test_a_run_killed_before_its_last_checkpoint_writes_it_on_resume(run):
    """Nothing is left to train, because the checkpoint of the best student has the last step."""
    (run / "checkpoints" / "step-00000012.pt").unlink()
    (run / "summary.json").unlink()
    main(["train", "--resume", "--run-dir", str(run), "--quiet"])
    assert load_checkpoint(run / "checkpoints" / "step-00000012.pt")[1]["position"]["step"] == 12
    assert (run / "summary.json").exists()


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(run, monkeypatch):
    remove = Path.unlink

    def keep(path, *args, **kwargs):
        if path.name.startswith("step-"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", keep)
    main(["train", "--resume", "--run-dir", str(run), "--train.epochs", "2", "--quiet"])
    saved = [path.name for path in RunFolder(run).checkpoint_paths()]
    assert saved[:2] == ["step-00000024.pt", "step-00000020.pt"]
    assert "step-00000010.pt" in saved


def test_malformed_lines_of_metrics_do_not_stop_a_resume(run, capsys):
    lines = [
        '{"step":"x","split":5}', '{"step":1,"step":2}', '{"step":true,"split":"train"}', "[1]",
        '{"step":1,"split":"train","student":{"loss":1}}', "[" * 100_000, '{"step": NaN}',
        '{"step":-1,"split":"train","student":{"loss":1}}', '{"step":1,"split":[1]}', "3",
        '{"step":' + "9" * 10_000 + '}', '{"step":1,"split":"train","\\ud800":{"loss":1}}',
        '{"step":1e3,"split":"train"}',
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    main(["train", "--resume", "--run-dir", str(run), "--train.epochs", "2"])
    assert "continuing at step 12" in capsys.readouterr().out
    assert [line["step"] for line in RunFolder(run).read_metrics()][:3] == [2, 1, 13]


def test_a_last_line_without_a_newline_is_ignored(run):
    """A kill may have cut the last line, so it is not trusted even if it is valid JSON."""
    whole = RunFolder(run).read_metrics()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 12}')
    assert RunFolder(run).read_metrics() == whole
