"""The epsilon of a unit: assignment, copies, checkpoints and compiled code."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

import mru_kernels as mk
from tests.units import all_classes, make


def test_moves_leave_epsilon_unchanged():
    module = make(mk.BMRU, 4, 6, epsilon=0.1)
    for move in ("half", "bfloat16", "double", "float", "cpu"):
        getattr(module, move)()
        assert module.epsilon == 0.1
    assert copy.deepcopy(module).to("meta").epsilon == 0.1
    assert copy.deepcopy(module).to_empty(device="cpu").epsilon == 0.1
    with torch.device("meta"):
        assert mk.BMRU(4, 6, epsilon=0.1).epsilon == 0.1


def test_epsilon_has_an_effect_and_is_checked():
    module = make(mk.BMRU, 4, 6)
    x = torch.randn(3, 40, 4)
    module.epsilon = 1.0
    assert module(x)[1].abs().max() > 1
    assert torch.equal(module(x)[0], make(mk.CMRU, 4, 6)(x)[0])
    module.epsilon = torch.tensor(0.25)
    assert module.epsilon == 0.25
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="epsilon"):
            module.epsilon = bad
        with pytest.raises(ValueError, match="epsilon"):
            mk.CMRU(4, 6, epsilon=bad)
    with pytest.raises(TypeError, match="epsilon"):
        module.epsilon = "0.5"
    assert module.epsilon == 0.25


@all_classes
def test_copies_and_checkpoints(cls):
    module = make(cls, 4, 6, 2, bidirectional=True, epsilon=0.3)
    x = torch.randn(2, 9, 4)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(cls, 4, 6, 2, bidirectional=True, seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert twin.epsilon == 0.3
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))
        twin.epsilon = 0.7
        assert module.epsilon == 0.3


@pytest.mark.parametrize("cls", [mk.BMRU, mk.FirstQuadrantBMRU])
@pytest.mark.parametrize("value", [0.5, 0.25])
@pytest.mark.parametrize("loaded", [False, True])
def test_epsilon_may_change_before_the_backward_pass(cls, value, loaded):
    """The backward pass uses the epsilon of the forward pass."""
    module, x = make(cls, 4, 6, epsilon=0.5), torch.randn(2, 9, 4)
    gradients = []
    for change in (False, True):
        module.zero_grad()
        output, _ = module(x)
        if change and loaded:
            module.set_extra_state(torch.tensor(value))
        elif change:
            module.epsilon = value
        output.sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert module.epsilon == value
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_epsilon_set_in_compiled_code(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module, eager = make(mk.CMRU, 4, 6), make(mk.CMRU, 4, 6)

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, epsilon):
        module.epsilon = epsilon
        return module(x)[0]

    x, compilations = torch.randn(2, 9, 4), []
    for i in range(20):
        output = run(x, kind(i / 32))
        module.epsilon = eager.epsilon = i / 32  # set outside the compiled code, as a schedule does
        assert torch.equal(output, eager(x)[0])
        assert torch.equal(run(x, kind(1 - i / 32)), module(x)[0])
        assert module.epsilon == 1 - i / 32
        output.sum().backward()
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]
    with pytest.raises(RuntimeError, match=r"epsilon: expected a value in \[0, 1\], got 1.5"):
        run(x, kind(1.5))


def test_epsilon_set_under_a_mode_is_a_number_afterwards():
    module, x = make(mk.BMRU, 4, 6), torch.randn(2, 9, 4)

    def under_grad(scale):
        module.epsilon = 0.75
        return scale * module(x)[0].sum()

    for number, mode in {0.1: FakeTensorMode(), 0.2: torch.inference_mode(), 0.3: torch.device("meta")}.items():
        with mode:
            module.epsilon = number
            assert module.epsilon == mk.BMRU(1, 1, epsilon=number).epsilon == number
            assert f"epsilon={number}" in repr(module)
        module(x)[0].sum().backward()
    torch.func.grad(torch.func.grad(under_grad))(torch.ones(()))
    assert module.epsilon == 0.75
    module(x)[0].sum().backward()
    with FakeTensorMode(), pytest.raises(ValueError, match="epsilon: expected a number, got a fake tensor"):
        module.epsilon = torch.tensor(0.5)


def test_a_state_dict_without_epsilon():
    module = torch.nn.Sequential(make(mk.BMRU, 4, 6, epsilon=0.3))
    whole = module.state_dict()
    missing = {name: value for name, value in whole.items() if not name.endswith("extra_state")}
    for strict in (True, False):
        with pytest.warns(UserWarning, match=r"epsilon: the state_dict has no '0._extra_state'; it stays 0.3"):
            keys = module.load_state_dict(missing, strict=strict)
        assert not keys.missing_keys
    with pytest.warns(UserWarning, match="epsilon"), pytest.raises(RuntimeError, match=r"Missing.*: \"0.alpha_l0\"\."):
        module.load_state_dict({name: value for name, value in missing.items() if name != "0.alpha_l0"})
    with pytest.raises(ValueError, match=r"epsilon: expected a value in \[0, 1\], got 2.0"):
        module.load_state_dict(whole | {"0._extra_state": torch.tensor(2.0)})
    assert module[0].epsilon == 0.3


def test_a_distributed_checkpoint_is_loaded_in_place(tmp_path):
    module, loaded = make(mk.BMRU, 4, 6, epsilon=0.3), make(mk.BMRU, 4, 6, seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        torch.distributed.checkpoint.save(module.state_dict(), checkpoint_id=tmp_path)
        torch.distributed.checkpoint.load(loaded.state_dict(), checkpoint_id=tmp_path)
    x = torch.randn(2, 9, 4)
    assert loaded.epsilon == 0.3
    assert torch.equal(loaded(x)[0], module(x)[0])
    assert mk.BMRU(4, 6, epsilon=0.0).epsilon == 0.0  # the load did not write into a shared tensor


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_epsilon_of_an_averaged_model_and_of_an_ensemble(use_buffers):
    """Torch averages and stacks only parameters and buffers, so users assign epsilon, as the documentation says."""
    model, x = make(mk.CMRU, 4, 6), torch.randn(2, 9, 4)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for epsilon in (1.0, 0.5, 0.0):
        model.epsilon = epsilon
        averaged.update_parameters(model)
        averaged.module.epsilon = model.epsilon
    torch.testing.assert_close(averaged(x), model(x))
    state = torch.func.stack_module_state([model, model])
    base = make(mk.CMRU, 4, 6).to("meta")
    base.epsilon = model.epsilon
    output = torch.vmap(lambda *state: torch.func.functional_call(base, state, (x,))[0])(*state)
    torch.testing.assert_close(output, model(x)[0].expand(2, -1, -1, -1))


# ------------------------------------------------------------------------------------------------ tools of torch


def test_one_compilation_serves_all_epsilons():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = make(mk.CMRU, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 30, 4)
    outputs, compilations = [], []
    for i in range(20):
        module.epsilon = i / 19
        outputs.append(compiled(x)[0])
        compilations.append(counter.frame_count)
        assert torch.equal(outputs[-1], module(x)[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    assert compilations[0] > 0
    assert compilations[-1] == compilations[0]
