// GGUF's Q4_K as in the file: w (rows, K / 256, 36) words a block: d and dmin (float16), 8 scales and 8 minima of 6 bits in
// 12 bytes, 128 bytes of codes; of each 32 bytes the low halves are one group of 32, the high halves the next.
// An element is d * scale * code - dmin * minimum. Chunk: 32 bytes of codes, two groups.
struct Q4K {};

struct Q4KGroup {
  float scale, minimum;
};

// Scale and minimum of group `group` (0 to 7), times d and dmin, from a block's first four words.
FUNCTION Q4KGroup q4_k_group(Words<4> head, uint group) {
  const uint shift = group % 4u * 8u;
  const uint low = (head.v[1] >> shift) & 0xffu;
  const uint middle = (head.v[2] >> shift) & 0xffu;
  const uint high = (head.v[3] >> shift) & 0xffu;
  const uint scale = group < 4u ? low & 63u : (high & 15u) | ((low >> 6) << 4);
  const uint minimum = group < 4u ? middle & 63u : (high >> 4) | ((middle >> 6) << 4);
  Q4KGroup result;
  result.scale = float_of_half(head.v[0]) * float(scale);
  result.minimum = float_of_half(head.v[0] >> 16) * float(minimum);
  return result;
}

template <typename T, int K>
FUNCTION constexpr int chunk_count(Q4K) {
  return K / 64;
}

// Six bits as `mantissa` leaves them, back as d times the number: exact, since d has 11 bits.
FUNCTION float q4_k_times(uint pair, int shift, float d) {
  return metal::fma(mantissa<6>(pair, shift), 64.0f * d, -64.0f * d);
}

template <int R>
struct Q4KChunk {
  Words<4> heads[R];
  Words<4> codes[R * 2];
};

template <typename T, int BITS, int GROUP, int K, int R, bool ALIGNED, typename W>
FUNCTION Q4KChunk<R> load_chunk(Q4K, Rows<R> rows, uint chunk, W w) {
  Q4KChunk<R> found;
  UNROLL
  for (int r = 0; r < R; ++r) {
    const uint block = (rows.v[r] * uint(K / 256) + chunk / 4u) * 36u;
    found.heads[r] = load_words<4, ALIGNED>(w, block);
    found.codes[r * 2] = load_words<4, ALIGNED>(w, block + 4u + chunk % 4u * 8u);
    found.codes[r * 2 + 1] = load_words<4, ALIGNED>(w, block + 8u + chunk % 4u * 8u);
  }
  return found;
}

template <typename T, bool STAGED, int BITS, int R, bool ALIGNED, typename X>
FUNCTION Pack<R> add_chunk(Q4K, Q4KChunk<R> found, uint chunk, X x, Pack<R> sums) {
  constexpr int LOAD = 16 / sizeof(T);
  Pack<R> low;
  Pack<R> high;
  UNROLL
  for (int r = 0; r < R; ++r) {
    low.v[r] = 0.0f;
    high.v[r] = 0.0f;
  }
  float low_total = 0.0f;
  float high_total = 0.0f;
  UNROLL
  for (int part = 0; part < 32 / LOAD; ++part) {
    const uint from = chunk * 64u + uint(part * LOAD);
    const Pack<LOAD> xs = load_aligned<LOAD, ALIGNED>(x, place_of<T, STAGED>(from));
    const Pack<LOAD> ys = load_aligned<LOAD, ALIGNED>(x, place_of<T, STAGED>(from + 32u));
    UNROLL
    for (int k = 0; k < LOAD; ++k) {
      const int i = part * LOAD + k;
      low_total += xs.v[k];
      high_total += ys.v[k];
      UNROLL
      for (int r = 0; r < R; ++r) {
        const uint word = found.codes[r * 2 + i / 16].v[i % 16 / 4];
        low.v[r] = metal::fma(mantissa<4>(word, i % 4 * 8), xs.v[k], low.v[r]);
        high.v[r] = metal::fma(mantissa<4>(word, i % 4 * 8 + 4), ys.v[k], high.v[r]);
      }
    }
  }
  // Both groups' scales in one word, their minima in another, as bytes.
  const bool lower = chunk % 4u < 2u;
  const uint shift = chunk % 2u * 16u;
  UNROLL
  for (int r = 0; r < R; ++r) {
    const Words<4> head = found.heads[r];
    const uint tops = head.v[3] >> shift;
    const uint scale = head.v[1] >> shift;
    const uint minimum = head.v[2] >> shift;
    const uint scales = lower ? scale : (tops & 0x0f0fu) | ((scale >> 2) & 0x3030u);
    const uint minima = lower ? minimum : ((tops >> 4) & 0x0f0fu) | ((minimum >> 2) & 0x3030u);
    const float d16 = float_of_half(head.v[0]);
    const float m16 = float_of_half(head.v[0] >> 16);
    const float a = metal::fma(16.0f * q4_k_times(scales, 0, d16), low.v[r] - low_total, sums.v[r]);
    const float b = metal::fma(16.0f * q4_k_times(scales, 8, d16), high.v[r] - high_total, a);
    const float c = metal::fma(-q4_k_times(minima, 0, m16), low_total, b);
    sums.v[r] = metal::fma(-q4_k_times(minima, 8, m16), high_total, c);
  }
  return sums;
}

// Elements column to column + 7 of a row; column is a multiple of 8.
template <int K, int BITS, int GROUP, typename W>
FUNCTION Pack<8> eight_elements(uint row, uint column, W w) {
  const uint block = (row * uint(K / 256) + column / 256u) * 36u;
  const uint group = column / 32u % 8u;
  const Words<4> head = load_words<4, true>(w, block);
  const Words<2> codes = load_words<2, true>(w, block + 4u + group / 2u * 8u + column % 32u / 4u);
  const Q4KGroup values = q4_k_group(head, group);
  Pack<8> result;
  for (int k = 0; k < 8; ++k) {
    const uint code = (codes.v[k / 4] >> (uint(k % 4 * 8) + group % 2u * 4u)) & 15u;
    result.v[k] = values.scale * float(code) - values.minimum;
  }
  return result;
}
