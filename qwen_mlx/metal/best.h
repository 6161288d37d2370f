// A number of a row and where it stands, as integers: whatever a compiler assumes about floats, NaN and infinities stay apart.
struct Best {
  uint key;  // in the order of the numbers; the largest of all for one that is not finite
  uint index;
};

FUNCTION constexpr uint not_finite() {
  return 0xffffffffu;
}

FUNCTION Best best_of(float value, uint index) {
  const uint bits = bits_of_float(value);
  const uint size = bits & 0x7fffffffu;
  Best found;
  found.key = size >= 0x7f800000u ? not_finite() : bits == size || size == 0u ? size | 0x80000000u : ~bits;
  found.index = index;
  return found;
}

// The larger, and of equal ones the first.
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
