// Products of a few rows of x with packed rows, whose stages come as in tile_sums.h. Each group's products are summed apart, with
// the codes' bits, and then multiplied by its scale, in float32: no weight is rounded.
//
// x comes from arrange.metal in halves of stages, 128 elements of 8 TILES rows: for each group and each tile of 8 rows what each lane
// needs, side by side, and then the groups' sums, as floats' bits. A threadgroup's simdgroups share it in threadgroup memory: read by
// each for itself, it would come past the first cache, and be the limit.
template <int GROUP, int TILES>
struct HalfStage {
  enum { SUMS = TILES * 512, WORDS = SUMS + 128 / GROUP * TILES * 8 };
};

template <int GROUP, int TILES, typename X>
struct Arranged {
  X x;
  uint lane;

  FUNCTION uint at(uint half_stage, uint group, int tile) const {
    return half_stage * uint(HalfStage<GROUP, TILES>::WORDS) +
        ((group * uint(TILES) + uint(tile)) * 32u + lane) * uint(GROUP / 8);
  }
  FUNCTION metal::uint4 eight(uint half_stage, uint group, int tile) const {
    return four_words(x, at(half_stage, group, tile));
  }
  FUNCTION metal::uint2 four(uint half_stage, uint group, int tile) const {
    return two_words(x, at(half_stage, group, tile));
  }
  // The sums of the lane's two columns.
  FUNCTION metal::float2 sums(uint half_stage, uint group, int tile) const {
    const uint from = half_stage * uint(HalfStage<GROUP, TILES>::WORDS) + uint(HalfStage<GROUP, TILES>::SUMS);
    const metal::uint2 bits = two_words(x, from + (group * uint(TILES) + uint(tile)) * 8u + lane % 4u * 2u);
    return metal::float2(as_type<float>(bits.x), as_type<float>(bits.y));
  }
};

template <int GROUP, int TILES, typename X>
FUNCTION Arranged<GROUP, TILES, X> arranged_rows(X x, uint lane) {
  return {x, lane};
}

// Starts to copy half a stage of x, or an empty batch where it is not below `end`.
template <int GROUP, int TILES, int THREADS, typename X, typename Words>
FUNCTION void start_half(Words words, uint half_stage, uint end, X x, uint id) {
  constexpr uint WORDS = uint(HalfStage<GROUP, TILES>::WORDS);
  if (half_stage < end) {
    for (uint i = id * 4u; i < WORDS; i += uint(THREADS * 4)) {
      start_copy<4>(x, half_stage % 2u * WORDS + i, words, half_stage * WORDS + i);
    }
  }
  end_batch();
}

// The scale and the offset of a group in rows g and g + 8 of a unit.
struct Scales {
  float scale[2], offset[2];
};

// Adds scale * code + offset for each element of x's rows, from their products with the codes' bits and their own sums.
template <typename T>
FUNCTION Pack<4> scaled_tile(Pack<4> sums, Pack<4> dots, metal::float2 totals, Scales scales) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const float scale = scales.scale[i / 2];
    const float offset = metal::fma(scale, -CodeBits<T>::added(), scales.offset[i / 2]);
    sums.v[i] = metal::fma(scale * CodeBits<T>::unit(), dots.v[i], metal::fma(offset, totals[i % 2], sums.v[i]));
  }
  return sums;
}

// T's bits of the codes, below 128, in the first and third byte of a word.
template <typename T>
FUNCTION uint two_bytes(uint word) {
  return masked_or(word, 0x007f007fu, CodeBits<T>::bits());
}

// Starts to copy a stage of a unit, or an empty batch where it is not below `end`.
template <int N, typename Matrix, typename Ring>
FUNCTION void start_unit(Matrix matrix, uint unit, uint stage, uint end, Ring ring, uint at, uint lane) {
  if (stage < end) {
    const StageRows<0, N> rows = {unit};
    matrix.start_codes(rows, stage, ring, at, lane);
  }
  end_batch();
}
