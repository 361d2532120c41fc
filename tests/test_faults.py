"""What goes wrong in a long training: kills, signals, full disks and memory, a second run, lost
processes, changed flags.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
from conftest import ROOT, SMALL_OF, log_of
from conftest import config as config_of
from test_scripts import SCRIPTS, every_script, strip

TRAIN = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from conftest import common, config
import SCRIPT
def parse():
    if (Path("RUNS") / "a/last.pt").exists() and not FRESH:
        return common.configure(SCRIPT.Config, resume=True, name="a", runs="RUNS")
    return config("SCRIPT", "DATA", "RUNS", name="a", **FLAGS)
common.run_entry(SCRIPT.main, parse)
"""


def training(method, data, runs, fresh=False, **flags):
    """Python source that starts or resumes a small run."""
    source = (
        TRAIN.replace("SCRIPT", method)
        .replace("DATA", str(data))
        .replace("RUNS", str(runs))
        .replace("FRESH", str(fresh))
    )
    return source.replace("FLAGS", repr(flags))


def same_weights(folder, other):
    whole = strip(other / "last.pt")
    for key, value in strip(folder / "last.pt").items():
        assert torch.equal(value, whole[key]), key


@contextlib.contextmanager
def at_step(monkeypatch, number, act):
    """Inside, `act` is called before step `number` (from 0) of a training is computed."""
    seed_step = common.seed_step
    with monkeypatch.context() as patch:
        patch.setattr(
            common,
            "seed_step",
            lambda seed, step, *place: (
                act() if step == number else None,
                seed_step(seed, step, *place),
            ),
        )
        yield


def check_end_by_signal(corpus, tmp_path, monkeypatch, runs_of, method, capsys, number, name):
    script, before = SCRIPTS[method], signal.getsignal(number)
    with (
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number)),
        pytest.raises(SystemExit) as stopped,
    ):
        common.run_entry(
            script.main, lambda: config_of(method, corpus, tmp_path, name="a", save_steps=100)
        )
    assert (
        stopped.value.code == 128 + number
        and f"{name}: saved step 3; continue with --resume --name a" in capsys.readouterr().out
    )
    assert common.read_checkpoint(tmp_path / "a/last.pt")["step"] == 3
    assert signal.getsignal(number) == before
    common.END_SIGNALS.clear()
    script.main(common.configure(script.Config, resume=True, name="a", runs=str(tmp_path)))
    same_weights(tmp_path / "a", runs_of(method)[0])


@every_script
def test_sigterm_saves_and_a_resumed_run_ends_as_an_uninterrupted_one(
    corpus, tmp_path, monkeypatch, runs_of, method, capsys
):
    place = corpus, tmp_path, monkeypatch, runs_of, method, capsys
    check_end_by_signal(*place, signal.SIGTERM, "SIGTERM")


def test_ctrl_c_saves_as_sigterm_does(corpus, tmp_path, monkeypatch, runs_of, capsys):
    place = corpus, tmp_path, monkeypatch, runs_of, "mga_clap", capsys
    check_end_by_signal(*place, signal.SIGINT, "Ctrl-C")


def test_two_ctrl_c_while_saving_end_at_once_and_leave_the_older_checkpoint(corpus, tmp_path):
    twice = """
import os, signal
saves, write = [], torch.save
def save(payload, file):
    saves.append(payload["step"])
    for _ in range(2 * (len(saves) == 3)):  # the first two, best.pt and last.pt, are written
        os.kill(os.getpid(), signal.SIGINT)
    write(payload, file)
torch.save = save
"""
    source = training("mga_clap", corpus, tmp_path, fresh=True)
    source = source.replace("def parse", twice + "def parse")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and "space" not in done.stdout + done.stderr
    assert common.read_checkpoint(tmp_path / "a/last.pt")["step"] > 0


