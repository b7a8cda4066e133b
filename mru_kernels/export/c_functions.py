"""The C functions that exported programs are made of. A program contains those that it calls, in this order."""

from __future__ import annotations

import re

GUARDS = """\
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile without -ffast-math, which removes the comparisons with NaN"
#endif
/* A fused multiply-add rounds once, a product and a sum round twice. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize ("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif
"""

_MAP_FLOAT32 = """\
/* A linear map: rows of weights, and a bias for each row or NULL. */
typedef float operand;
typedef struct {
    const float *weight, *bias;
    size_t inputs;
} linear;

/* Row r of the map of x. */
static float row(const linear *map, size_t r, const operand *x)
{
    const float *weight = map->weight + r * map->inputs;
    float sum = 0.0f;
    for (size_t i = 0; i < map->inputs; i++)
        sum += weight[i] * x[i];
    return map->bias ? sum + map->bias[r] : sum;
}
"""

_MAP_INT8 = """\
/* A linear map: rows of weights, a scale for each row, and a bias for each row or NULL. */
typedef float operand;
typedef struct {
    const signed char *weight;
    const float *scale, *bias;
    size_t inputs;
} linear;

/* Row r of the map of x. */
static float row(const linear *map, size_t r, const operand *x)
{
    const signed char *weight = map->weight + r * map->inputs;
    float sum = 0.0f;
    for (size_t i = 0; i < map->inputs; i++)
        sum += (float)weight[i] * x[i];
    sum *= map->scale[r];
    return map->bias ? sum + map->bias[r] : sum;
}
"""

_MAP_INT8_INT32 = """\
/* A linear map: rows of weights, a scale for each row, and a bias for each row or NULL. */
typedef struct {
    signed char value[LARGEST_OPERAND];
    float scale;
} operand;
typedef struct {
    const signed char *weight;
    const float *scale, *bias;
    size_t inputs;
} linear;

/* x as integers from -127 to 127 times a scale. */
static void quantise(const float *x, size_t size, operand *to)
{
    float largest = 0.0f;
    for (size_t i = 0; i < size; i++) {
        const float magnitude = x[i] >= 0.0f ? x[i] : -x[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    to->scale = largest / 127.0f;
    for (size_t i = 0; i < size; i++) {
        const float share = largest > 0.0f ? x[i] / largest * 127.0f : 0.0f;
        to->value[i] = (signed char)(share >= 0.0f ? share + 0.5f : share - 0.5f);
    }
}

/* Row r of the map of x. */
static float row(const linear *map, size_t r, const operand *x)
{
    const signed char *weight = map->weight + r * map->inputs;
    int32_t sum = 0;
    for (size_t i = 0; i < map->inputs; i++)
        sum += (int32_t)weight[i] * x->value[i];
    const float value = (float)sum * (map->scale[r] * x->scale);
    return map->bias ? value + map->bias[r] : value;
}
"""

MAPS = {"float32": _MAP_FLOAT32, "int8": _MAP_INT8, "int8 x int8": _MAP_INT8_INT32}
"""Linear maps by the types of their weights and inputs."""

