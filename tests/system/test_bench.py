"""bench/: the benchmarks that take no other library, in small."""

from conftest import ROOT, line_of, run_main

from bench import bm25_large, decode_ops, gpu


def counted(line: str) -> tuple[float, float]:
    """(operations, copies) of a line of bench.decode_ops."""
    numbers = line[22:].split()
    return float(numbers[0]), float(numbers[1])


def test_the_operations_of_a_step_grow_with_the_layers(monkeypatch, capsys):
    """25 a layer in bfloat16: a weight is not cast again, and the mask is ready."""
    totals = []
    for layers in (1, 3):
        flags = "--layers", layers, "--vocabulary", 300, "--rows", 3
        run_main(monkeypatch, decode_ops.main, "decode_ops", *flags)
        lines = capsys.readouterr().out.splitlines()
        totals.append({line[:22].strip(): counted(line) for line in lines[2:]})
    few, many = totals
    # Of every layer these are casts of what a product reads: q, k and v, the keys that
    # are kept, the queries, and the two of the middle.
    operations = many["bfloat16"][0] - few["bfloat16"][0]
    copies = many["bfloat16"][1] - few["bfloat16"][1]
    assert (operations / 2, copies / 2) == (25, 7)
    assert many["float32"][1] == few["float32"][1]


def test_bm25_grows(monkeypatch, capsys):
    run_main(
        monkeypatch, bm25_large.main, "bm25_large", "--sizes", 300, 600, "--count", 5
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["300", "600"]
    assert all(float(number) > 0 for line in lines[3:] for number in line.split())


def test_a_part_of_the_quarter_of_an_hour_may_fail_or_take_too_long(tmp_path, capsys):
    parts = [
        gpu.Part("good", 20, ["-c", "print(1); print('as it should')"]),
        gpu.Part("bad", 20, ["-c", "raise SystemExit('no card')"]),
        gpu.Part("long", 1, ["-c", "import time; print('begun'); time.sleep(60)"]),
    ]
    for part in parts:
        gpu.run_part(part, tmp_path)
    good, bad, slow = capsys.readouterr().out.splitlines()
    assert good.endswith("ended: as it should") and bad.endswith("failed (1): no card")
    assert slow.endswith("stopped at its limit: begun")
    assert (tmp_path / "good.txt").read_text(encoding="utf-8").startswith("1\n")


def test_the_quarter_of_an_hour_in_small(tmp_path, monkeypatch, capsys):
    """Three of its parts; all of them take two minutes."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "gpu"
    flags = "--small", "--out", out, "--parts", "step", "start", "train"
    run_main(monkeypatch, gpu.main, "gpu", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[:3]] == ["ended:"] * 3
    stages = [line.split()[0] for line in lines[3:]]
    assert stages == ["base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2"]
    run_main(monkeypatch, gpu.main, "gpu", *flags, status=2)
    assert "is already there" in line_of(capsys)