@pytest.mark.parametrize(
    "method",
    [
        name if name == "curation_clap" else pytest.param(name, marks=pytest.mark.slow)
        for name in SCRIPTS
    ],
)
def test_sigterm_to_the_whole_group_leaves_the_loader_s_workers_alive_until_all_is_saved(
    corpus, tmp_path, method
):
    long = (
        {"epochs": 2000}
        if method == "mga_clap"
        else {"steps": 4000}
        if "steps" in SMALL_OF[method]
        else {"teacher_epochs": 2000}
    )
    source = tmp_path / "train.py"
    source.write_text(training(method, corpus, tmp_path, fresh=True, workers=2, **long))
    log = tmp_path / "a/log.jsonl"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, number, name, code in (
        ([], signal.SIGTERM, "SIGTERM", 143),  # a batch system's
        ([], signal.SIGINT, "Ctrl-C", 130),  # a terminal's
        (torchrun, signal.SIGTERM, "SIGTERM", 1),
    ):
        process = subprocess.Popen(
            [sys.executable, *launcher, source],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        log.unlink(missing_ok=True)
        (tmp_path / "a/last.pt").unlink(missing_ok=True)
        end = time.monotonic() + 200
        while (
            not (log.exists() and log.read_text().count("\n") > 2)
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=100)
        assert f"{name}: saved step" in out and "DataLoader worker" not in out, out[-3000:]
        assert (
            process.returncode == code
            and common.read_checkpoint(tmp_path / "a/last.pt")["step"] > 0
        )  # of Cacophony, in stage 2


def test_a_signal_to_a_worker_that_has_just_started_does_not_kill_it(tmp_path):
    """The worker is slow to reach `outlive_signals`, and the signal comes meanwhile."""
    source = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, common
import torch.utils.data._utils.worker as worker
more = {{}}
set_num_threads = torch.set_num_threads
def slow(n):
    while not os.path.exists({str(tmp_path / "sent")!r}):
        time.sleep(0.05)
    set_num_threads(n)
worker.torch.set_num_threads = slow  # called before a worker's `worker_init_fn`
batches = iter(common.Loader(range(8), 2, num_workers=2, **more))
subprocess.run(["kill", "-TERM", *[str(process.pid) for process in batches._workers]])
open({str(tmp_path / "sent")!r}, "w").close()
print([batch.tolist() for batch in batches])
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "[[0, 1], [2, 3], [4, 5], [6, 7]]\n", done.stderr[-2000:]
    (tmp_path / "sent").unlink()
    plain = source.replace("common.Loader", "torch.utils.data.DataLoader")
    plain = plain.replace("more = {}", "more = dict(worker_init_fn=common.outlive_signals)")
    killed = subprocess.run(
        [sys.executable, "-c", plain], capture_output=True, text=True, timeout=100
    )
    assert "exited unexpectedly" in killed.stderr  # that the test can fail


def test_sigterm_in_a_curation_keeps_the_finished_blocks(
    corpus, tmp_path, monkeypatch, capsys, runs_of
):
    script = SCRIPTS["curation_clap"]
    monkeypatch.setattr(script, "EMBED_BATCH", 2)
    embedded, embed_block = [], script.embed_block

    def embeds(model, rows, *args):
        embedded.extend(row["audio"] for row in rows)
        if len(embedded) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed_block(model, rows, *args)

    monkeypatch.setattr(script, "embed_block", embeds)
    with pytest.raises(SystemExit) as stopped:
        common.run_entry(
            script.main, lambda: config_of("curation_clap", corpus, tmp_path, name="a", block=2)
        )
    assert (
        stopped.value.code == 143
        and "SIGTERM: saved the embeddings of 2 blocks; continue with --resume --name a"
        in capsys.readouterr().out
    )
    common.END_SIGNALS.clear()
    script.main(common.configure(script.Config, resume=True, name="a", runs=str(tmp_path)))
    assert len(embedded) == len(set(embedded)) > 4  # none twice

    def of(path):
        return [
            (row["audio"], row["captions"])
            for row in map(json.loads, (path / "ads.jsonl").read_text().splitlines())
        ]

    assert of(tmp_path / "a") == of(runs_of("curation_clap")[0])


@every_script
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    corpus, tmp_path, monkeypatch, runs_of, method
):
    script, limits = SCRIPTS[method], resource.getrlimit(resource.RLIMIT_FSIZE)
    step = (
        3 if method in ("cacophony", "curation_clap") else 4
    )  # between the first checkpoint and the last

    def fill():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    if method == "cacophony":
        script.main(config_of(method, corpus, tmp_path, name="a", stage="mae"))
    try:
        with (
            at_step(monkeypatch, step, fill),
            pytest.raises(OSError, match="cannot be written .*; what was there before is whole"),
        ):
            script.main(
                config_of(
                    method,
                    corpus,
                    tmp_path,
                    name="a",
                    **({"stage": "contrastive"} if method == "cacophony" else {}),
                )
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "a").glob("*.tmp"))
    script.main(common.configure(script.Config, resume=True, name="a", runs=str(tmp_path)))
    same_weights(tmp_path / "a", runs_of(method)[0])


