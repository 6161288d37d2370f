// GGUF's Q6_K, each block's parts in an array of their own so that 16-byte accesses are aligned: w (rows, K / 8) words of the
// codes' low 4 bits, scales (rows, K / 16) words of their high 2 bits, biases (rows, K / 64) words of one int8 scale for 16
// elements, d (rows, K / 256) float16 factors. An element is d * scale * (code - 32). Chunk: 64 elements of a block's
// half, at 0, 32, 64 and 96 from its start and the same 16 further on.
// As `mantissa<6>` of a code whose low 4 and high 2 bits lie in two words.
struct Q6K {};

template <typename T, int BITS, int K>
FUNCTION constexpr int row_length(Q6K) {
  return K / 8;
}

FUNCTION float mantissa6(uint low, int low_shift, uint high, int high_shift) {
  const uint bottom = low_shift > 17 ? low >> uint(low_shift - 17) : low << uint(17 - low_shift);
  const uint top = high_shift > 21 ? high >> uint(high_shift - 21) : high << uint(21 - high_shift);
  return float_of_bits(int(masked_or(bottom, 0x001e0000u, masked_or(top, 0x00600000u, 0x3f800000u))));
}

template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename X, typename W,
          typename H, typename S, typename F>
FUNCTION Pack<R> row_dots(Q6K, X x, Rows<R> rows, uint first, W w, H high_bits, S scales, F factors) {
  constexpr int CHUNKS = K / 64;
  constexpr int LOAD = 16 / sizeof(T);
  Pack<R> sums;
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = 0.0f;
  }
  for (int start = 0; start < CHUNKS; start += STEP * DEPTH) {
    Words<4> near[R * DEPTH];  // low 4 bits of elements 0 and 64 on
    Words<4> far[R * DEPTH];   // of elements 32 and 96 on
    Words<4> high[R * DEPTH];
    Words<2> scale[R * DEPTH];
    float factor[R * DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        const uint part = chunk / 2u;     // 128 elements
        const uint second = chunk % 2u;  // their second 16 of 32
        UNROLL
        for (int r = 0; r < R; ++r) {
          const uint half_block = rows.v[r] * uint(K / 128) + part;
          near[d * R + r] = load_words<4, ALIGNED>(w, half_block * 16u + second * 4u);
          far[d * R + r] = load_words<4, ALIGNED>(w, half_block * 16u + 8u + second * 4u);
          high[d * R + r] = load_words<4, ALIGNED>(high_bits, half_block * 8u + second * 4u);
          scale[d * R + r] = load_words<2, ALIGNED>(scales, half_block * 2u);
          factor[d * R + r] = float(factors[half_block / 2u]);
        }
      }
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        const uint second = chunk % 2u;
        UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) {
          const uint from = chunk / 2u * 128u + second * 16u + uint(quarter * 32);
          Pack<R> dots;
          UNROLL
          for (int r = 0; r < R; ++r) {
            dots.v[r] = 0.0f;
          }
          float total = 0.0f;
          UNROLL
          for (int part = 0; part < 16 / LOAD; ++part) {
            const Pack<LOAD> xs = load_aligned<LOAD, ALIGNED>(x, place_of<T, STAGED>(from + uint(part * LOAD)));
            UNROLL
            for (int k = 0; k < LOAD; ++k) {
              const int i = part * LOAD + k;
              total += xs.v[k];
              UNROLL
              for (int r = 0; r < R; ++r) {
                const uint low_word = quarter % 2 == 0 ? near[d * R + r].v[i / 4] : far[d * R + r].v[i / 4];
                const float code = mantissa6(low_word, i % 4 * 8 + quarter / 2 * 4, high[d * R + r].v[i / 4],
                                             i % 4 * 8 + quarter * 2);
                dots.v[r] = metal::fma(code, xs.v[k], dots.v[r]);
              }
            }
          }
          UNROLL
          for (int r = 0; r < R; ++r) {
            const uint bits = scale[d * R + r].v[quarter / 2] >> (uint(quarter % 2 * 16) + second * 8u);
            const float wide = factor[d * R + r] * float(int(bits << 24) >> 24);
            sums.v[r] = metal::fma(wide, metal::fma(64.0f, dots.v[r], -96.0f * total), sums.v[r]);
          }
        }
      }
    }
  }
  return sums;
}

// Elements column to column + 7 of a row; column is a multiple of 8.
template <int K, typename W, typename H, typename S, typename F>
FUNCTION Pack<8> eight_elements(uint row, uint column, W w, H high_bits, S scales, F factors) {
  const uint half_block = row * uint(K / 128) + column / 128u;
  const uint quarter = column / 32u % 4u;
  const uint word = column % 32u / 4u;
  const Words<2> low = load_words<2, true>(w, half_block * 16u + quarter % 2u * 8u + word);
  const Words<2> high = load_words<2, true>(high_bits, half_block * 8u + word);
  const uint at = quarter * 2u + column % 32u / 16u;  // of 8 scales
  const uint bits = scales[half_block * 2u + at / 4u] >> (at % 4u * 8u);
  const float scale = float(factors[half_block / 2u]) * float(int(bits << 24) >> 24);
  Pack<8> result;
  for (int k = 0; k < 8; ++k) {
    const uint bottom = (low.v[k / 4] >> (uint(k % 4 * 8) + quarter / 2u * 4u)) & 15u;
    const uint top = (high.v[k / 4] >> (uint(k % 4 * 8) + quarter * 2u)) & 3u;
    result.v[k] = scale * (float(bottom | (top << 4)) - 32.0f);
  }
  return result;
}