FUNCTIONS = {
    "rows": """\
/* All rows of a map. */
static void rows(const linear *map, size_t count, const operand *x, float *y)
{
    for (size_t r = 0; r < count; r++)
        y[r] = row(map, r, x);
}
""",
    "add_rows": """\
/* Add the rows of a map to y. */
static void add_rows(const linear *map, size_t count, const operand *x, float *y)
{
    for (size_t r = 0; r < count; r++)
        y[r] += row(map, r, x);
}
""",
    "add": """\
static void add(const float *x, size_t size, float *y)
{
    for (size_t i = 0; i < size; i++)
        y[i] += x[i];
}
""",
    "relu": """\
static void relu(const float *x, size_t size, float *y)
{
    for (size_t i = 0; i < size; i++)
        y[i] = x[i] > 0.0f ? x[i] : 0.0f;
}
""",
    "all_finite": """\
static int all_finite(const float *x, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (!(x[i] - x[i] == 0.0f))
            return 0;
    return 1;
}
""",
    "sigmoid": """\
static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}
""",
    "rms_norm": """\
/* x over its root mean square, times a weight for each feature. */
static void rms_norm(const float *x, const float *weight, float epsilon, size_t size, float *y)
{
    float sum = 0.0f;
    for (size_t i = 0; i < size; i++)
        sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(sum / (float)size + epsilon);
    for (size_t i = 0; i < size; i++)
        y[i] = x[i] * factor * weight[i];
}
""",
    "convolve_silu": """\
/* SiLU of a causal convolution of every channel with its own taps; the last tap is that of the current step. `past` has
   the last taps - 1 inputs of each channel, oldest first. */
static void convolve_silu(float *past, const float *weight, const float *bias, size_t taps, size_t channels,
                          const float *x, float *y)
{
    for (size_t d = 0; d < channels; d++) {
        float *own = past + d * (taps - 1);
        const float *tap = weight + d * taps;
        float sum = tap[taps - 1] * x[d];
        for (size_t i = 0; i + 1 < taps; i++) {
            sum += tap[i] * own[i];
            own[i] = i + 2 < taps ? own[i + 1] : x[d];
        }
        sum += bias ? bias[d] : 0.0f;
        y[d] = sum * sigmoid(sum);
    }
}
""",
    "bmru_gate": """\
/* What a step writes: 1 for the higher value, 0 for the lower value, HOLD for none. A tie writes. */
static int bmru_gate(float candidate, float threshold)
{
    const int positive = candidate >= 0.0f;
    const float magnitude = positive ? candidate : -candidate;
    return magnitude >= (threshold >= 0.0f ? threshold : -threshold) ? positive : HOLD;
}
""",
    "schmitt_gate": """\
/* What a step writes: 1 for the higher value, 0 for the lower value, HOLD for none. A tie with `high` writes 1, a tie
   with `low` holds. */
static int schmitt_gate(float candidate, float low, float high)
{
    candidate = candidate > 0.0f ? candidate : 0.0f;
    return candidate >= high ? 1 : candidate >= low ? HOLD : 0;
}
""",
    "one_bit": """\
/* Write bit d, unless the code is HOLD. Returns the bit. */
static int one_bit(unsigned char *bits, size_t d, int code)
{
    const unsigned mask = 1u << (d % 8);
    if (code != HOLD)
        bits[d / 8] = (unsigned char)(code ? bits[d / 8] | mask : bits[d / 8] & ~mask);
    return (bits[d / 8] & mask) != 0;
}
""",
    "two_bits": """\
/* `one_bit` with a second bit, which says that the first one has been written. Returns HOLD before that. */
static int two_bits(unsigned char *bits, unsigned char *written, size_t d, int code)
{
    const int bit = one_bit(bits, d, code);
    return one_bit(written, d, code == HOLD ? HOLD : 1) ? bit : HOLD;
}
""",
    "level": """\
/* A write adds a value to the share epsilon of the state. Returns the state. */
static float level(float *state, int code, float value, float epsilon)
{
    if (code != HOLD)
        *state = value + epsilon * *state;
    return *state;
}
""",
    "min_gru": """\
/* A step of minGRU. Returns the state. */
static float min_gru(float *state, float candidate, float update)
{
    const float value = candidate >= 0.0f ? candidate + 0.5f : sigmoid(candidate);
    *state = sigmoid(-update) * *state + sigmoid(update) * value;
    return *state;
}
""",
}
"""Every function by its name; each calls only functions above it."""


def functions_of(statements: str) -> list[str]:
    """The texts of the functions that statements call, and of those that these call, in order of definition."""
    needed: list[str] = []
    for name, text in reversed(FUNCTIONS.items()):
        if re.search(rf"\b{name}\(", statements + "".join(needed)):
            needed.insert(0, text)
    return needed