@pytest.mark.parametrize("written", ["half", "all"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, written):
    class Killed(BaseException):
        pass

    common.save_checkpoint(tmp_path / "last.pt", {"step": 1})
    save = torch.save

    def dies(payload, file):
        save(payload, file)
        if written == "half":
            file.truncate(file.tell() // 2)
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        common.save_checkpoint(tmp_path / "last.pt", {"step": 2})
    monkeypatch.undo()
    assert common.read_weights(tmp_path / "last.pt") == {"step": 1}
    (tmp_path / "last.pt.tmp").write_bytes(
        b"half"
    )  # what a real kill leaves behind is in nobody's way
    common.save_checkpoint(tmp_path / "last.pt", {"step": 3})
    assert common.read_weights(tmp_path / "last.pt") == {"step": 3} and [
        p.name for p in tmp_path.iterdir()
    ] == ["last.pt"]


@pytest.mark.slow
@every_script
def test_kill_9_at_twenty_random_moments(corpus, tmp_path, runs_of, method):
    """Every step writes a checkpoint, so that many kills fall into the writing."""
    draw = random.Random(0)
    flags = dict(
        save_steps=1,
        **(
            {"epochs": 6}
            if method == "mga_clap"
            else {"steps": 24}
            if "steps" in SMALL_OF[method]
            else {"teacher_epochs": 6}
        ),
    )
    SCRIPTS[method].main(config_of(method, corpus, tmp_path / "whole", name="a", **flags))
    kills, seen = 0, []
    source = training(method, corpus, tmp_path / "killed", **flags)
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        last = tmp_path / "killed/a/log.jsonl"
        before, deadline = last.stat().st_mtime_ns if last.exists() else 0, time.time() + 120
        while (
            process.poll() is None
            and time.time() < deadline
            and (last.stat().st_mtime_ns if last.exists() else 0) == before
        ):
            time.sleep(0.01)  # until it trains
        time.sleep(draw.uniform(0, 0.4))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
        for name in ("last.pt", "best.pt", "teacher.pt", "mae.pt"):  # whole, or not there yet
            if (tmp_path / "killed/a" / name).exists():
                seen.append(common.read_checkpoint(tmp_path / "killed/a" / name)["step"])
    assert kills and seen
    if process.returncode:  # the last one was killed, too
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    same_weights(tmp_path / "killed/a", tmp_path / "whole/a")
    assert not list(
        (tmp_path / "killed/a").rglob("*.tmp")
    )  # a finished run leaves nothing half-written


def opened(tmp_path, name="a", continues=False):
    """A run that has its folder."""
    run = common.Run(common.RunConfig(runs=str(tmp_path), name=name), "x")
    run.open_folder(1, continues)
    return run


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_frees_it(tmp_path):
    hold = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import common
common.Run(common.RunConfig(runs={str(tmp_path)!r}, name='a'), 'x').open_folder(1, False)
print('held', flush=True)
time.sleep(600)"""
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            FileExistsError,
            match=f"{tmp_path}/a is held by another process",
        ):
            opened(tmp_path, continues=True)
        with pytest.raises(FileExistsError, match="is held by another process"):
            opened(tmp_path)  # a second attempt, as a notebook's user makes it
        opened(tmp_path, "b")
    finally:
        process.kill()
        process.wait()
    opened(tmp_path)
    opened(tmp_path, continues=True)  # a second stage of the same process


@pytest.mark.skipif(common.fcntl is None, reason="Windows has no fcntl")
def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", refuse)
    assert (opened(tmp_path).path / "log.jsonl").exists()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), None],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_names_the_batch_and_the_flags(error):
    def main(cfg):
        if error:
            raise error
        torch.empty(2**60)

    with pytest.raises(
        SystemExit,
        match="^error: out of memory; try a smaller --batch-size, in a training --micro-batch .*, "
        "or --precision bf16 .*allocate",
    ):
        common.run_entry(main, lambda: SCRIPTS["t_clap"].Config(data=["x"]))
    with pytest.raises(SystemExit, match="try a smaller --batch-size"):
        common.run_entry(main, lambda: argparse.Namespace(batch_size=32))  # as eval.py's
    with pytest.raises(RuntimeError, match="a fault of ours"):  # anything else keeps its traceback
        common.run_entry(
            lambda cfg: (_ for _ in ()).throw(RuntimeError("a fault of ours")), lambda: None
        )


def test_every_process_lists_its_share_of_a_batch_without_a_finite_loss(tmp_path, monkeypatch):
    run = opened(tmp_path)
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank_and_world", lambda: (rank, 2))
        with pytest.raises(
            FloatingPointError, match=f"the loss of step 7 is nan; .*nonfinite_batch_{rank}.txt"
        ):
            common.check_finite([(7, torch.tensor(float("nan")), [f"{rank}.wav"])], run)
    assert [(tmp_path / f"a/nonfinite_batch_{rank}.txt").read_text() for rank in (0, 1)] == [
        "0.wav\n",
        "1.wav\n",
    ]


@pytest.mark.parametrize(
    "micro_batch, kind", [(0, torch.nn.SyncBatchNorm), (8, torch.nn.BatchNorm2d)]
)
def test_batch_norm_is_synchronised_only_where_every_process_has_one_part(
    monkeypatch, micro_batch, kind
):
    """SyncBatchNorm talks to the others in every pass, and with gradient caching they may have
    different numbers of passes.
    """
    monkeypatch.setattr(common, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, devices: model)
    wrapped = common.wrap(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3)), torch.device("cuda", 0), False, micro_batch
    )
    assert type(wrapped[0]) is kind


def test_resume_may_change_what_the_weights_do_not_depend_on(corpus, tmp_path, runs_of):
    stored = common.read_checkpoint(runs_of("t_clap")[0] / "last.pt")["config"]
    script = importlib.import_module("t_clap")
    for flags in (
        dict(micro_batch=2),
        dict(compile=True),
        dict(workers=3),
        dict(eval_steps=7),
    ):
        common.check_resume(script.Config(**{**stored, **flags}), stored)
    with pytest.raises(ValueError, match="--resume: --lr is 5.0 but the run was started with"):
        common.check_resume(script.Config(**{**stored, "lr": 5.0}), stored)


def test_a_killed_process_ends_the_run_of_all_with_a_message(corpus, tmp_path):
    source = tmp_path / "train.py"
    source.write_text(
        training(
            "mga_clap",
            corpus,
            tmp_path / "runs",
            fresh=True,
            epochs=2000,
            eval_epochs=1000,
            save_steps=1000,
        ).replace(
            "common.run_entry",
            """
import os
seed_step = common.seed_step
def dies(seed, step, rank=0, part=0):
    if step == 3 and rank == 1:
        os.kill(os.getpid(), 9)
    seed_step(seed, step, rank, part)
common.seed_step = dies
common.run_entry""",
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "exitcode  : -9" in done.stderr
    assert (
        "error: process 0 of 2 stopped, since another one ended or cannot be reached" in done.stderr
    ), done.stderr[-3000:]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [
        name if name in ("mga_clap", "cacophony") else pytest.param(name, marks=pytest.mark.slow)
        for name in SCRIPTS
    ],
)
def test_compiled_training_takes_the_same_steps(
    corpus, tmp_path, monkeypatch, runs_of, method, backend
):
    """aot_eager: everything but the generated code, which takes a compiler minutes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model: compile_module(model, backend=backend)
    )
    SCRIPTS[method].main(config_of(method, corpus, tmp_path, name="c", compile=True))
    losses = [
        [line.get("loss", 0) for line in log_of(folder)]
        for folder in (runs_of(method)[0], tmp_path / "c")
    ]
    assert losses[1][:4] == pytest.approx(losses[0][:4], abs=2e-3)
    assert not any(
        "_orig_mod" in key for key in common.read_checkpoint(tmp_path / "c/last.pt")["model"]
    )


def test_what_torch_says_of_memory_and_of_a_killed_worker_is_a_sentence():
    for error, sentence in (
        ("could not create a primitive", "out of memory; try a smaller --batch-size"),
        ("[enforce fail] can't allocate memory: you tried", "out of memory; try a smaller"),
        (
            "DataLoader worker (pid 7) is killed by signal: Killed.",
            "a process that reads audio was killed.*try fewer --workers",
        ),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "a process that reads audio was"),
    ):
        said = common.what_torch_says(RuntimeError(error))
        assert re.match(sentence, said) and "\n" not in said
    said = common.what_torch_says(ConnectionResetError(104, "Connection reset by peer"))
    assert said.startswith("a process that reads audio was killed")
    assert common.what_torch_says(RuntimeError("shape mismatch")) is None


