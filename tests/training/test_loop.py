"""The loop: data order, exact resume, skipped steps, signals, averaging and settings."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from blockloom.core.errors import ModelError, UsageError
from blockloom.training.checkpoint import CheckpointStore
from blockloom.training.loop import TrainConfig, Trainer, batch_indices, seed_for
from blockloom.training.optim import build_optimizers, is_hidden_matrix, learning_rate_at
from blockloom.training.precision import probe_precision
from blockloom.training.runlog import RunLog

ITEMS = 20


class Regression:
    """Fits y = x A with noise from the generator and dropout from the global one."""

    def __init__(self, bad_steps=(), on_step=None):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Linear(16, 3)
        )
        self.num_items = ITEMS
        self.inputs = torch.randn(ITEMS, 6)
        self.targets = self.inputs @ torch.randn(6, 3)
        self.bad_steps, self.on_step = bad_steps, on_step
        self.seen = []

    def modules(self):
        return self.net

    def loss(self, indices, generator, step):
        if self.on_step is not None:
            self.on_step(step)
        self.seen.append(indices.tolist())
        noise = 0.1 * torch.randn(len(indices), 6, generator=generator)
        predicted = self.net(self.inputs[indices] + noise).float()
        loss = (predicted - self.targets[indices]).square().mean()
        if step in self.bad_steps:
            loss = loss * math.nan
        return loss, {"size": float(len(indices))}


def config(**changes):
    settings = {
        "num_steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_every": 3,
        "log_every": 5,
        "precision": "fp32",
        "progress": False,
    }
    return TrainConfig(**(settings | changes))


def final_state(folder):
    found = CheckpointStore(folder / "checkpoints").load()
    flat = {f"{a}/{b}": t for a, group in found.tensors.items() for b, t in group.items()}
    log = RunLog(folder / "log.jsonl").read()
    for line in log:
        line.pop("items_per_second", None)
    return found.step, flat, log


def assert_same_run(one, two):
    (step, flat, log), (other_step, other_flat, other_log) = final_state(one), final_state(two)
    assert step == other_step
    assert flat.keys() == other_flat.keys()
    different = [name for name in flat if not torch.equal(flat[name], other_flat[name])]
    assert different == []
    assert log == other_log


def test_each_epoch_takes_every_item_once():
    drawn = torch.cat([batch_indices(3, step, 8, ITEMS) for step in range(5)])
    for epoch in drawn.view(2, ITEMS):
        assert sorted(epoch.tolist()) == list(range(ITEMS))
    assert not torch.equal(*drawn.view(2, ITEMS))
    assert not torch.equal(batch_indices(4, 0, 8, ITEMS), batch_indices(3, 0, 8, ITEMS))


def test_a_batch_may_exceed_an_epoch():
    drawn = batch_indices(0, 0, 50, ITEMS)
    assert drawn.bincount().tolist()[:ITEMS] == drawn.bincount(minlength=ITEMS).tolist()
    assert drawn.bincount(minlength=ITEMS).min() == 2
    assert drawn.bincount(minlength=ITEMS).max() == 3


def test_seeds_are_fixed_over_versions():
    assert seed_for(0, "step", 1) == seed_for("0", "step", "1")
    assert seed_for(1, "23") != seed_for(12, "3")
    assert 0 <= seed_for("x") < 2**32


def test_learning_rate_closed_form():
    rates = [learning_rate_at(i, peak=2.0, num_steps=12, warmup_steps=2) for i in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[-1] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[2:]))
    assert learning_rate_at(7, peak=2.0, num_steps=13, warmup_steps=2) == pytest.approx(1.0)
    assert learning_rate_at(11, peak=2.0, num_steps=12, final_ratio=0.25) == pytest.approx(0.5)
    assert learning_rate_at(11, peak=2.0, num_steps=12, curve="constant") == 2.0


def test_training_learns(tmp_path):
    report = Trainer(
        Regression(), config(num_steps=300, ema_decay=0.9, warmup_steps=5, log_every=50), tmp_path
    ).run()
    log = RunLog(tmp_path / "log.jsonl").read()
    assert report.step == 300
    assert report.loss < 0.2 * log[0]["loss"]
    assert report.loss == log[-1]["loss"]
    assert report.checkpoint.name == "step_00000300"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon"},
        {"precision": "bf16", "ema_decay": 0.0},
        {"accumulation": 2, "log_every": 1},
    ],
    ids=["adamw", "muon", "bf16", "accumulated"],
)
def test_interrupted_run_ends_with_the_same_bits(tmp_path, changes):
    Trainer(Regression(), config(**changes), tmp_path / "whole").run()

    class Killed(BaseException):
        pass

    def die_at(fatal):
        def check(step):
            if step == fatal:
                raise Killed

        return check

    for fatal in (4, 7, 11):
        trainer = Trainer(
            Regression(on_step=die_at(fatal)), config(**changes), tmp_path / "cut", resume=True
        )
        with pytest.raises(Killed):
            trainer.run()
    Trainer(Regression(), config(**changes), tmp_path / "cut", resume=True).run()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_falls_back_when_the_newest_is_damaged(tmp_path):
    Trainer(Regression(), config(), tmp_path / "whole").run()
    Trainer(Regression(), config(), tmp_path / "hurt").run()
    newest = CheckpointStore(tmp_path / "hurt" / "checkpoints").list()[-1]
    (newest / "ema.safetensors").write_bytes(b"")
    report = Trainer(Regression(), config(), tmp_path / "hurt", resume=True).run()
    assert report.step == 12
    assert_same_run(tmp_path / "whole", tmp_path / "hurt")


def test_accumulation_equals_one_large_batch(tmp_path):
    ends = []
    for parts in (1, 4):
        stage = Regression()
        stage.net[2].p = 0.0
        stage.loss = _without_noise(stage)
        Trainer(stage, config(accumulation=parts), tmp_path / str(parts)).run()
        ends.append(stage.net)
    for one, two in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def _without_noise(stage):
    def loss(indices, generator, step):
        error = stage.net(stage.inputs[indices]) - stage.targets[indices]
        return error.square().mean(), {}

    return loss


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    snapshots = []

    def note(step):
        state = trainer.module.state_dict(), trainer.ema.shadow_params
        copies = [t.clone() for t in [*state[0].values(), *state[1]]]
        moments = [s["exp_avg"].clone() for s in trainer.optimizers[0].state.values()]
        snapshots.append(copies + moments)

    trainer = Trainer(Regression(bad_steps=(3, 4), on_step=note), config(log_every=1), tmp_path)
    report = trainer.run()
    assert report.skipped == 2
    for before, after in ((3, 4), (4, 5)):
        assert all(map(torch.equal, snapshots[before], snapshots[after]))
    assert not all(map(torch.equal, snapshots[5], snapshots[6]))
    line = RunLog(tmp_path / "log.jsonl").read()[3]
    assert line["skipped"] == 1
    assert "loss" not in line


def test_five_bad_steps_in_a_row_stop_the_run(tmp_path):
    stage = Regression(bad_steps=(1, 3, 4, 5, 6, 7))
    with pytest.raises(
        ModelError, match=r"5 steps in a row, up to step 7.*learning_rate below 0.01"
    ):
        Trainer(stage, config(), tmp_path).run()
    dump = json.loads((tmp_path / "diverged.json").read_text())
    assert dump["step"] == 7
    assert dump["items"] == stage.seen[-1]
    assert dump["skipped"] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(tmp_path, number, code):
    def send(step):
        if step == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        Trainer(Regression(on_step=send), config(), tmp_path / "cut").run()
    assert stopped.value.code == code
    assert signal.getsignal(number) is before
    assert CheckpointStore(tmp_path / "cut" / "checkpoints").load().step == 5
    Trainer(Regression(), config(), tmp_path / "cut", resume=True).run()
    Trainer(Regression(), config(), tmp_path / "whole").run()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    trainer = Trainer(Regression(), config(), tmp_path)
    original, calls = trainer.store.save, []

    def sometimes(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(trainer.store, "save", sometimes)
    assert trainer.run().step == 12
    assert calls == [3, 6, 9, 12]
    assert "checkpoint at step 6 not written" in caplog.text


def test_average_follows_its_recursion(tmp_path):
    stage = Regression()
    weights = []
    stage.on_step = lambda step: weights.append(stage.net[0].weight.detach().clone())
    trainer = Trainer(stage, config(ema_decay=0.8), tmp_path)
    trainer.run()
    weights.append(stage.net[0].weight.detach().clone())
    expected = weights[0]
    for count, weight in enumerate(weights[1:]):
        decay = min(0.8, 1 - (1 + count) ** -0.75) if count else 0.0
        expected = decay * expected + (1 - decay) * weight
    live = stage.net[0].weight.detach().clone()
    with trainer.averaged_weights() as module:
        torch.testing.assert_close(module[0].weight.detach(), expected)
        assert not torch.equal(module[0].weight, live)
    assert torch.equal(stage.net[0].weight, live)


def test_gradients_are_clipped(tmp_path):
    trainer = Trainer(Regression(), config(max_grad_norm=1e-3), tmp_path)
    _, _, norm = trainer._gradients(torch.arange(8))
    grads = torch.cat([p.grad.flatten() for p in trainer.module.parameters()])
    assert norm > 1e-2
    assert float(grads.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_global_random_state_is_given_back(tmp_path):
    trainer = Trainer(Regression(), config(num_steps=2), tmp_path)
    before = torch.get_rng_state()
    trainer.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluate_sees_averaged_weights_in_eval_mode(tmp_path):
    stage, calls = Regression(), []

    def evaluate(step):
        calls.append((step, stage.net.training, torch.is_grad_enabled()))
        return {"score": float(step)}

    Trainer(stage, config(evaluate_every=5), tmp_path, evaluate=evaluate).run()
    assert calls == [(5, False, False), (10, False, False), (12, False, False)]
    lines = [x for x in RunLog(tmp_path / "log.jsonl").read() if "eval_score" in x]
    assert lines == [{"step": s, "eval_score": float(s)} for s in (5, 10, 12)]


def test_bf16_runs_under_autocast(tmp_path):
    seen = []
    stage = Regression(on_step=lambda step: seen.append(torch.is_autocast_enabled("cpu")))
    Trainer(stage, config(num_steps=1, precision="bf16"), tmp_path / "bf16").run()
    Trainer(stage, config(num_steps=1, precision="fp32"), tmp_path / "fp32").run()
    assert seen == [True, False]


def test_probe_is_quick_and_its_choice_is_kept(tmp_path, monkeypatch):
    started = time.perf_counter()
    assert probe_precision(torch.device("cpu")) in ("fp32", "bf16")
    assert time.perf_counter() - started < 5
    loop = sys.modules[Trainer.__module__]
    monkeypatch.setattr(loop, "probe_precision", lambda device: "bf16")
    Trainer(Regression(), config(num_steps=3, precision="auto"), tmp_path).run()
    monkeypatch.setattr(loop, "probe_precision", lambda device: "fp32")
    resumed = Trainer(Regression(), config(num_steps=3, precision="auto"), tmp_path, resume=True)
    assert resumed.precision == "bf16"


def test_muon_moves_hidden_matrices_only():
    module = nn.ModuleDict({"hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    named = dict(module.named_parameters())
    assert [n for n, p in named.items() if is_hidden_matrix(n, p)] == ["hidden.weight"]
    muon, adamw = build_optimizers(module, kind="muon", learning_rate=0.1, weight_decay=0.0)
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(4, 4)]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 3


def test_an_existing_run_is_not_overwritten(tmp_path):
    Trainer(Regression(), config(num_steps=3), tmp_path).run()
    with pytest.raises(UsageError, match="already holds a run"):
        Trainer(Regression(), config(num_steps=3), tmp_path)


def test_resume_refuses_changed_arithmetic_only(tmp_path):
    Trainer(Regression(), config(num_steps=3), tmp_path).run()
    with pytest.raises(UsageError, match=r"batch_size is 4.*has 8"):
        Trainer(Regression(), config(num_steps=3, batch_size=4), tmp_path, resume=True)
    Trainer(Regression(), config(num_steps=3, log_every=1), tmp_path, resume=True)


def test_resume_refuses_another_model(tmp_path):
    Trainer(Regression(), config(num_steps=3), tmp_path).run()
    stage = Regression()
    stage.net.append(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="does not fit this model"):
        Trainer(stage, config(num_steps=3), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"batch_size": 9, "accumulation": 2}, "9.*accumulation 2"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"optimizer": "sgd"}, "'sgd'; allowed adamw, muon"),
        ({"precision": "fp16"}, "'fp16'; allowed auto"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_no_items_is_refused(tmp_path):
    stage = Regression()
    stage.num_items = 0
    with pytest.raises(UsageError, match="no training items"):
        Trainer(stage, config(), tmp_path)


def test_log_lines_are_json_and_torn_ones_are_dropped(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write(1, {"loss": math.nan, "lr": 0.5})
    log.write(2, {"loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert log.read() == [{"step": 1, "loss": None, "lr": 0.5}, {"step": 2, "loss": 1.0}]
    log.cut_after(1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 0.5}\n'


DRILL = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("drill", sys.argv[1])
drill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drill)
import pathlib, time
stage = drill.Regression(on_step=lambda step: time.sleep(float(sys.argv[3])))
settings = drill.config(num_steps=400, save_every=3, log_every=7)
drill.Trainer(stage, settings, pathlib.Path(sys.argv[2]), resume=True).run()
"""


