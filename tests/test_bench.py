"""The command as a user runs it."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_losses.bench import cli, filter_shares, measure, plot, report
from fused_losses.bench import cross_entropy as case
from fused_losses.bench.peers import Peer
from fused_losses.bench.problem import Contender, Problem
from fused_losses.bench.shapes import Shape

SMALL = ["--vocab", "50", "--hidden", "8", "--tokens", "6", "--device", "cpu", "--inputs", "peaked", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr("fused_losses.bench.timing.LEAST_ROUNDS", 2)


def bench(name, *arguments, peers="none"):
    return cli.main(["bench", name, *SMALL, *arguments, "--peers", peers])


@pytest.mark.parametrize("name", cli.CASES)
def test_every_case_is_checked_and_kept(name, tmp_path, capsys):
    file = tmp_path / "new folder" / "result.json"
    modes = ["forward", "full"] if name == "cross_entropy" else ["full"]
    # On 6 tokens one correct result in ten is twice as far from float64 as eager PyTorch's.
    assert bench(name, "--tokens", "192", "--json", str(file), "--mode", ",".join(modes)) == 0
    result = json.loads(file.read_text())
    assert result["complete"]
    assert {"command", "commit", "device", "versions", "python"} <= set(result)
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    assert {row["mode"] for row in rows} == set(modes)
    assert {"eager", "fused_losses"} <= {row["contender"] for row in rows}
    for row in rows:
        assert row["peak_bytes"] > 0
        assert 0 < row["to_eager"]["low"] <= row["to_eager"]["median"] <= row["to_eager"]["high"]
        assert row["of_floor"] > 0
        assert "ms" not in json.dumps(row), "a CPU has no times, only ratios"
        assert "loss" in row["errors"] or "result 0" in row["errors"]
        assert ("d_weight" in row["errors"] or "d_logits" in row["errors"]) == (row["mode"] == "full")
    printed = capsys.readouterr().out
    assert f"{name}: 50x8" in printed
    assert " ms" not in printed


def test_the_case_alone_is_short_for_bench(capsys):
    assert cli.main(["cross_entropy", *SMALL, "--peers", "none", "--mode", "memory"]) == 0
    assert "fused_losses in place" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "cross_entropy", "--shape", "gpt9"], "unknown shape 'gpt9'; choose from A, B, C"),
        (["bench", "cross_entropy", "--vocab", "5"], "belong together"),
        (["bench", "cross_entropy", "--dtype", "int8"], "unknown --dtype 'int8'"),
        (["bench", "cross_entropy", "--mode", "backwards"], "unknown --mode"),
        (["bench", "cross_entropy", "--peers", "ligre"], "unknown --peers 'ligre'"),
        (["bench", "cross_entropy", "--tokens", "many"], "whole numbers"),
        (["bench", "cross_entropy", "--resume"], "--resume needs --json"),
        (["plan", "--shape", "B", "--budget", "lots"], "--budget takes a size such as 4GiB, 4GB or 512MiB, got 'lots'"),
        (["plan", "--shape", "B", "--budget", "4G"], "--budget takes a size such as 4GiB"),
        (["report", "/nowhere"], "/nowhere"),
        (["bench", "cross_entropy", "--seconds", "-1"], "--seconds takes a number, 0 or more, got -1"),
        (["bench", "cross_entropy", "--seconds", "nan"], "--seconds takes a number, 0 or more, got nan"),
        (["compare", "a.json", "b.json", "--threshold", "-1"], "--threshold takes a number, 0 or more, got -1"),
        (["compare", str(Path(__file__).parent), "b.json"], "compare takes two files of results"),
        (["compare", __file__, str(Path(__file__).parent)], "compare takes two files of results"),
    ],
)
def test_a_wrong_argument_says_what_to_do(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["bench"], ["bench", "cross_enthropy"], ["bench", "cross_entropy", "--fast"]]
)
def test_a_wrong_flag_prints_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_asking_for_one_is_an_error(capsys):
    assert cli.main(["bench", "cross_entropy", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    def absent():
        raise ModuleNotFoundError("No module named 'absent'")

    def broken():
        def call(x):
            raise RuntimeError("needs sm_90")

        return call

    peers = (cli.PEERS["cross_entropy"][0], Peer("absent", absent, gpu=False), Peer("broken", broken, gpu=False))
    monkeypatch.setitem(cli.PEERS, "cross_entropy", peers)
    file = tmp_path / "r.json"
    assert bench("cross_entropy", "--json", str(file), "--mode", "full", peers="liger_kernel,absent,broken") == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert (rows["liger_kernel"]["status"], rows["liger_kernel"]["reason"]) == ("skipped", "runs on a GPU only")
    assert rows["absent"]["status"] == "skipped"
    assert "No module named 'absent'" in rows["absent"]["reason"]
    assert rows["broken"]["status"] == "error"
    assert "needs sm_90" in rows["broken"]["reason"]
    printed = capsys.readouterr().out
    assert "liger_kernel: skipped, runs on a GPU only" in printed
    assert "broken: error, RuntimeError: needs sm_90" in printed
    assert rows["fused_losses"]["status"] == "ok"


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda loss, x: loss * 1.001, "loss"),
        (lambda loss, x: loss + 1e-3 * (x["logits"] - x["logits"].detach()).sum(), "d_logits"),  # the value stays right
    ],
)
def test_a_wrong_result_is_red_not_timed_and_fails(break_it, named, tmp_path, capsys, monkeypatch):
    wrong = Contender("fused_losses", lambda x: break_it(case.eager(x), x))
    monkeypatch.setattr(case, "OURS", (wrong,))
    file = tmp_path / "r.json"
    assert bench("cross_entropy", "--json", str(file), "--mode", "full") == 1
    eager, ours = json.loads(file.read_text())["rows"]
    assert eager["status"] == "ok"
    assert ours["status"] == "failed"
    assert ours["reason"].startswith(named)
    assert "to_eager" not in ours
    assert "peak_bytes" not in ours
    assert cli.is_red(ours)
    assert "FAILED" in capsys.readouterr().out


def test_a_loss_is_judged_among_others_where_eager_is_exact_by_luck():
    exact = torch.linspace(1, 2, 5, dtype=torch.float64)
    ours, eager = (exact * (1 + 3e-7)).float(), (exact * (1 - 3e-7)).float()
    eager[0] = exact[0]

    strict = Contender("fused_losses", lambda x: x)
    near = Contender("fused_losses filter", lambda x: x, exact=False)

    def status(found, draws, contender=strict):
        of = [{"loss": t[0]} for t in found]
        return measure.judged(*(measure.pooled(f, list(t[1:draws])) for f, t in zip(of, found, strict=True)), contender)

    assert status((ours, eager, exact), 1)["status"] == "failed"
    assert status((ours, eager, exact), 5)["status"] == "ok"
    assert status((ours + 1e-5, eager, exact), 5)["status"] == "failed"
    assert status((ours + 1e-5, eager, exact), 5, near)["status"] == "inaccurate"
    assert status((ours + 1, eager, exact), 5, near)["status"] == "failed"


def test_an_inaccurate_peer_is_named_and_timed_but_a_wrong_one_is_red_and_not(tmp_path, monkeypatch, capsys):
    peers = tuple(
        Peer(name, lambda f=factor: lambda x: f * case.eager(x), gpu=False)
        for name, factor in (("rounds", 1.0001), ("wrong", 1.1), ("empty", float("nan")))
    )
    monkeypatch.setitem(cli.PEERS, "cross_entropy", peers)
    file = tmp_path / "r.json"
    assert bench("cross_entropy", "--json", str(file), "--mode", "full", peers="rounds,wrong,empty") == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert {name: rows[name]["status"] for name in ("rounds", "wrong", "empty")} == {
        "rounds": "inaccurate",
        "wrong": "failed",
        "empty": "failed",
    }
    assert [name for name, row in rows.items() if "to_eager" not in row] == ["wrong", "empty"]
    assert [name for name, row in rows.items() if cli.is_red(row)] == ["wrong", "empty"]
    assert "INACCURATE" in capsys.readouterr().out


def test_out_of_memory_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def too_large(x):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(case, "OURS", (Contender("fused_losses large", too_large), *case.OURS))
    file = tmp_path / "r.json"
    assert bench("cross_entropy", "--json", str(file), "--mode", "full") == 0
    rows = {row["contender"]: row["status"] for row in json.loads(file.read_text())["rows"]}
    assert rows == {
        "eager": "ok",
        "fused_losses large": "oom",
        "fused_losses": "ok",
        "fused_losses in place": "ok",
    }


def test_a_cpu_out_of_memory_is_out_of_memory(tmp_path, monkeypatch):
    large = Contender("fused_losses large", lambda x: torch.empty(2**50))
    monkeypatch.setattr(case, "OURS", (large, *case.OURS))
    file = tmp_path / "r.json"
    arguments = ["--json", str(file), "--mode", "full", "--tokens", f"{2**45},6"]
    assert bench("cross_entropy", *arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["contender"], row["status"]) for row in rows] == [
        (2**45, "all", "oom"),
        (6, "eager", "ok"),
        (6, "fused_losses large", "oom"),
        (6, "fused_losses", "ok"),
        (6, "fused_losses in place", "ok"),
    ]


def test_where_eager_does_not_fit_fewer_rows_are_checked(tmp_path, monkeypatch):
    def eager(x):
        if len(x["logits"]) > 3:
            raise torch.OutOfMemoryError
        return torch.nn.functional.cross_entropy(x["logits"], x["target"])

    monkeypatch.setattr(case, "eager", eager)
    file = tmp_path / "r.json"
    assert bench("cross_entropy", "--json", str(file), "--mode", "full") == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["eager"]["status"] == "oom"
    assert rows["fused_losses"]["status"] == "ok"
    assert rows["fused_losses"]["rows_checked"] == [3, 6]


@pytest.mark.parametrize("skipped", [[], ["liger_kernel"]])
@pytest.mark.parametrize("calls", [2, 13])
def test_an_interrupted_run_keeps_its_rows_and_resumes(calls, skipped, tmp_path, monkeypatch, capsys):
    """Interrupted while it checks and while it times; a skipped peer has rows too."""
    count = 0

    def interrupt(x):
        nonlocal count
        count += x["logits"].shape[0] == 7
        if count == calls:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(x["logits"], x["target"])

    monkeypatch.setattr(case, "OURS", (Contender("fused_losses", interrupt),))
    file = tmp_path / "r.json"
    arguments = ["cross_entropy", "--mode", "full", "--tokens", "6,7", "--json", str(file), "--resume"]
    command = [
        "bench",
        *arguments,
        *[a for a in SMALL if a not in ("--tokens", "6")],
        "--peers",
        *(skipped or ["none"]),
    ]
    assert cli.main(command) == 130
    assert "interrupted" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert not result["complete"]
    assert [row["status"] for row in result["rows"] if row["tokens"] == 6] == [
        "ok",
        "ok",
        *("skipped" for _ in skipped),
    ]
    eager, ours, *_ = [row for row in result["rows"] if row["tokens"] == 7]
    assert (eager["status"], ours["status"]) == ("ok", "ok" if calls == 13 else "interrupted")
    assert ours.get("rounds") == (1 if calls == 13 else None)
    count = 100
    assert cli.main(command) == 0
    result = json.loads(file.read_text())
    assert result["complete"]
    assert sorted((row["tokens"], row["contender"], row["status"]) for row in result["rows"]) == [
        (6, "eager", "ok"),
        (6, "fused_losses", "ok"),
        *((6, peer, "skipped") for peer in skipped),
        (7, "eager", "ok"),
        (7, "fused_losses", "ok"),
        *((7, peer, "skipped") for peer in skipped),
    ]


@pytest.mark.parametrize("where", ["the import of a peer", "another command"])
def test_an_interrupt_leaves_no_traceback(where, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if where == "another command":
        monkeypatch.setattr(cli, "plan", interrupt)
        assert cli.main(["plan", "--shape", "A"]) == 130
    else:
        monkeypatch.setitem(cli.PEERS, "cross_entropy", (Peer("slow", interrupt, gpu=False),))
        assert bench("cross_entropy", "--json", str(tmp_path / "r.json"), peers="slow") == 130
        assert not json.loads((tmp_path / "r.json").read_text())["complete"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals")
@pytest.mark.parametrize("rich", [True, False])
def test_in_a_terminal_a_bar_moves_and_a_pipe_gets_the_table(rich):
    """The bar goes to stderr, which is a terminal; the tables go to stdout, which is a pipe."""
    import pty

    hide = "" if rich else "sys.modules['rich'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "" if rich else "u.find_spec = lambda name, *a: None if name == 'rich' else f(name, *a); "
    code = f"import sys; {hide}from fused_losses.bench import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "bench", "cross_entropy", *SMALL, "--mode", "memory", "--peers", "none"]
    ours, theirs = pty.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=Path(__file__).parent.parent)
    os.close(theirs)
    shown = b""
    while chunk := read(ours):
        shown += chunk
    assert done.returncode == 0, shown
    assert "fused_losses in place" in done.stdout
    assert "\x1b" not in done.stdout
    assert (b"100%" if rich else b"[0/1] cross_entropy: 50x8") in shown
    assert b"fused_losses in place  memory" not in shown


def read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux reports the end of a terminal
        return b""


def test_float64_reference_by_parts_is_the_whole():
    problem = cli.Problem(cli.Shape("small", 40, 8), 12, torch.float32, "peaked", "cpu")
    for name in ("linear_cross_entropy", "token_statistics", "divergence"):
        module = importlib.import_module(f"fused_losses.bench.{name}")
        x = module.inputs(problem)
        with pytest.MonkeyPatch.context() as patch:
            whole = measure.exact_results(module, x, 12, 40)
            patch.setattr(measure, "EXACT_ELEMENTS", 5 * 40)
            parts = measure.exact_results(module, x, 12, 40)
        for result in whole:
            torch.testing.assert_close(parts[result], whole[result])
            assert whole[result].dtype == torch.float64


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "linear.json"
    arguments = ["bench", "linear_cross_entropy", *SMALL, "--tokens", "6,12", "--mode", "full", "--peers", "none"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    return file.read_text()


@pytest.fixture
def results(tmp_path, measured):
    file = tmp_path / "results" / "linear.json"
    file.parent.mkdir()
    file.write_text(measured)
    return file


def test_report_renders_tables_pictures_and_the_readme(results, capsys):
    readme = results.parent / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nstale\n{report.END}\nbelow\n")
    assert cli.main(["report", str(results.parent), "--into", str(readme)]) == 0
    text = (results.parent / "report.md").read_text()
    result = json.loads(results.read_text())
    peak = next(row for row in result["rows"] if row["contender"] == "fused_losses")["peak_bytes"]
    assert f"{peak / 2**20:.1f}" in text
    assert result["command"] in text
    assert report.WAITING in text
    for picture in capsys.readouterr().out.split():
        assert (results.parent / picture).stat().st_size > 500
    assert (results.parent / "memory-cpu-linear_cross_entropy-50x8-float32.png").exists()
    into = readme.read_text()
    assert into.startswith("above\n")
    assert into.endswith("below\n")
    assert "stale" not in into
    assert "linear_cross_entropy, 50x8, 12 tokens" in into


def test_report_needs_no_matplotlib(results, monkeypatch, capsys):
    monkeypatch.setattr("fused_losses.bench.plot.MATPLOTLIB", False)
    assert cli.main(["report", str(results)]) == 0
    assert "matplotlib" in capsys.readouterr().err
    assert (results.parent / "report.md").exists()


@pytest.mark.parametrize("mode", ["full", "forward"])
def test_plot_draws_or_says_why_not(mode, tmp_path, capsys):
    picture = tmp_path / "p.png"
    assert bench("cross_entropy", "--inputs", "random", "--mode", mode, "--plot", str(picture)) == 0
    printed = capsys.readouterr()
    assert picture.exists() == (mode == "full")
    assert str(picture) in printed.out if mode == "full" else "--mode full" in printed.err


def test_each_problem_has_a_picture_of_its_own(results):
    rows = json.loads(results.read_text())["rows"]
    rows += [row | {"dtype": "bfloat16"} for row in rows]
    pictures = plot.frontier(rows, results.with_name("frontier.png"))
    assert [picture.name for picture in pictures] == [
        f"frontier-linear_cross_entropy-50x8-{tokens}-{dtype}.png"
        for dtype in ("float32", "bfloat16")
        for tokens in (6, 12)
    ]


def test_the_readme_is_what_report_renders(tmp_path):
    root = Path(__file__).parent.parent
    before = (root / "README.md").read_text()
    shutil.copytree(root / "bench/results", tmp_path / "bench/results", ignore=shutil.ignore_patterns("*.png"))
    readme = tmp_path / "README.md"
    readme.write_text(before)
    written = report.report([tmp_path / "bench/results"], None, readme)
    assert readme.read_text() == before, "make report"
    for file in written:
        committed = root / file.relative_to(tmp_path)
        assert committed.exists(), "make report"
        assert file.suffix != ".md" or committed.read_text() == file.read_text(), "make report"
    pictures = {file.name for file in (root / "bench/results").glob("**/*.png")}
    assert pictures == {file.name for file in written if file.suffix == ".png"}


def on_gpu(case, shape, contender, mode="full", ms=10.0, **more):
    row = {"case": case, "shape": shape, "vocab": 5, "hidden": 5, "tokens": 5, "dtype": "bfloat16", "inputs": "peaked"}
    row |= {"mode": mode, "contender": contender, "status": "ok", "peak_bytes": 100, "of_floor": 0.95}
    return row | {"ms": {"median": ms, "low": ms, "high": ms}, "tflops": 1.0, "gbps": 1.0} | more


def test_goals_are_judged_by_what_was_measured():
    linear = [on_gpu("linear_cross_entropy", "gemma2-2b", name) for name in ("fused_losses", "eager")]
    rows = [
        on_gpu("cross_entropy", "llama3-8b", "fused_losses", of_floor=0.93),
        on_gpu("cross_entropy", "gemma2-2b", "fused_losses", of_floor=0.91),
        on_gpu("token_statistics", "llama3-8b", "fused_losses", parts={"backward": {"of_floor": 0.62}}),
        *linear,
        on_gpu("linear_cross_entropy", "gemma2-2b", "quack", peak_bytes=101),
        on_gpu("linear_cross_entropy", "gemma2-2b", "liger_kernel", ms=10.1),
        on_gpu("linear_cross_entropy", "llama3-8b", "fused_losses"),
        on_gpu("linear_cross_entropy", "llama3-8b", "quack", ms=11),
    ]
    lines = report.goals([{"device": "G", "clocks": "", "rows": rows}]).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[2:] for line in lines}
    waiting = report.WAITING
    assert found["cross entropy of logits, of 6NV bytes copied"] == ["0.93", "0.91 missed", waiting]
    assert found["recompute: backward, of 6NVH"] == ["0.93", waiting, waiting]
    assert found["divergence, of 8NVH"] == [waiting] * 3
    assert found["peers at or below a point of ours, head's cross entropy"] == ["none", "eager", waiting]
    assert waiting in report.goals([{"device": "C", "rows": []}])


def test_compare_refuses_two_devices(results, capsys):
    other = results.with_name("other.json")
    other.write_text(json.dumps(json.loads(results.read_text()) | {"device": "another"}))
    assert cli.main(["compare", str(results), str(other)]) == 2
    assert "not comparable" in capsys.readouterr().err


def test_compare_finds_what_became_slower_larger_or_wrong(results, capsys):
    result = json.loads(results.read_text())
    worse = results.with_name("worse.json")

    def compared(change):
        copy = json.loads(results.read_text())
        change(next(row for row in copy["rows"] if row["contender"] == "fused_losses"))
        worse.write_text(json.dumps(copy))
        status = cli.main(["compare", str(results), str(worse), "--threshold", "0.1"])
        return status, capsys.readouterr().out

    assert cli.main(["compare", str(results), str(results)]) == 0
    assert f"0 of {len(result['rows'])} missing, broken or worse" in capsys.readouterr().out
    assert compared(lambda row: row.update(peak_bytes=int(row["peak_bytes"] * 1.05)))[0] == 0
    for change in (
        lambda row: row.update(peak_bytes=int(row["peak_bytes"] * 1.2)),
        lambda row: row["to_eager"].update(median=row["to_eager"]["median"] * 1.2),
        lambda row: row.update(status="failed"),
    ):
        status, printed = compared(change)
        assert status == 1
        assert f"1 of {len(result['rows'])} missing, broken or worse" in printed


def test_compare_lists_what_is_missing(results, capsys):
    result, fewer = json.loads(results.read_text()), results.with_name("fewer.json")
    fewer.write_text(json.dumps(result | {"rows": [r for r in result["rows"] if r["contender"] != "fused_losses"]}))
    assert cli.main(["compare", str(results), str(fewer)]) == 1
    *rows, total = [line for line in capsys.readouterr().out.splitlines() if "missing" in line]
    assert len(rows) == sum(row["contender"] == "fused_losses" for row in result["rows"]) > 0
    assert total.startswith(f"{len(rows)} of {len(result['rows'])} missing")
    assert cli.main(["compare", str(fewer), str(results)]) == 0
    fewer.write_text(json.dumps(result | {"rows": []}))
    assert cli.main(["compare", str(results), str(fewer)]) == 2
    assert "no rows in common" in capsys.readouterr().err


def test_plan_prints_the_route_and_the_largest_batch(capsys):
    rates = ["--tflops", "500", "--gbps", "2000"]
    arguments = ["plan", "--shape", "llama3-8b", "--tokens", "8192", "--budget", "4GiB", *rates]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "gradients_in_forward" in printed
    products = 6 * 8192 * 128256 * 4096 / 500e9
    passes = 4 * 8192 * 128256 / 2e9  # in one chunk: the logits are read and written
    assert [line.split()[1] for line in printed.splitlines() if " ms " in line] == [
        f"{ms:.1f}" for ms in (products + passes, products, passes)
    ]
    most = int(printed.split("largest batch")[1].split()[0])
    shape, budget = cli.shapes.find("llama3-8b"), 4 * 2**30

    def peak(tokens):
        free = budget - cli.gradient_bytes(shape, tokens, torch.bfloat16)
        return cli.plan(tokens, shape.vocab, shape.hidden, torch.bfloat16, workspace=free).peak

    assert peak(most) <= budget < peak(most + 1)
    assert cli.main([*arguments, "--budget", "1MiB"]) == 0
    assert "largest batch         no tokens in 0.00 GiB" in capsys.readouterr().out
    assert (
        cli.main(["plan", "--shape", "gpt2", "--tokens", "4096", "--dtype", "float32", "--backend", "torch", *rates])
        == 0
    )
    chunked = cli.plan(4096, 50257, 768, torch.float32, backend="torch")
    printed = capsys.readouterr().out
    assert f"{chunked.peak / 2**20:.1f} MiB above the inputs" in printed
    assert chunked.peak != cli.plan(4096, 50257, 768, torch.float32).peak


def test_plan_predicts_a_time_without_being_told_rates(capsys, monkeypatch):
    assert cli.main(["plan", "--shape", "C"]) == 0
    if not torch.cuda.is_available():
        assert "ms predicted on an H200" in capsys.readouterr().out
    problem = cli.Problem(cli.Shape("small", 64, 16), 32, torch.float32, "random", "cpu")
    assert min(measure.measured_rates(problem)) > 0


def test_check_prints_a_table_and_what_to_report(capsys, monkeypatch):
    from fused_losses.bench import check

    found = [c for c in check.checks() if c.primitive == "cross_entropy" and "(3, 17)" in c.name]
    monkeypatch.setattr(check, "checks", lambda: iter(found))
    assert cli.main(["check", "--backend", "torch"]) == 0
    assert f"{3 * len(found)} checks, 0 failed" in capsys.readouterr().out
    broken = found[0]._replace(ours=lambda x: 1.1 * found[0].ours(x))
    monkeypatch.setattr(check, "checks", lambda: iter([broken, found[1]]))
    assert cli.main(["check", "--backend", "torch"]) == 1
    printed = capsys.readouterr().out
    assert "6 checks, 3 failed" in printed
    assert "Please report" in printed
    errors = [line.split()[-3:-1] for line in printed.splitlines() if line.endswith("FAILED")]
    assert len(errors) == 3
    assert all(float(ours) > 0.09 > 10 * float(plain) for ours, plain in errors)
    assert "allowed" in printed


def test_check_pools_draws_where_plain_pytorch_is_exact_by_luck():
    from fused_losses.bench import check

    (one,) = (c for c in check.checks() if c.name == "logits (37, 129)")
    assert check.verdict(one, torch.float32, "cpu", "torch")[-1] == ""  # from one draw d_logits would fail

    def wrong(x):
        return tuple(t * (1 + 1e-6) for t in one.ours(x))

    assert "log_probs" in check.verdict(one._replace(ours=wrong), torch.float32, "cpu", "torch")[-1]


def test_check_of_many_logits_looks_at_both_ends(monkeypatch):
    from fused_losses.bench import check

    assert check.large_check("cpu", "torch", N=40, V=60) == ""

    def wraps(logits, target, reduction):
        loss = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        return torch.cat([loss[:-1], loss[:1]])

    monkeypatch.setattr(check, "cross_entropy", wraps)
    assert "d_logits" in check.large_check("cpu", "torch", N=40, V=60)


def evidence(results, *steps, **variables):
    script = Path(__file__).parent.parent / "bench" / "gpu_evidence.sh"
    environment = {**os.environ, "PY": sys.executable, "RESULTS": str(results), **variables}
    return subprocess.run([script, *steps], env=environment, capture_output=True, text=True)


def test_the_evidence_script_says_what_is_not_measured_yet(tmp_path):
    before = evidence(tmp_path, "list").stdout.splitlines()
    assert len(before) > 10
    assert all(line.endswith(": not measured yet") for line in before)
    (tmp_path / "dpo.json").write_text('{\n "complete": true\n}')
    (tmp_path / "grpo.json").write_text('{\n "complete": false\n}')
    (tmp_path / "check-divergence.txt").write_text("")
    done = [line for line in evidence(tmp_path, "list").stdout.splitlines() if line.endswith(": done")]
    assert done == ["check-divergence: done", "dpo: done"]
    unknown = evidence(tmp_path, "chekc")
    assert unknown.returncode == 1
    assert "no step chekc" in unknown.stderr


def test_the_evidence_script_does_not_run_tests_again_that_ran_to_their_end(tmp_path):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_it(): pass\n")
    bad.write_text("def test_it(): assert False\n")
    results = tmp_path / "results"
    assert evidence(results, "tests", TESTS=f"{bad} {good}", FILES="1").returncode == 1
    outcomes = (results / "tests.txt").read_text().splitlines()
    assert [(line.split()[:3], line.split()[-1]) for line in outcomes] == [
        (["test_bad:", "1", "failed"], "1"),
        (["test_good:", "1", "passed"], "0"),
    ]
    bad.write_text("")  # a test file that ran to its end is not run again
    again = evidence(results, "tests", TESTS=f"{bad} {good}", FILES="1")
    assert again.returncode == 1
    assert "1 passed" in again.stdout
    assert "== tests" in again.stdout


def test_the_evidence_script_runs_several_files_of_tests_at_a_time(tmp_path):
    files = [tmp_path / f"test_{i}.py" for i in range(3)]
    for file in files:
        file.write_text("def test_it(): pass\n")
    two = {"TESTS": f"{tmp_path}/test_*.py", "FILES": "2", "PYTEST_ADDOPTS": "--maxprocesses=2"}
    assert evidence(tmp_path, "tests", **two).returncode == 0
    outcomes = (tmp_path / "tests.txt").read_text().splitlines()
    assert [line.split()[:3] for line in outcomes] == [["test_0:", "2", "passed"], ["test_2:", "1", "passed"]]


def test_peaked_inputs_are_like_a_trained_models():
    """Most targets are likely, some are not: the mean loss is a few nats, where random inputs give log V."""
    problem = cli.Problem(cli.Shape("small", 5000, 64), 256, torch.float32, "peaked", "cpu")
    for name in ("cross_entropy", "linear_cross_entropy"):
        module = importlib.import_module(f"fused_losses.bench.{name}")
        x = module.inputs(problem)
        assert 0.5 < module.eager(x) < 4
        x = module.inputs(dataclasses.replace(problem, distribution="random"))
        assert 8 < module.eager(x) < 11


def test_filter_shares(capsys):
    problem = Problem(Shape("small", 4096, 64), 256, torch.float32, "zipf", "cpu")
    shares = [filter_shares.share(problem, 2.0**-power)[1] for power in (6, 10, 14)]
    assert 0 < shares[0] < shares[1] < shares[2] <= 1
    assert filter_shares.share(problem, 2**-40) == (256, 1.0)
    filter_shares.main(["stories15m:256:float32", "--filter", "1e-3"])
    *_, (name, chunk, share) = [
        row.strip("|").split("|") for row in capsys.readouterr().out.split("\n") if "stories" in row
    ]
    assert (name.strip(), int(chunk)) == ("stories15m", 256)
    assert 0 < float(share) < 0.5
