"""The equations of public RWKV-4 code, and checkpoints with its names."""

from __future__ import annotations

import torch


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def sums(key, value, time_decay, time_first, state=None):
    """The loop of the public code: outputs, and the sums (aa, bb, pp) after the last step."""
    aa, bb, pp = state or (0 * key[:, 0], 0 * key[:, 0], torch.full_like(key[:, 0], -1e38))
    outputs = []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        most = torch.maximum(pp, time_first + k)
        e1, e2 = (pp - most).exp(), (time_first + k - most).exp()
        outputs.append((e1 * aa + e2 * v) / (e1 * bb + e2))
        most = torch.maximum(pp - time_decay.exp(), k)
        e1, e2 = (pp - time_decay.exp() - most).exp(), (k - most).exp()
        aa, bb, pp = e1 * aa + e2 * v, e1 * bb + e2, most
    return torch.stack(outputs, 1), (aa, bb, pp)


def shifted(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def time_mix(x, p, prefix=""):
    w = {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}
    mixed = {c: x * w["time_mix_" + c] + shifted(x) * (1 - w["time_mix_" + c]) for c in "kvr"}
    k, v, r = (mixed[n[0]] @ w[n + ".weight"].T for n in ("key", "value", "receptance"))
    return (r.sigmoid() * sums(k, v, w["time_decay"], w["time_first"])[0]) @ w["output.weight"].T


def channel_mix(x, p, prefix=""):
    w = {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}
    mixed = {c: x * w["time_mix_" + c] + shifted(x) * (1 - w["time_mix_" + c]) for c in "kr"}
    k = (mixed["k"] @ w["key.weight"].T).clamp(min=0) ** 2
    return (mixed["r"] @ w["receptance.weight"].T).sigmoid() * (k @ w["value.weight"].T)


def model(tokens, p):
    """The authors' network, by the names of their parameters."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    x, layer = p["emb.weight"][tokens], 0
    x = norm(x, "blocks.0.ln0")
    while (block := f"blocks.{layer}.") + "ln1.weight" in p:
        x = x + time_mix(norm(x, block + "ln1"), p, block + "att.")
        x = x + channel_mix(norm(x, block + "ln2"), p, block + "ffn.")
        layer += 1
    return norm(x, "ln_out") @ p["head.weight"].T


def checkpoint(layers=2, width=6, tokens=11, hidden=24) -> dict[str, torch.Tensor]:
    """Random parameters with the names and shapes of a file of the authors."""
    torch.manual_seed(3)
    matrix = {"emb.weight": (tokens, width), "head.weight": (tokens, width)}
    shapes: dict[str, tuple[int, ...]] = matrix | {"ln_out.weight": (width,), "ln_out.bias": (width,)}
    for i in range(layers):
        block = f"blocks.{i}."
        for norm in ("ln0",) * (i == 0) + ("ln1", "ln2"):
            shapes |= {f"{block}{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{block}att.time_{name}": (width,) for name in ("decay", "first")}
        shapes |= {f"{block}att.time_mix_{c}": (1, 1, width) for c in "kvr"}
        shapes |= {f"{block}att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"{block}ffn.time_mix_{c}": (1, 1, width) for c in "kr"}
        shapes |= {f"{block}ffn.key.weight": (hidden, width), f"{block}ffn.value.weight": (width, hidden)}
        shapes[block + "ffn.receptance.weight"] = (width, width)
    return {name: random(*shape) for name, shape in shapes.items()}


HUGGING_FACE = {
    "emb.": "embeddings.",
    ".ln0.": ".pre_ln.",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    ".time_mix_k": ".time_mix_key",
    ".time_mix_v": ".time_mix_value",
    ".time_mix_r": ".time_mix_receptance",
}


def renamed(name: str) -> str:
    for old, new in HUGGING_FACE.items():
        name = name.replace(old, new)
    return name if name == "head.weight" else "rwkv." + name