def test_a_killed_loader_worker_ends_the_training_with_a_sentence(corpus, tmp_path):
    source = training("mga_clap", corpus, tmp_path, fresh=True, workers=2, epochs=500)
    dies = """
import multiprocessing, os
step_done = common.Run.step_done
def dies(run, *args, **values):
    step_done(run, *args, **values)
    if run.step == 3:
        os.kill(multiprocessing.active_children()[0].pid, 9)
common.Run.step_done = dies
common.run_entry"""
    source = source.replace("common.run_entry", dies)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "error: a process that reads audio was killed" in done.stderr, done.stderr[-2000:]


def test_more_workers_than_files_may_be_open_ends_with_a_sentence(corpus, tmp_path):
    """Those that had started used to be waited for without end."""
    source = training("mga_clap", corpus, tmp_path, fresh=True, workers=20)
    limited = (
        "import os, resource; os.sched_getaffinity = lambda _: range(20)  # 20 cores\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n{source}"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, timeout=100
    )
    assert "error: --workers 20: they cannot all be started" in done.stderr, done.stderr[-2000:]
    assert done.returncode == 1


def test_a_reader_that_leaves_the_pipe_ends_neither_a_training_nor_an_evaluation(corpus, tmp_path):
    source = training("mga_clap", corpus, tmp_path, fresh=True, epochs=1)
    (tmp_path / "train.py").write_text(source)
    head = f"{sys.executable} {{}} | head -c 1; exit ${{{{PIPESTATUS[0]}}}}"
    words = ["bash", "-c", head.format(tmp_path / "train.py").replace("{{", "{").replace("}}", "}")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and (tmp_path / "a/eval.json").exists(), done.stderr[-2000:]
    score = (
        f"{ROOT / 'eval.py'} {tmp_path / 'a/best.pt'} --data {corpus} --bootstrap 0 "
        f"--json {tmp_path / 'scores.json'}"
    )
    words = ["bash", "-c", head.format(score).replace("{{", "{").replace("}}", "}")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "scores.json").read_text())) > 3


