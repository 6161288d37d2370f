// A number of a row and its index, as integers, so that NaN and infinities stay apart whatever a compiler assumes about floats.
struct Best {
  uint key;  // in the order of the numbers; the largest of all for a number that is not finite
  uint index;
};

FUNCTION constexpr uint not_finite() {
  return 0xffffffffu;
}

FUNCTION Best best_of(float value, uint index) {
  const uint bits = as_type<uint>(value);
  const uint size = bits & 0x7fffffffu;
  Best best;
  best.key = size >= 0x7f800000u ? not_finite() : bits == size || size == 0u ? size | 0x80000000u : ~bits;
  best.index = index;
  return best;
}

// The larger one; of equal ones the first.
FUNCTION Best better(Best a, Best b) {
  return b.key > a.key || (b.key == a.key && b.index < a.index) ? b : a;
}

FUNCTION Best best_of_simdgroup(Best mine) {
  UNROLL
  for (uint step = SIMD_WIDTH / 2; step > 0u; step /= 2u) {
    Best other;
    other.key = metal::simd_shuffle_xor(mine.key, ushort(step));
    other.index = metal::simd_shuffle_xor(mine.index, ushort(step));
    mine = better(mine, other);
  }
  return mine;
}
