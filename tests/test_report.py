"""`python -m bench report` turns records into pages."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import inputs, report, speed, work
from docs import tables

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("report") / "record.json"
    options = ["--shape", "2,64,4", "--dtype", "fp32", "--peer", "log-step scan", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "bench", "speed", *options], check=True, cwd=ROOT, capture_output=True)
    record = json.loads(file.read_text())
    for figure in record["figures"]:
        figure["spread"] = 0.05  # a fixed value, because such short times are noisy
    file.write_text(json.dumps(record))
    return file


def test_one_record(file, capsys):
    assert report.main([str(file)]) == 0
    page = capsys.readouterr().out
    assert "backend cpu" in page
    assert (
        "allocator MALLOC_MMAP_THRESHOLD_=1099511627776 MALLOC_TOP_PAD_=0 MALLOC_TRIM_THRESHOLD_=1099511627776" in page
    )
    (row,) = [line for line in page.splitlines() if line.startswith("| 2, 64, 4")]
    figures = {(f["subject"], f["work"]): f for f in json.loads(file.read_text())["figures"]}
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    both = figures["bmru", work.BOTH]
    expected = ["2, 64, 4", "float32"]
    for name in (work.FORWARD, work.BACKWARD, work.BOTH):
        figure, default = figures["bmru", name], figures[f"bmru{work.DEFAULT_ALLOCATOR}", name]
        expected += [f"{figure['ms']:.3g} (5%)", f"{default['ms']:.3g} (5%)", f"{figure['floor_ratio']:.2f}"]
    module, part = figures["BMRU", work.BOTH]["ms"], figures[f"BMRU{work.PROJECTIONS}", work.BOTH]["ms"]
    expected += [f"{figures['log-step scan', work.BOTH]['ms'] / both['ms']:.3g}x"]
    expected += [f"{module:.3g} (5%)", f"{part / module:.0%}"]
    assert cells == expected


def test_two_records(file, tmp_path, capsys):
    record = json.loads(file.read_text())
    before, slower, faster = (tmp_path / f"{name}.json" for name in ("before", "slower", "faster"))
    before.write_text(json.dumps(record))
    for path, factor in ((slower, 1.2), (faster, 0.8)):
        changed = copy.deepcopy(record)
        changed["figures"][1]["ms"] *= factor
        path.write_text(json.dumps(changed))
    assert report.main([str(before), str(before)]) == 0
    assert not re.search(r"\| (slower|faster) \|", capsys.readouterr().out)
    assert report.main([str(before), str(slower)]) == 1
    assert capsys.readouterr().out.count("| slower |") == 1
    assert report.main([str(before), str(faster)]) == 0
    assert capsys.readouterr().out.count("| faster |") == 1


def test_a_noisy_figure_is_marked(file, tmp_path, capsys):
    """A ratio is marked where the spread of either figure is over the limit. It does not count as a change."""
    record = json.loads(file.read_text())
    for figure in record["figures"]:
        figure["spread"] = work.NOISY + 0.01 if figure["subject"] == "log-step scan" else work.NOISY
    noisy, slower = tmp_path / "noisy.json", tmp_path / "slower.json"
    noisy.write_text(json.dumps(record))
    report.main([str(noisy)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2, 64, 4")]
    assert re.findall(r"(\S+)\?", row) == [re.search(r"\S+x", row)[0]]
    for figure in record["figures"]:
        figure["ms"] *= 10 if figure["subject"] == "log-step scan" else 1
    slower.write_text(json.dumps(record))
    assert report.main([str(noisy), str(slower)]) == 0
    assert "| ? |" in capsys.readouterr().out


def test_ratios_to_a_noisy_figure_are_marked(capsys):
    """`bench speed` itself marks the ratios to a noisy torch.add, and those of peers to a noisy op."""
    call = inputs.case("bmru", torch.float32).build()
    noise = work.NOISY + 0.01
    add, op, peer = (work.ADD, work.FORWARD), ("bmru", work.FORWARD), ("log-step scan", work.FORWARD)

    def marked(*noisy: tuple[str, str]) -> list[str]:
        seconds = {key: (1.0, noise if key in noisy else 0.0) for key in (add, op, peer)}
        figures = speed._figures(call, seconds, {add: 1, op: 1}, {"log-step scan": "bmru"})
        return [line.split(" | ")[2] for line in speed.table(figures).splitlines() if "?" in line]

    assert marked() == []
    assert marked(add) == [work.ADD, "bmru"]
    assert marked(op) == ["bmru", "log-step scan"]
    assert marked(peer) == ["log-step scan"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_of_a_sweep(file, tmp_path, kind):
    record = json.loads(file.read_text())
    longer = [{**figure, "shape": [2, 256, 4], "ms": 3 * figure["ms"]} for figure in record["figures"]]
    sweep, image = tmp_path / "sweep.json", tmp_path / f"sweep.{kind}"
    sweep.write_text(json.dumps(record | {"figures": record["figures"] + longer}))
    assert report.main([str(sweep), "--plot", str(image)]) == 0
    assert image.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[kind])


def test_a_plot_needs_a_sweep(file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(file), "--plot", str(tmp_path / "image.png")])
    assert "expected a sweep of one of B, T and D, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("letter", "BTD")
def test_sizes_of_a_sweep(letter):
    i = "BTD".index(letter)
    assert [shape[i] for shape in speed.sweep((70, 70, 70), letter)] == [1, 4, 16, 64, 70]
    assert [shape[i] for shape in speed.sweep((16, 16, 16), letter)] == [1, 4, 16]
    assert speed.sweep((1, 1, 1), letter) == [(1, 1, 1)]
    assert all(shape[:i] + shape[i + 1 :] == (70, 70) for shape in speed.sweep((70, 70, 70), letter))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\x80", '{"machine": {}, "microseconds": {}, "figures": [{"subject": "bmru forward"}]}']
)
def test_an_invalid_record_is_refused(text, tmp_path, capsys):
    file = tmp_path / "record.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert "record.json: expected a record" in capsys.readouterr().err


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_what_their_records_say(page):
    """Each table between comments equals the output of the command in the first comment."""
    text = page.read_text()
    assert text == tables.filled(text)
    assert ("<!-- " in text) == (page.name in ("README.md", "performance.md"))


def test_the_readme_has_the_range_of_its_record():
    record = report.load(ROOT / "bench/results/intel-xeon-torch2.13.0.json")
    figures = [f for f in record["figures"] if f["work"] == work.BOTH]
    floors = [f["floor_ratio"] for f in figures if f["subject"] == "bmru"]
    gru = [f["slower"] for f in figures if f["subject"] == work.GRU]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"`bmru` takes {min(floors):.2f} to {max(floors):.2f} times as long" in readme
    assert f"`BMRU` is {min(gru):.3g} to {max(gru):.3g} times as fast as `nn.GRU`" in readme
    assert f"at commit {record['machine']['commit']}" in readme
