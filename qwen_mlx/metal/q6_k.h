// GGUF's Q6_K, each block's parts in an array of their own so that 16-byte accesses are aligned: w (rows, K / 8) words of the
// codes' low 4 bits, scales (rows, K / 16) words of their high 2 bits, biases (rows, K / 64) words of one int8 scale for 16
// elements, d (rows, K / 256) float16 factors. An element is d * scale * (code - 32). Chunk: 64 elements of a block's
// half, at 0, 32, 64 and 96 from its start and the same 16 further on.
struct Q6K {};

template <typename T, int K>
FUNCTION constexpr int chunk_count(Q6K) {
  return K / 64;
}

// As `mantissa<6>` of a code whose low 4 and high 2 bits lie in two words.
FUNCTION float mantissa6(uint low, int low_shift, uint high, int high_shift) {
  const uint bottom = low_shift > 17 ? low >> uint(low_shift - 17) : low << uint(17 - low_shift);
  const uint top = high_shift > 21 ? high >> uint(high_shift - 21) : high << uint(21 - high_shift);
  return float_of_bits(int(masked_or(bottom, 0x001e0000u, masked_or(top, 0x00600000u, 0x3f800000u))));
}

template <int R, typename Factor>
struct Q6KChunk {
  Words<4> near[R];  // low 4 bits of elements 0 and 64 on
  Words<4> far[R];   // of elements 32 and 96 on
  Words<4> high[R];
  Words<2> scales[R];
  Factor factors[R];
};

template <typename T, int BITS, int GROUP, int K, int R, bool ALIGNED, typename W, typename H, typename S, typename F>
FUNCTION auto load_chunk(Q6K, Rows<R> rows, uint chunk, W w, H high_bits, S scales, F factors)
    -> Q6KChunk<R, decltype(value_of(factors[0]))> {
  Q6KChunk<R, decltype(value_of(factors[0]))> found;
  const uint second = chunk % 2u;  // the second 16 of 32
  UNROLL
  for (int r = 0; r < R; ++r) {
    const uint half_block = rows.v[r] * uint(K / 128) + chunk / 2u;
    found.near[r] = load_words<4, ALIGNED>(w, half_block * 16u + second * 4u);
    found.far[r] = load_words<4, ALIGNED>(w, half_block * 16u + 8u + second * 4u);
    found.high[r] = load_words<4, ALIGNED>(high_bits, half_block * 8u + second * 4u);
    found.scales[r] = load_words<2, ALIGNED>(scales, half_block * 2u);
    found.factors[r] = factors[half_block / 2u];
  }
  return found;
}

template <typename T, bool STAGED, int BITS, int R, bool ALIGNED, typename Factor, typename X>
FUNCTION Pack<R> add_chunk(Q6K, Q6KChunk<R, Factor> found, uint chunk, X x, Pack<R> sums) {
  constexpr int LOAD = 16 / sizeof(T);
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
          const uint low_word = quarter % 2 == 0 ? found.near[r].v[i / 4] : found.far[r].v[i / 4];
          const float code =
              mantissa6(low_word, i % 4 * 8 + quarter / 2 * 4, found.high[r].v[i / 4], i % 4 * 8 + quarter * 2);
          dots.v[r] = metal::fma(code, xs.v[k], dots.v[r]);
        }
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      const uint bits = found.scales[r].v[quarter / 2] >> (uint(quarter % 2 * 16) + second * 8u);
      const float wide = float(found.factors[r]) * float(int(bits << 24) >> 24);
      sums.v[r] = metal::fma(wide, metal::fma(64.0f, dots.v[r], -96.0f * total), sums.v[r]);
    }
  }
  return sums;
}

// Elements column to column + 7 of a row; column is a multiple of 8.
template <int K, int BITS, int GROUP, typename W, typename H, typename S, typename F>
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
