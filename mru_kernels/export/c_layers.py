"""The layers of a module as parts of a C program."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..delays import delay_kernel
from .c_program import Program, literal
from .stages import check_direction, check_kind, stage_sizes

UNITS: tuple[type, ...] = (nn.BMRU, nn.CMRU, nn.AlphaCMRU, nn.FirstQuadrantBMRU, nn.MinGRU)


def check(module: Any) -> None:
    """Raise unless a program can compute the steps of the module."""
    check_kind("a module", module, (*UNITS, nn.MRUNetwork, torch.nn.Sequential))
    if isinstance(module, torch.nn.Sequential):
        for stage in module.children():
            check_kind("stages", stage, (*UNITS, torch.nn.Linear, torch.nn.ReLU))
        if not any(isinstance(stage, UNITS) for stage in module.children()):
            raise ValueError("module: expected a Sequential with a recurrent unit, got none")
    elif isinstance(module, nn.MRUNetwork):
        if module.pool == "mean":
            raise ValueError('module: expected pool None or "last", got "mean", which is not known after one step')
        units: list[Any] = [block.units for block in module.blocks.children()]
        for unit in itertools.chain(*units):
            check_kind("units", unit, UNITS)
    for unit in module.modules():
        if isinstance(unit, nn.MRUBase):
            check_direction(unit)


def add(program: Program, module: Any) -> tuple[dict[str, int], bool]:
    """Add all of a module. Returns the sizes of its input and output, and whether the input is a token."""
    if isinstance(module, nn.MRUNetwork):
        _network(program, module)
        return _sizes(module.input_size, module.head.out_features), module.tokens
    if isinstance(module, torch.nn.Sequential):
        return _stages(program, module), False
    _unit(program, module, "", "input", "output")
    return _sizes(module.input_size, module.hidden_size), False


def _sizes(inputs: int, outputs: int) -> dict[str, int]:
    return {"INPUT_SIZE": inputs, "OUTPUT_SIZE": outputs}


# ------------------------------------------------------------------------------------------------ units


def _unit(program: Program, unit: Any, label: str, x: str, output: str) -> None:
    """The layers of a unit, from a buffer or the input to a buffer or the output."""
    for i, p in enumerate(unit._parameters_by_scan()):
        last = i == unit.num_layers - 1
        h = output if last else program.buffer(f"h{i % 2}", unit.hidden_size)
        _layer(program, unit, p, f"{label}l{i}_", x, h)
        x = h


def _layer(program: Program, unit: Any, p: dict[str, Tensor], label: str, x: str, h: str) -> None:
    channels = unit.hidden_size
    weight, bias = unit._gate_weights(p)
    gates = program.linear(f"{label}gates", weight, bias)
    operand = program.operand(x, weight.shape[1])
    lines = []
    for k, gate in enumerate(unit.gates):
        lines.append(f"const float {gate} = row(&{gates}, {f'{k * channels} + ' if k else ''}d, {operand});")
    initial = p["initial_state"] if unit.learn_initial_state else weight.new_zeros(channels)
    if isinstance(unit, nn.MinGRU):
        program.count(3 * channels, channels, 3 * channels)
        s = f"min_gru(&{program.state(f'{label}s', initial)}[d], candidate, update)"
    else:
        code = _gate_code(program, unit, p, label)
        update, s = _state_after(program, unit, initial, label, code)
        lines.append(f"const int code = {update};")
    if "alpha" in p and (p["alpha"] != 1.0).any():
        program.count(channels)
        s = f"{program.table(f'{label}alpha', p['alpha'])}[d] * ({s})"
    program.loop(channels, [*lines, f"{h}[d] = {s};"])


def _gate_code(program: Program, unit: Any, p: dict[str, Tensor], label: str) -> str:
    """The expression of what a channel writes."""
    program.count(comparisons=3 * unit.hidden_size)
    if not isinstance(unit, nn.FirstQuadrantBMRU):
        return "bmru_gate(candidate, threshold)"
    low = program.table(f"{label}low", p["low"])
    high = program.table(f"{label}high", p["low"] + p["width"].abs())
    return f"schmitt_gate(candidate, {low}[d], {high}[d])"


def _state_after(program: Program, unit: Any, initial: Tensor, label: str, code: str) -> tuple[str, str]:
    """The expressions of a channel's code, which says what it has written, and of its state after the step, a float."""
    lower = 0.0 if isinstance(unit, nn.FirstQuadrantBMRU) else -1.0
    value = f"code ? 1.0f : {literal(lower)}"
    amplitude = "amplitude" in unit.gates
    if unit.epsilon > 0.0 or amplitude:
        program.count(unit.hidden_size)
        value = "code ? amplitude : -amplitude" if amplitude else value
        epsilon = torch.tensor(unit.epsilon, dtype=torch.float32, device="cpu").item()
        return code, f"level(&{program.state(f'{label}s', initial)}[d], code, {value}, {literal(epsilon)})"
    bits = program.bits(f"{label}bits", initial == 1.0)
    if ((initial == 1.0) | (initial == lower)).all():
        return f"one_bit({bits}, d, {code})", value
    written = program.bits(f"{label}written", torch.zeros_like(initial))
    first = program.table(f"{label}initial", initial)
    return f"two_bits({bits}, {written}, d, {code})", f"code == HOLD ? {first}[d] : {value}"


