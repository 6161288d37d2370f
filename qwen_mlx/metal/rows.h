// What the readers of a matrix's formats (dense.h, affine.h, q4_k.h, q6_k.h) need. Each of those defines `row_dots`, which
// multiplies R rows by a vector; matvec.h calls it.

// Elements of T where 16-byte accesses may start.
template <typename T>
struct alignas(16) Staged {
  T v[16 / sizeof(T)];
};

// float(code) for codes below 2^23 without the conversion, which NVIDIA does at a quarter of the speed of an addition.
FUNCTION float small_float(uint code) {
  return float_of_bits(int(code | 0x4b000000u)) - 8388608.0f;
}

template <int R>
struct Rows {
  uint v[R];
};

// Row r of unit u. Where rows come in pairs (gate and up; the two halves of a head) a unit is R / 2 neighbouring pairs,
// first their first rows, then their second ones, WIDTH further on; else WIDTH is 0. COUNT rows, or pairs, in all: the
// last unit repeats the last one, so that nothing is read beyond the matrix.
template <int R, int WIDTH, int COUNT>
FUNCTION Rows<R> rows_of(uint unit) {
  constexpr int PER = WIDTH == 0 ? R : R / 2;
  constexpr uint DIVISOR = WIDTH == 0 ? 1u : uint(WIDTH);
  Rows<R> rows;
  for (int r = 0; r < R; ++r) {
    uint i = unit * uint(PER) + uint(r % PER);
    i = i < uint(COUNT) ? i : uint(COUNT - 1);
    rows.v[r] = WIDTH == 0 ? i : i / DIVISOR * 2u * DIVISOR + i % DIVISOR + (r < PER ? 0u : DIVISOR);
  }
  return rows;
}
