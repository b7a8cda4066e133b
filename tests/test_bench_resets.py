"""`python -m bench resets` on the CPU."""

from __future__ import annotations

from bench import inputs, resets


def test_the_table_has_a_ratio_for_every_share(capsys):
    assert resets.main(["--cell", *inputs.CELLS, "--shape", "2,40,3", "--dtype", "fp32"]) == 0
    header, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split()[-4:] == ["0%", "1%", "10%", "100%"]
    assert [row.split()[:3] for row in rows] == [[c, "fp32", p] for c in inputs.CELLS for p in ("forward", "backward")]
    assert all(float(x) > 0 for row in rows for x in row.split()[-4:])


def test_the_subjects_differ_in_the_mask_alone():
    call = inputs.case("bmru", inputs.DTYPES["fp32"], batch=2, time=40, channels=3).build()
    found = resets.subjects(call, None)
    results = {share: found["forward", share]()[0] for share in resets.SHARES}
    assert results[None].equal(results[0.0])
    assert not results[None].equal(results[1.0])
