"""`python -m bench softmax`: its forms compute the same, a wrong one is refused, and its tables."""

from __future__ import annotations

import pytest
import torch

from bench import softmax

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FORMS = {
    "mk.wkv": softmax.kernel,
    "public form": softmax.public,
    "on linear_recurrence": softmax.composed,
    "associative_scan": softmax.scanned,
}


def test_all_forms_compute_the_same():
    leaves = [t.double().requires_grad_() for t in softmax.inputs((2, 20, 3), CPU)]
    results = []
    for form in FORMS.values():
        y = form(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)
    softmax.check(FORMS, [t.detach().float().requires_grad_() for t in leaves])


def test_a_wrong_form_is_not_timed():
    def wrong(key, value, time_decay, bonus):
        return softmax.kernel(key, value, time_decay, 1.01 * bonus)

    leaves = [t.requires_grad_() for t in softmax.inputs((1, 9, 2), CPU)]
    with pytest.raises(RuntimeError, match=r"^wrong: expected a relative error of at most 0.0001 for y, got"):
        softmax.check({"wrong": wrong}, leaves)


def test_the_public_form_loses_digits_where_keys_are_large():
    (row,) = softmax.accuracy(FORMS, [1000], [-5], [200], CPU)[1:]
    found = dict(zip(FORMS, map(float, row[3:]), strict=True))
    assert found["mk.wkv"] < 1e-6 < 1e-4 < found["public form"]


def test_the_tables(capsys, monkeypatch):
    monkeypatch.setattr(softmax.timing.measure, "__defaults__", (0.0,))
    assert softmax.main(["--shape", "1,8,2", "--keys", "0", "3", "--time-decays", "-5", "--steps", "8"]) == 0
    times, _, _, errors, _ = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split("  ")[0] for line in times.splitlines()] == ["form", softmax.FLOOR, *FORMS]
    assert len(errors.splitlines()) == 3


def test_the_kernel_alone_at_several_shapes(capsys, monkeypatch):
    monkeypatch.setattr(softmax.timing.measure, "__defaults__", (0.0,))
    assert softmax.main(["--shape", "1,8,2", "2,4,3", "--alone", "--keys"]) == 0
    first, _, second, _, _ = capsys.readouterr().out.strip().split("\n\n")
    for table in (first, second):
        assert [line.split("  ")[0] for line in table.splitlines()] == ["form", softmax.FLOOR, "mk.wkv"]