def test_a_full_disk_is_a_sentence_for_sounds_and_pictures_too(tmp_path):
    import matplotlib.figure
    import numpy as np

    from tools import figures

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.wav cannot be written .File too large.; what was"):
            common.write_audio(tmp_path / "a.wav", np.zeros(20000), 16000)
        with pytest.raises(OSError, match="p.png cannot be written"):
            figures.save(matplotlib.figure.Figure(), tmp_path / "p.png", 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_saves_although_whoever_read_its_output_has_gone(corpus, tmp_path, number, code):
    """`2>&1 | tee log`, and a Ctrl-C that ends tee, too."""
    source = training("mga_clap", corpus, tmp_path, fresh=True, epochs=500)
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", source], stdout=write, stderr=write)
    os.close(write)
    log, end = tmp_path / "a/log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < end:
        time.sleep(0.1)
    os.close(read)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(timeout=100) == code
    assert common.read_checkpoint(tmp_path / "a/last.pt")["step"] > 2


def test_nothing_of_one_call_stays_for_the_next(monkeypatch):
    streams = sys.stdout, sys.stderr

    def main(_):
        common.END_SIGNALS.append(signal.SIGTERM)
        raise ValueError("x")

    with pytest.raises(SystemExit, match="error: x"):
        common.run_entry(main, lambda: None)
    assert (sys.stdout, sys.stderr) == streams and common.END_SIGNALS == []
    curation = SCRIPTS["curation_clap"]
    curation.Config(data=["demo"]).audio_channels.append(7)
    assert curation.Config(data=["demo"]).audio_channels == curation.TINY["audio_channels"]
    assert 7 not in curation.TINY["audio_channels"]
    monkeypatch.setattr(sys, "stdout", None)  # as pythonw has it
    common.run_entry(lambda _: None, lambda: None)
