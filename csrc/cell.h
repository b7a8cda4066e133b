// The protocol of a cell: what one step computes, on one channel. csrc/cells/<name>.h states one cell each; csrc/cells.py
// makes the list of cells from the files in that folder, and every backend's kernels take any cell. leaky_integrator.h is the
// example to copy.
//
// A cell is a struct over S, the scalar type of the state, and a struct `cells::<name>`, its declaration. Its functions are
// templates over a value type V: S itself (CUDA) or a vector of it (CPU), see lanes.h. `x` are the inputs at one step, in
// the order of kInputs, and `s` is the state before it. An optional input that is not given is 1 if it comes per channel;
// as a stream it must not be read. Where the state is complex and the streams are real, an input that is real has the
// imaginary part 0, and of h and the gradients of such inputs only the real part is stored.
//
//   Cell(scalars)                the scalars in the order of mru_kernels/cells/<name>.py
//   step(x, s)                   the state after; exact, with the NaN rules of the cell
//   recompute(x, s)              the same where nothing is NaN, which is all that gradients need
//   output(x, s, after)          h
//   pull(x, m)                   conj(a) m, where s' = a s + b
//   cotangent(x, s, after, g, m) dL/ds', where g = dL/dh, and m = dL/ds' through the next step
//   vjp(x, s, after, g, m, dx)   writes the gradients of x; returns dL/ds: pull(x, cotangent(x, s, after, g, m))
//   enter(x, s)                  the state that enters a sequence; only inputs per channel may be read
//
//   kAdjointSeesState            whether `cotangent` depends on s or `after`
//   kComposes                    whether a step is an affine map of the state, which composes with others. If not, time is
//                                not cut, `pull` is pull(x, s, m), and kAdjointSeesState is true
//   kGated                       whether a step computes gates that take registers: then tiles may be shorter
//   kAlpha                       the input per channel that scales the output, h = alpha s'; -1: there is none
//   kCodes                       whether a step fits a write code of 2 bits (maps/write_or_hold.h); then also
//     kFirstValue, kSecondValue  the two values that a step may write
//     writes(x), value(x, first, second), encode(x), step_code(code, s), pull_code(code, m)
//                                `output` and `cotangent` read inputs per channel only, and no state but `after`; what
//                                decides a step reads no optional input per channel. It also has kOverwrites
//   kOverwrites                  whether a write may overwrite the state; then also
//     overwrites()               whether every write does: factors are 0 or 1, and a forward pass only copies values
//     overwriting()              the same cell; the compiler knows that its overwrites() is true
#pragma once
#include "elements.h"
#include "lanes.h"
#include "scan.h"

namespace mru {

// How an array input comes: as a stream [B, T, D], as one value per channel [D], or as either. complex: as one complex value
// per channel, though the streams are real.
struct InputKind {
  bool stream, channel, optional = false, complex = false;
};
constexpr InputKind kStream{true, false}, kChannel{false, true}, kEither{true, true};
constexpr InputKind kComplexChannel{false, true, false, true};
constexpr InputKind optional(InputKind kind) { return {kind.stream, kind.channel, true}; }

// A scalar of a cell and the range of its values.
struct Scalar {
  const char* name;
  double least, most;
};
constexpr Scalar positive(const char* name) { return {name, 5e-324, 1.7976931348623157e308}; }  // and finite

// The defaults of a cell: h is the state after the step.
struct CellBase {
  static constexpr bool kAdjointSeesState = false, kComposes = true, kCodes = false, kOverwrites = false,
                        kGated = false;
  static constexpr int kAlpha = -1;

  template <class V>
  MRU_INLINE V output(const V*, V, V after) const {
    return after;
  }
  template <class V>
  MRU_INLINE V cotangent(const V*, V, V, V g, V m) const {
    return g + m;
  }
  template <class V>
  MRU_INLINE V enter(const V*, V s) const {
    return s;
  }
};

// `pull` of any cell, where the state is known.
template <class Cell, class V>
MRU_INLINE V pull_at(const Cell& cell, const V* x, V s, V m) {
  if constexpr (Cell::kComposes) return cell.pull(x, m);
  else return cell.pull(x, s, m);
}

// A declaration derives from this with itself as `Self`: masks over its kInputs, bit i for input i.
template <class Self>
struct Declaration {
  // The type of a state for streams of elements E.
  template <class E>
  using State = typename StateOf<E>::type;
  static constexpr int inputs() { return sizeof(Self::kInputs) / sizeof(InputKind); }
  static constexpr Scalar kScalars[1] = {};  // none, unless `Self` has some
  static constexpr bool kReal = true;        // takes real streams; false in cells of mru_kernels.define_cell only
  static constexpr int scalars() { return Self::kScalars[0].name ? sizeof(Self::kScalars) / sizeof(Scalar) : 0; }
  template <class Has>
  static constexpr unsigned mask(Has has) {
    unsigned bits = 0;
    for (int i = 0; i < inputs(); ++i) bits |= unsigned(has(Self::kInputs[i])) << i;
    return bits;
  }
  static constexpr unsigned optional_streams() {
    return mask([](InputKind k) { return k.stream && k.optional; });
  }
  static constexpr unsigned optional_channels() {
    return mask([](InputKind k) { return !k.stream && k.optional; });
  }
  static constexpr unsigned either() {
    return mask([](InputKind k) { return k.stream && k.channel; });
  }
  static constexpr unsigned channels() {
    return mask([](InputKind k) { return !k.stream; });
  }
  static constexpr unsigned complex_inputs() {
    return mask([](InputKind k) { return k.complex; });
  }
  static constexpr bool has_complex_state() { return RealOf<typename Self::template State<float>>::is_complex; }
  static constexpr unsigned all() { return (1u << inputs()) - 1; }

  // Whether the cell takes these inputs: those given, and those of them that come per channel.
  static constexpr bool takes(unsigned given, unsigned per_channel) {
    const unsigned needed = all() & ~optional_streams() & ~optional_channels();
    return (given & ~all()) == 0 && (given & needed) == needed && (per_channel & ~given) == 0 &&
           (per_channel & ~either()) == (channels() & given);
  }
};

// Calls f<kGiven, kChannels>() with the inputs that are given and those that come per channel, as the compiler knows them:
// one instance for every choice of optional streams and of inputs that come as either. Optional inputs per channel count as
// given.
template <class C, unsigned kGiven = C::all(), unsigned kChannels = C::channels(), int kInput = 0, class F>
decltype(auto) with_form(unsigned given, unsigned per_channel, F f) {
  if constexpr (kInput == C::inputs()) {
    return f.template operator()<kGiven, kChannels>();
  } else {
    constexpr InputKind kind = C::kInputs[kInput];
    constexpr unsigned bit = 1u << kInput;
    if constexpr (kind.stream && kind.optional)
      if ((given & bit) == 0) return with_form<C, kGiven & ~bit, kChannels, kInput + 1>(given, per_channel, f);
    if constexpr (kind.stream && kind.channel)
      if ((per_channel & bit) != 0) return with_form<C, kGiven, kChannels | bit, kInput + 1>(given, per_channel, f);
    return with_form<C, kGiven, kChannels, kInput + 1>(given, per_channel, f);
  }
}

}  // namespace mru