TWO_PROCESSES = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("drill", sys.argv[1])
drill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drill)
stage = drill.Regression()
stage.net[2].p = 0.0
stage.loss = drill._without_noise(stage)
drill.Trainer(stage, drill.config(), pathlib.Path(sys.argv[2])).run()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    for folder, start in (("one", [sys.executable]), ("two", [*launcher, "--master-port=29571"])):
        command = [*start, str(script), __file__, str(tmp_path / folder)]
        subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    one, two = (CheckpointStore(tmp_path / name / "checkpoints").load() for name in ("one", "two"))
    assert one.step == two.step == 12
    for name, tensor in one.tensors["model"].items():
        # Two half-batch gradients are summed in another order than one whole one.
        torch.testing.assert_close(two.tensors["model"][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_kill_nine_at_any_time_ends_with_the_same_bits(tmp_path):
    script = tmp_path / "drill.py"
    script.write_text(textwrap.dedent(DRILL))

    def start(folder, pause):
        arguments = [sys.executable, str(script), __file__, str(tmp_path / folder), str(pause)]
        return subprocess.Popen(arguments)

    assert start("whole", 0).wait() == 0
    log, kills, delay = tmp_path / "cut" / "log.jsonl", 0, 0.0
    while kills < 10:
        before = log.stat().st_size if log.exists() else 0
        process = start("cut", 0.005)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            process.kill()
        process.wait()
        kills, delay = kills + 1, delay + 0.037  # other instants: in a step, in a save
    assert start("cut", 0).wait() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
