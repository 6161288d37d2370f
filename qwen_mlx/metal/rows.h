// What the readers of a matrix's formats (dense.h, affine.h, q4_k.h, q6_k.h) need. Each of those has a type for its name
// and, for that: `chunk_count`, how many pieces a row has of which a lane multiplies one at a time; `load_chunk`, the same
// piece of R rows as it lies in memory; `add_chunk`, their products with the vector.

// Elements of T where 16-byte accesses may start.
template <typename T>
struct alignas(16) Staged {
  T v[16 / sizeof(T)];
};

// 1 + code / 2^BITS: the code, `shift` bits up in its word, becomes the upper bits of a mantissa. That
// is two instructions less than a conversion, and the sum of the vector's elements takes the 1 away again.
template <int BITS>
FUNCTION float mantissa(uint word, int shift) {
  const int up = 23 - BITS - shift;
  const uint moved = up >= 0 ? word << uint(up >= 0 ? up : 0) : word >> uint(up >= 0 ? 0 : -up);
  return float_of_bits(int(masked_or(moved, ((1u << BITS) - 1u) << (23 - BITS), 0x3f800000u)));
}

// What a pointer of any address space points to, as decltype(value_of(pointer[0])).
template <typename Value>
FUNCTION Value value_of(Value value) {
  return value;
}

template <int R>
struct Rows {
  uint v[R];
};

// Row r of a unit. Where rows come in pairs (gate and up; the two halves of a head) a unit is R / 2 neighbouring pairs,
// first their first rows, then their second ones, WIDTH further on; else WIDTH is 0. COUNT rows, or pairs, in all: the
// last unit repeats the last one, so that nothing is read beyond the matrix.
template <int R, int WIDTH, int COUNT>
FUNCTION uint row_of(uint unit, uint r) {
  constexpr uint PER = WIDTH == 0 ? uint(R) : uint(R / 2);
  constexpr uint DIVISOR = WIDTH == 0 ? 1u : uint(WIDTH);
  uint i = unit * PER + r % PER;
  i = i < uint(COUNT) ? i : uint(COUNT - 1);
  return WIDTH == 0 ? i : i / DIVISOR * 2u * DIVISOR + i % DIVISOR + (r < PER ? 0u : DIVISOR);
}

template <int R, int WIDTH, int COUNT>
FUNCTION Rows<R> rows_of(uint unit) {
  Rows<R> rows;
  for (int r = 0; r < R; ++r) {
    rows.v[r] = row_of<R, WIDTH, COUNT>(unit, uint(r));
  }
  return rows;
}

// Where element i of a normed vector lies: after every 128 bytes 16 are free, so that lanes which read 64 or 128 bytes apart
// use different banks of the threadgroup memory. i is a multiple of 16 bytes.
template <typename T, bool STAGED>
FUNCTION uint place_of(uint i) {
  constexpr uint PIECE = 16u / uint(sizeof(T));
  return STAGED ? i + i / (8u * PIECE) * PIECE : i;
}
