"""Each example, made small: it writes its table and plot, and what it counts is right."""

from __future__ import annotations

import math
import random

import pytest
import torch

import mru_kernels as mk
from examples import charlm, common, copy_first, digits, first_steps, online_gradients, recall, vowels

SMALL = ["--seeds", "1", "--workers", "1"]


def page(folder, name: str) -> list[str]:
    """Lines of the table that the example wrote together with a plot."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return (folder / f"{name}.md").read_text().splitlines()


def percent(line: str) -> list[float]:
    """The numbers of a row, of one seed each."""
    return [float(cell) for cell in line.strip("| ").split(" | ")[1:]]


# ------------------------------------------------------------------------------------------------ common


def test_training_lowers_the_loss_and_takes_epsilon_from_1_to_0_by_half_of_the_steps():
    torch.manual_seed(0)
    model = mk.MRUNetwork(3, 1, width=4, num_blocks=1, units=("cmru", "min_gru"))
    x, losses, seen = torch.randn(20, 5, 3), [], []

    def loss():
        seen.append(model.epsilon)
        return (model(x)[0] - x.sum(2, keepdim=True)).square().mean()

    common.train(
        model, loss, steps=60, learning_rate=0.03, epsilon=common.epsilon_schedule(model, 60), after=losses.append
    )
    assert seen == pytest.approx([max(0.0, 1.0 - step / 30) for step in range(60)])
    assert seen[30:] == [0.0] * 30
    assert len(losses) == 60
    assert losses[-1] < 0.3 * losses[0]


def test_table_and_spread():
    assert common.spread([0.5]) == "50.0"
    assert common.spread([0.5, 0.7]) == "60.0 ± 14.1"
    assert common.table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def _double(name: str, seed: int, arguments: object) -> str:
    return f"{name}{seed}"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.check)])
def test_runs_come_back_in_order(workers):
    arguments = common.parser("Doc.", steps=1).parse_args(["--seeds", "2", "--workers", str(workers)])
    results = common.run_all(_double, ["b", "a"], arguments)
    assert list(results.items()) == [("b", ["b0", "b1"]), ("a", ["a0", "a1"])]


# ------------------------------------------------------------------------------------------------ copy_first


@pytest.mark.parametrize(("symbols", "signal"), [(2, 1.0), (4, 2.0), (8, 0.5)])
def test_bayes_limit_is_what_the_bayes_rule_reaches(symbols, signal):
    draws = 400_000
    values = torch.randn(draws, symbols, generator=torch.Generator().manual_seed(0))
    values[:, 0] += signal
    rate = (values.argmax(1) == 0).double().mean().item()
    limit = copy_first.bayes_limit(symbols, signal)
    assert abs(limit - rate) < 5 * math.sqrt(limit * (1 - limit) / draws)
    if symbols == 2:  # has a closed form
        assert limit == pytest.approx(0.5 * (1 + math.erf(signal / 2)), abs=1e-9)


@pytest.mark.parametrize("name", copy_first.UNITS)
def test_chunks_give_what_one_pass_does(name):
    torch.manual_seed(0)
    model = copy_first.Model(name).double()
    x = torch.randn(3, 50, copy_first.SYMBOLS + 1, dtype=torch.float64)
    whole, _ = model(x)
    _, states = model(x[:, :20])
    after, _ = model(x[:, 20:], states)
    torch.testing.assert_close(after, whole, rtol=1e-10, atol=1e-10)


def test_copy_first_learns_a_short_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_first, "TRAIN_LENGTH", 4)
    options = ["--steps", "150", "--units", "BMRU", "--lengths", "4", "40", "--sequences", "500"]
    copy_first.main([*SMALL, *options, "--out", str(tmp_path)])
    _, _, unit, bayes, *_ = page(tmp_path, "copy_first")
    right, limit = percent(unit), percent(bayes)
    for value in limit:
        assert value == pytest.approx(100 * copy_first.bayes_limit(4, 2.0), abs=9)
    assert right[0] > 50  # chance is 25
    assert all(r <= b + 8 for r, b in zip(right, limit, strict=True))


@pytest.mark.parametrize("name", copy_first.UNITS)
def test_copy_first_runs_every_unit(name, tmp_path):
    options = ["--steps", "2", "--units", name, "--lengths", "10", "--sequences", "8", "--out", str(tmp_path)]
    copy_first.main([*SMALL, *options])
    assert page(tmp_path, "copy_first")[2].startswith(f"| {name} |")


# ------------------------------------------------------------------------------------------------ first_steps


def test_the_first_symbol_is_the_one_that_is_marked():
    x, first = first_steps.draw(50, 7, torch.Generator().manual_seed(0))
    assert x.shape == (50, 7, 9)
    assert torch.equal(x[:, 0, :8].argmax(-1), first)
    assert x[:, :, 8].tolist() == [[1.0] + [0.0] * 6] * 50
    assert x[:, :, :8].sum(-1).eq(1.0).all()
    assert len(first.unique()) == 8


def test_the_write_rate_of_a_network_is_the_mean_of_its_units():
    torch.manual_seed(0)
    model, (x, _) = first_steps.network(surrogate_scale=1.0), first_steps.draw(4, 30, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block, threshold in zip(model.blocks, (0.0, 100.0), strict=True):  # writes at every step, and at none
            block.units[0].weight_ih_l0[32:] = 0.0
            block.units[0].bias_ih_l0[32:] = threshold
    assert first_steps.write_rate(model, x) == 0.5


def test_first_steps(tmp_path):
    models = ["BMRU", "MRUNetwork, epsilon 1 to 0"]
    options = ["--steps", "60", "--length", "8", "--learning-rates", "1e-2", "3e-2", "--models", *models]
    first_steps.main([*SMALL, *options, "--out", str(tmp_path)])
    _, _, *rows = page(tmp_path, "first_steps")[:6]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {m}", rate] for rate in ("0.01", "0.03") for m in models]
    values = [[float(cell) for cell in row.strip("| ").split(" | ")[2:]] for row in rows]
    assert all(0 <= value <= 100 for row in values for value in row[:3])
    assert values[2][0] > 30  # BMRU at 3e-2 has learned something; chance is 12.5


# ------------------------------------------------------------------------------------------------ digits


def test_units_have_about_equally_many_parameters():
    for name in digits.UNITS:
        count = common.parameters(digits.network(name, digits.channels(name)))
        assert count == pytest.approx(digits.PARAMETERS, rel=0.03), name


def test_permuted_digits_are_the_same_pixels():
    original, permuted = (digits.data(order)[0] for order in digits.ORDERS)
    assert not torch.equal(original, permuted)
    assert torch.equal(original.sort(1).values, permuted.sort(1).values)


def test_digits_without_positions_are_the_same_pixels_and_zeros():
    (with_positions, *_), (without, *_) = digits.data("permuted"), digits.data("permuted", positions=False)
    assert torch.equal(with_positions[..., 0], without[..., 0])
    assert with_positions[..., 1:].ne(0).any()
    assert without[..., 1:].eq(0).all()


def test_digits_without_positions_with_a_convolution(tmp_path):
    options = ["--steps", "1", "--units", "BMRU", "--orders", "permuted", "--no-positions", "--conv-size", "3"]
    digits.main([*SMALL, *options, "--out", str(tmp_path)])
    header, _, row, _, note = page(tmp_path, "digits")
    assert header.strip("| ").split(" | ")[3:] == ["permuted"]
    extra = digits.BLOCKS * digits.WIDTH * (3 + 1)  # weights and biases of the convolutions
    without = common.parameters(digits.network("BMRU", digits.channels("BMRU")))
    assert row.startswith(f"| BMRU | {without + extra:,} |")
    assert note.endswith("without positions, conv_size 3.")


def test_digits(tmp_path):
    units = ["BMRU, epsilon 1 to 0", "LRU"]
    digits.main([*SMALL, "--steps", "30", "--units", *units, "--out", str(tmp_path)])
    _, _, *rows = page(tmp_path, "digits")[:4]
    for name, row in zip(units, rows, strict=True):
        assert row.startswith(f"| {name} |")
        cells = row.strip("| ").split(" | ")
        assert all(0 <= float(cell) <= 100 for cell in cells[-2:])
    assert float(rows[1].strip("| ").split(" | ")[-1]) > 15  # the LRU has learned something; chance is 10


# ------------------------------------------------------------------------------------------------ online_gradients


def test_chunks_with_traces_have_the_gradient_of_the_whole_sequence():
    torch.manual_seed(0)
    model = online_gradients.Model().double()
    x, first = online_gradients.draw(3, 100, torch.Generator().manual_seed(0))
    gradients = []
    for output in (model(x.double()), *(model.in_chunks(x.double(), 10, gradient) for gradient in ("traces", None))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(output, first).backward()
        gradients.append(model.unit.weight_ih_l0.grad.clone())
    whole, traced, truncated = gradients
    torch.testing.assert_close(traced, whole, rtol=1e-10, atol=1e-14)
    assert (truncated - whole).norm() > 0.1 * whole.norm()


def test_online_gradients(tmp_path):
    options = ["--steps", "60", "--lengths", "100", "--out", str(tmp_path)]
    online_gradients.main([*SMALL, *options])
    _, _, *rows = page(tmp_path, "online_gradients")[:5]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in online_gradients.METHODS]
    whole, traced, truncated = (percent(row)[0] for row in rows)
    assert min(whole, traced) > 90 > 40 > truncated  # chance is 25


# ------------------------------------------------------------------------------------------------ vowels


@pytest.fixture
def utterances(tmp_path):
    """Files in the format of the data set: the speaker is the sign and size of the first channel."""
    source = random.Random(0)
    for part in ("TRAIN", "TEST"):
        lines = ["#A comment", "@dimensions 12", "@classLabel true 1 2 3 4 5 6 7 8 9", "@data"]
        for i in range(90):
            speaker, length = i % 9 + 1, source.randint(7, 29)
            channels = [[source.gauss(0, 0.1) + (speaker if c == 0 else 0) for _ in range(length)] for c in range(12)]
            lines.append(":".join(",".join(f"{v:.6f}" for v in channel) for channel in channels) + f":{speaker}")
        (tmp_path / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_reads_sequences_of_unequal_length(utterances):
    sequences, speakers = vowels.read(utterances / "JapaneseVowels_TRAIN.ts")
    assert speakers.tolist() == [i % 9 for i in range(90)]
    assert len({len(s) for s in sequences}) > 5
    for sequence, speaker in zip(sequences, speakers, strict=True):
        assert sequence.shape[1] == 12
        assert sequence[:, 0].mean().item() == pytest.approx(speaker.item() + 1, abs=0.3)


@pytest.mark.parametrize("name", vowels.UNITS)
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(name):
    torch.manual_seed(0)
    model = vowels.Model(name).double()
    sequences = [torch.randn(n, vowels.FEATURES, dtype=torch.float64) for n in (5, 9, 1, 9)]
    together = model(sequences)
    alone = torch.cat([model([s]) for s in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_vowels(utterances, tmp_path):
    options = ["--steps", "60", "--units", "BMRU", "--data", str(utterances), "--out", str(tmp_path / "out")]
    vowels.main([*SMALL, *options])
    row = page(tmp_path / "out", "vowels")[2]
    assert float(row.strip("| ").split(" | ")[-1]) > 40  # chance is 11


def test_vowels_without_data_say_where_they_are(monkeypatch, capsys):
    monkeypatch.setattr(vowels, "folder", lambda: None)
    with pytest.raises(SystemExit):
        vowels.main(SMALL)
    assert "pip install --no-deps aeon" in capsys.readouterr().err


def test_the_real_utterances_where_a_package_has_them():
    if vowels.folder() is None:
        pytest.skip("neither aeon nor sktime is installed")
    (train, speakers), (test, _) = vowels.load(vowels.folder())
    assert (len(train), len(test)) == (270, 370)
    assert speakers.bincount().tolist() == [30] * 9
    lengths = [len(s) for s in train + test]
    assert (min(lengths), max(lengths)) == (7, 29)


# ------------------------------------------------------------------------------------------------ charlm


def test_charlm_writes_as_many_characters_as_asked(tmp_path):
    file = tmp_path / "text"
    file.write_text("the quick brown fox jumps over the lazy dog, ŝ. " * 200, encoding="utf-8")
    options = ["--steps", "20", "--text", str(file), "--generate", "70", "--prompt", "the qu", "--out", str(tmp_path)]
    charlm.main([*SMALL, *options])
    assert len((tmp_path / "charlm.txt").read_text(encoding="utf-8")) == 70
    _, _, model, single, *_ = page(tmp_path, "charlm")
    bits, rate = (float(cell) for cell in model.strip("| ").split(" | ")[2:])
    assert 0 < bits < float(single.strip("| ").split(" | ")[2]) < math.log2(40)
    assert rate > 1


def test_charlm_runs_several_units(tmp_path, monkeypatch):
    monkeypatch.setattr(charlm, "LENGTH", 8)
    file = tmp_path / "text"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 120, encoding="utf-8")
    options = ["--steps", "1", "--text", str(file), "--generate", "3", "--prompt", "the", "--out", str(tmp_path)]
    charlm.main([*SMALL, *options, "--units", *charlm.UNITS])
    rows = page(tmp_path, "charlm")[2 : 3 + len(charlm.UNITS)]
    assert [row.strip("| ").split(" | ")[0] for row in rows] == [*charlm.UNITS, "single characters"]


@pytest.mark.parametrize("name", charlm.UNITS)
def test_bits_per_character_are_those_of_one_pass(name, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(charlm, "TEST_CHUNK", 100)
    model = charlm.network(9, name).double().eval()
    tokens = torch.randint(9, (250,))
    scores, _ = model(tokens[:-1].unsqueeze(0))
    expected = torch.nn.functional.cross_entropy(scores[0], tokens[1:]).item() / math.log(2)
    assert charlm.bits_per_character(model, tokens) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.check)])
def test_generation_goes_on_as_the_whole_text_would(compiled):
    torch.manual_seed(0)
    model = charlm.network(9).double().eval()
    prompt = torch.randint(9, (30,))
    tokens, _ = charlm.generate(model, prompt, 20, 1e-9, compiled=compiled)  # the most likely token
    text = torch.cat([prompt, tokens])
    scores, _ = model(text.unsqueeze(0))
    assert torch.equal(scores[0, 29:-1].argmax(-1), tokens)


def test_the_manual_is_there():
    text = charlm.Text(charlm.manual())
    assert len(text.train) > 300_000
    assert 50 < len(text.characters) < 200
    assert 4 < text.entropy() < 6


# ------------------------------------------------------------------------------------------------ recall


@pytest.mark.parametrize("task", recall.TASKS)
def test_recall_shows_what_it_asks_for(task):
    x, answers = recall.TASKS[task][0](400, 40, torch.Generator().manual_seed(0))
    if task == "first":
        assert x[:, 0, copy_first.SYMBOLS].eq(1.0).all()
        assert (x[:, 0, : copy_first.SYMBOLS].argmax(-1) == answers).float().mean() > 0.7
        return
    keys, values = x[..., : recall.KEYS], x[..., recall.KEYS : recall.KEYS + recall.VALUES]
    shown, asked = x[..., -2] == 1.0, x[..., -1] == 1.0
    assert shown.sum(1).eq(recall.PAIRS).all()
    assert asked[:, -1].all()
    assert not asked[:, :-1].any()
    assert not shown[:, -1].any()
    right = []
    for i in range(400):
        steps = shown[i].nonzero().flatten()
        found = steps[keys[i, steps].argmax(-1) == keys[i, -1].argmax()]
        right += [values[i, found].sum(0).argmax() == answers[i]]
    assert sum(right) / 400 > 0.9  # the noise has a standard deviation of 0.3


def test_recall(tmp_path):
    options = [
        "--steps",
        "2",
        "--units",
        "minGRU",
        "--lengths",
        "100",
        "600",
        "--sequences",
        "4",
        "--out",
        str(tmp_path),
    ]
    recall.main([*SMALL, *options, "--caches", *recall.CACHES])
    _, _, *rows = page(tmp_path, "recall")[: 2 + 2 * len(recall.CACHES)]
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {task}", "minGRU", cache] for task in recall.TASKS for cache in recall.CACHES
    ]
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row.strip("| ").split(" | ")[3:])
