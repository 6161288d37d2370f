// GGUF's Q6_K, each block's parts in an array of their own: w (rows, K / 8) words of the codes' low 4 bits, high (rows, K / 16)
// words of their high 2 bits, scales (rows, K / 64) words of one int8 scale for 16 elements, factors (rows, K / 256) float16.
// An element is factor * scale * (code - 32). A chunk is 64 elements of a block's half: those from 0, 32, 64 and 96 on, 16 each,
// or the 16 after each of them.

// As `mantissa<6>` of a code whose low 4 and high 2 bits lie in two words.
FUNCTION float mantissa6(uint low, int low_shift, uint high, int high_shift) {
  const uint bottom = low_shift > 17 ? low >> uint(low_shift - 17) : low << uint(17 - low_shift);
  const uint top = high_shift > 21 ? high >> uint(high_shift - 21) : high << uint(21 - high_shift);
  return as_type<float>(masked_or(bottom, 0x001e0000u, masked_or(top, 0x00600000u, 0x3f800000u)));
}

// The int8 in the lowest byte of a word.
FUNCTION float low_int8(uint word) {
  return float(int(word << 24) >> 24);
}

template <typename T, int K, int R, typename W, typename H, typename S, typename F>
struct Q6K {
  enum { CHUNKS = K / 64 };
  struct Chunk {
    metal::uint4 near_low[R];  // low 4 bits of the elements from 0 and 64 on
    metal::uint4 far_low[R];   // of those from 32 and 96 on
    metal::uint4 high[R];
    metal::uint2 scales[R];
    float factors[R];
  };
  W w;
  H high;
  S scales;
  F factors;

  FUNCTION Chunk load_chunk(Rows<R> rows, uint index) const {
    Chunk chunk;
    const uint second = index % 2u;  // 1 for the second 16 of 32
    UNROLL
    for (int r = 0; r < R; ++r) {
      const uint half_block = rows.v[r] * uint(K / 128) + index / 2u;
      chunk.near_low[r] = load_uint4(w, half_block * 16u + second * 4u);
      chunk.far_low[r] = load_uint4(w, half_block * 16u + 8u + second * 4u);
      chunk.high[r] = load_uint4(high, half_block * 8u + second * 4u);
      chunk.scales[r] = load_uint2(scales, half_block * 2u);
      chunk.factors[r] = float(factors[half_block / 2u]);
    }
    return chunk;
  }

  template <typename X>
  FUNCTION Pack<R> add_chunk(Chunk chunk, uint index, X x, Pack<R> sums) const {
    constexpr int LOAD = 16 / sizeof(T);
    const uint second = index % 2u;
    UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint from = index / 2u * 128u + second * 16u + uint(quarter * 32);
      Pack<R> dots = zeros<R>();
      float total = 0.0f;
      UNROLL
      for (int part = 0; part < 16 / LOAD; ++part) {
        const Pack<LOAD> xs = x.at(from + uint(part * LOAD));
        UNROLL
        for (int k = 0; k < LOAD; ++k) {
          const int i = part * LOAD + k;
          total += xs.v[k];
          UNROLL
          for (int r = 0; r < R; ++r) {
            const uint low_word = quarter % 2 == 0 ? chunk.near_low[r][i / 4] : chunk.far_low[r][i / 4];
            const float code = mantissa6(low_word, i % 4 * 8 + quarter / 2 * 4, chunk.high[r][i / 4], i % 4 * 8 + quarter * 2);
            dots.v[r] = metal::fma(code, xs.v[k], dots.v[r]);
          }
        }
      }
      UNROLL
      for (int r = 0; r < R; ++r) {
        const float scale = low_int8(chunk.scales[r][quarter / 2] >> (uint(quarter % 2 * 16) + second * 8u));
        sums.v[r] = metal::fma(chunk.factors[r] * scale, metal::fma(64.0f, dots.v[r], -96.0f * total), sums.v[r]);
      }
    }
    return sums;
  }

  // Elements column to column + 7 of a row; column is a multiple of 8.
  FUNCTION Pack<8> eight_elements(uint row, uint column) const {
    const uint half_block = row * uint(K / 128) + column / 128u;
    const uint quarter = column / 32u % 4u;
    const uint word = column % 32u / 4u;
    const metal::uint2 bottoms = load_uint2(w, half_block * 16u + quarter % 2u * 8u + word);
    const metal::uint2 tops = load_uint2(high, half_block * 8u + word);
    const uint group = quarter * 2u + column % 32u / 16u;  // of 8
    const float scale = float(factors[half_block / 2u]) * low_int8(scales[half_block * 2u + group / 4u] >> (group % 4u * 8u));
    Pack<8> result;
    UNROLL
    for (int k = 0; k < 8; ++k) {
      const uint bottom = (bottoms[k / 4] >> (uint(k % 4 * 8) + quarter / 2u * 4u)) & 15u;
      const uint top = (tops[k / 4] >> (uint(k % 4 * 8) + quarter * 2u)) & 3u;
      result.v[k] = scale * (float(bottom | (top << 4)) - 32.0f);
    }
    return result;
  }
};

template <typename T, int K, int R, typename W, typename H, typename S, typename F>
FUNCTION Q6K<T, K, R, W, H, S, F> q6_k(W w, H high, S scales, F factors) {
  return {w, high, scales, factors};
}
