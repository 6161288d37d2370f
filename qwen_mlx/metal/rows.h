// The rows of a matrix, and the vector that they are multiplied with.
//
// Each packing's header (dense.h, affine.h, q4_k.h, q6_k.h) has a reader of R rows at once, a struct made of the matrix's
// arrays: Dense, Affine, Q4K, Q6K. A reader has CHUNKS, the pieces of a row of which a lane takes one at a time; `load_chunk`,
// which loads the same piece of R rows as it lies in memory; `add_chunk`, which adds the piece's products with the vector to
// sums; and `eight_elements`, some elements of one row.

template <int R>
struct Rows {
  uint v[R];
};

// Row r of a unit. Where rows come in pairs (gate and up; the two halves of a head), APART rows apart, a unit is R / 2
// neighbouring pairs: their first rows, then their second ones. Else APART is 0. COUNT is the number of rows, or of pairs. The
// last unit repeats the last row or pair, so that nothing beyond the matrix is read.
template <int R, int APART, int COUNT>
FUNCTION uint row_of(uint unit, uint r) {
  constexpr uint PER_UNIT = APART == 0 ? uint(R) : uint(R / 2);
  constexpr uint DIVISOR = APART == 0 ? 1u : uint(APART);
  uint i = unit * PER_UNIT + r % PER_UNIT;
  i = i < uint(COUNT) ? i : uint(COUNT - 1);
  return APART == 0 ? i : i / DIVISOR * 2u * DIVISOR + i % DIVISOR + (r < PER_UNIT ? 0u : DIVISOR);
}

template <int R, int APART, int COUNT>
FUNCTION Rows<R> rows_of(uint unit) {
  Rows<R> rows;
  UNROLL
  for (int r = 0; r < R; ++r) {
    rows.v[r] = row_of<R, APART, COUNT>(unit, uint(r));
  }
  return rows;
}

// 16 bytes of T in threadgroup memory.
template <typename T>
struct alignas(16) Staged {
  T v[16 / sizeof(T)];
};

// The Staged<T> that a normed vector of K elements takes.
template <typename T>
FUNCTION constexpr int staged_size(int k) {
  return (k * int(sizeof(T)) + 127) / 128 * 9;
}

// Where element i of a normed vector lies; i is a multiple of 16 bytes. After every 128 bytes 16 are left free, so that lanes
// which read 64 or 128 bytes apart use different banks of the threadgroup memory.
template <typename T>
FUNCTION uint staged_index(uint i) {
  constexpr uint PIECE = 16u / uint(sizeof(T));
  return i + i / (8u * PIECE) * PIECE;
}

// The vector as an input of the kernel. `at` returns the 16 bytes from element i on.
template <typename T, typename X>
struct InputVector {
  enum { STAGED = 0 };
  X x;
  FUNCTION Pack<16 / sizeof(T)> at(uint i) const {
    return load<16 / sizeof(T)>(x, i);
  }
};

template <typename T, typename X>
FUNCTION InputVector<T, X> input_vector(X x) {
  return {x};
}

// The same, normed, in threadgroup memory.
template <typename T, typename X>
struct StagedVector {
  enum { STAGED = 1 };
  X x;
  FUNCTION Pack<16 / sizeof(T)> at(uint i) const {
    return load_aligned<16 / sizeof(T)>(x, staged_index<T>(i));
  }
};

template <typename T, typename X>
FUNCTION StagedVector<T, X> staged_vector(X x) {
  return {x};
}

// 1 + code / 2^BITS for the code that stands `shift` bits up in a word. The code becomes the upper bits of a mantissa, which is
// two instructions less than a conversion; the sum of the vector's elements takes the 1 away again.
template <int BITS>
FUNCTION float mantissa(uint word, int shift) {
  const int up = 23 - BITS - shift;
  const uint moved = up >= 0 ? word << uint(up >= 0 ? up : 0) : word >> uint(up >= 0 ? 0 : -up);
  return as_type<float>(masked_or(moved, ((1u << BITS) - 1u) << (23 - BITS), 0x3f800000u));
}

// Adds to a sum the products of four numbers with the codes in a word's bytes, each code / 2^24 times the value of the mask's
// lowest bit. `mask` covers the code in bytes 0 and 2; `above` is word >> 8. The mask leaves two float16 numbers, subnormal ones:
// that is half an instruction a code, and an Apple GPU multiplies float16 by float32 without a conversion.
FUNCTION float add_bytes(uint word, uint above, uint mask, float x0, float x1, float x2, float x3, float sum) {
  const metal::float2 even = halves(word & mask);
  const metal::float2 odd = halves(above & mask);
  return metal::fma(odd.y, x3, metal::fma(even.y, x2, metal::fma(odd.x, x1, metal::fma(even.x, x0, sum))));
}

// Elements i to i + N - 1 of a vector; N is a multiple of 16 bytes.
template <typename T, int N, typename X>
FUNCTION Pack<N> elements(X x, uint i) {
  constexpr int LOAD = 16 / sizeof(T);
  Pack<N> result;
  UNROLL
  for (int part = 0; part < N / LOAD; ++part) {
    const Pack<LOAD> xs = x.at(i + uint(part * LOAD));
    UNROLL
    for (int k = 0; k < LOAD; ++k) {
      result.v[part * LOAD + k] = xs.v[k];
    }
  }
  return result;
}

template <int R>
FUNCTION Pack<R> zeros() {
  Pack<R> pack;
  UNROLL
  for (int r = 0; r < R; ++r) {
    pack.v[r] = 0.0f;
  }
  return pack;
}
