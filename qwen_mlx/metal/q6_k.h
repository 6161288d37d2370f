// GGUF's Q6_K, each block's parts in an array of their own: w (rows, K / 8) words of the codes' low 4 bits, high (rows, K / 16)
// words of their high 2 bits, scales (rows, K / 64) words of one int8 scale for 16 elements, factors (rows, K / 256) float16.
// An element is factor * scale * (code - 32). A chunk is 64 elements of a block's half: those from 0, 32, 64 and 96 on, 16 each,
// or the 16 after each of them.

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
    const uint second = index % 2u;
    Pack<R> scales[4];  // over 2^24
    UNROLL
    for (int r = 0; r < R; ++r) {
      UNROLL
      for (int half_block = 0; half_block < 2; ++half_block) {
        const uint word = chunk.scales[r][half_block];
        // An int8 with 128 added is a code of 8 bits.
        const metal::float2 pair = halves(((second == 0u ? word : word >> 8) ^ 0x00800080u) & 0x00ff00ffu);
        scales[2 * half_block].v[r] = chunk.factors[r] * (pair.x - 128.0f / 16777216.0f);
        scales[2 * half_block + 1].v[r] = chunk.factors[r] * (pair.y - 128.0f / 16777216.0f);
      }
    }
    UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint from = index / 2u * 128u + second * 16u + uint(quarter * 32);
      Pack<R> low = zeros<R>();
      Pack<R> high = zeros<R>();
      float total = 0.0f;
      UNROLL
      for (int part = 0; part < 2; ++part) {
        const Pack<8> xs = elements<T, 8>(x, from + uint(part * 8));
        UNROLL
        for (int k = 0; k < 8; ++k) {
          total += xs.v[k];
        }
        UNROLL
        for (int k = 0; k < 8; k += 4) {
          UNROLL
          for (int r = 0; r < R; ++r) {
            const int i = part * 2 + k / 4;
            const uint word = quarter % 2 == 0 ? chunk.near_low[r][i] : chunk.far_low[r][i];
            const uint top = chunk.high[r][i];
            const uint low_mask = quarter < 2 ? 0x000f000fu : 0x00f000f0u;
            const uint mask = 0x00030003u << uint(quarter * 2);
            low.v[r] = add_bytes(word, word >> 8, low_mask, xs.v[k], xs.v[k + 1], xs.v[k + 2], xs.v[k + 3], low.v[r]);
            high.v[r] = add_bytes(top, top >> 8, mask, xs.v[k], xs.v[k + 1], xs.v[k + 2], xs.v[k + 3], high.v[r]);
          }
        }
      }
      // low and high are the sums over 2^24 and, by the quarter, over 2^20 to 2^24.
      const float low_factor = quarter < 2 ? 16777216.0f : 1048576.0f;
      const float high_factor = 268435456.0f / float(1 << (quarter * 2));
      UNROLL
      for (int r = 0; r < R; ++r) {
        const float dot = metal::fma(high_factor, high.v[r], metal::fma(low_factor, low.v[r], -32.0f * total));
        sums.v[r] = metal::fma(16777216.0f * scales[quarter].v[r], dot, sums.v[r]);
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