# ------------------------------------------------------------------------------------------------ networks


def _stages(program: Program, stages: torch.nn.Sequential) -> dict[str, int]:
    """A Sequential of linear maps, ReLUs and units; the next stage reads the output of a unit. Returns its sizes."""
    inputs, outputs = zip(*stage_sizes(stages), strict=True)
    x = "input"
    for i, stage in enumerate(stages):
        y = "output" if i == len(stages) - 1 else program.buffer(f"x{i % 2}", outputs[i])
        if isinstance(stage, torch.nn.Linear):
            linear = program.linear(f"stage{i}", stage.weight, stage.bias)
            program.call("rows", f"&{linear}", outputs[i], program.operand(x, inputs[i]), y)
        elif isinstance(stage, torch.nn.ReLU):
            program.count(comparisons=outputs[i])
            program.call("relu", x, outputs[i], y)
        else:
            _unit(program, stage, f"stage{i}_", x, y)
        x = y
    return _sizes(inputs[0], outputs[-1])


def _network(program: Program, network: Any) -> None:
    width = network.head.in_features
    x, u = program.buffer("x", width), program.buffer("u", width)
    if network.tokens:
        _embedding(program, network.input_map.weight, x)
    else:
        linear = program.linear("input_map", network.input_map.weight, network.input_map.bias)
        program.call("rows", f"&{linear}", width, program.operand("input", network.input_size), x)
    for i, block in enumerate(network.blocks):
        _block(program, block, f"block{i}_", x, u)
    _norm(program, "norm", network.norm, x, u)
    head = program.linear("head", network.head.weight, network.head.bias)
    program.call("rows", f"&{head}", network.head.out_features, program.operand(u, width), "output")


def _embedding(program: Program, weight: Tensor, x: str) -> None:
    width = weight.shape[1]
    values, *scale = program.weight("embedding", weight)
    factor = f" * {scale[0]}[token]" if scale else ""
    program.count(width * len(scale))
    program.loop(width, [f"{x}[d] = {values}[token * {width} + d]{factor};"])


def _norm(program: Program, label: str, norm: torch.nn.RMSNorm, x: str, y: str) -> None:
    width = norm.weight.numel()
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    program.count(3 * width, 0, 1)
    program.call("rms_norm", x, program.table(f"{label}_weight", norm.weight), literal(epsilon), width, y)


def _block(program: Program, block: Any, label: str, x: str, u: str) -> None:
    """A block on the residual stream x; u is a buffer."""
    width, hidden, mixed_size = block.width, block.hidden_size, block.out.in_features
    _norm(program, f"{label}norm", block.norm, x, u)
    v = u if block.conv is None else _convolution(program, block.conv, label, u, program.buffer("v", width))
    mixed = program.buffer("mixed", mixed_size)
    for k, unit in enumerate(block.units):
        if block.combine == "concatenate":
            _unit(program, unit, f"{label}unit{k}_", v, f"({mixed} + {k * hidden})" if k else mixed)
        elif k == 0:
            _unit(program, unit, f"{label}unit{k}_", v, mixed)
        else:
            y = program.buffer("y", hidden)
            _unit(program, unit, f"{label}unit{k}_", v, y)
            program.count(hidden)
            program.call("add", y, hidden, mixed)
    gate = program.linear(f"{label}gate", block.gate.weight, None)
    program.count(mixed_size, 0, mixed_size)
    program.loop(mixed_size, [f"{mixed}[d] *= sigmoid(row(&{gate}, d, {program.operand(u, width)}));"])
    out = program.linear(f"{label}out", block.out.weight, None)
    program.call("add_rows", f"&{out}", width, program.operand(mixed, mixed_size), x)
    _norm(program, f"{label}mlp_norm", block.mlp_norm, x, u)
    mlp_size = block.mlp_out.in_features
    hidden_buffer = program.buffer("mixed", mlp_size)
    mlp_in = program.linear(f"{label}mlp_in", block.mlp_in.weight, block.mlp_in.bias)
    program.count(mlp_size, 0, mlp_size)
    read = program.operand(u, width)
    glu = f"row(&{mlp_in}, d, {read}) * sigmoid(row(&{mlp_in}, {mlp_size} + d, {read}))"
    program.loop(mlp_size, [f"{hidden_buffer}[d] = {glu};"])
    mlp_out = program.linear(f"{label}mlp_out", block.mlp_out.weight, block.mlp_out.bias)
    program.call("add_rows", f"&{mlp_out}", width, program.operand(hidden_buffer, mlp_size), x)


def _convolution(program: Program, conv: Any, label: str, x: str, y: str) -> str:
    """The causal convolution of x, with its SiLU, in y."""
    if isinstance(conv, nn.DelayConv):
        weight, bias = delay_kernel(conv.weight, conv.position, conv.sigma, conv.taps).flip(1), None
    else:
        weight, bias = conv.weight[:, 0], conv.bias
    channels, taps = weight.shape
    past = program.state(f"{label}past", weight.new_zeros(channels * (taps - 1)))
    tables = [program.table(f"{label}conv_weight", weight)]
    tables.append("NULL" if bias is None else program.table(f"{label}conv_bias", bias))
    program.count(channels * (taps + 1), 0, channels)
    program.call("convolve_silu", past, *tables, taps, channels, x, y)
    return y
