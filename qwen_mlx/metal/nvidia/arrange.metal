// x (count, K) in the order in which matmul_packed.metal reads it (packed_rows.h): arranged, halves of stages. Its words are pairs of
// elements in ByteOrder; rows beyond x's are 0. A simdgroup has a group of a tile.
// Template: T of 16 bits, K, GROUP elements, TILES of 8 rows.
constexpr uint GROUPS = 128 / GROUP;  // of half a stage

const uint lane = thread_index_in_simdgroup;
const uint item = thread_position_in_grid.x / uint(SIMD_WIDTH);
const uint group = item / uint(TILES);
const uint row = item % uint(TILES) * 8u + lane / 4u;
const uint column = group * uint(GROUP) + lane % 4u * uint(GROUP / 4);
metal::uint4 words = metal::uint4(0u, 0u, 0u, 0u);
Pack<GROUP / 4> values = zeros<GROUP / 4>();
if (row < uint(x_shape[0])) {
  words = load_halves(x, row * uint(K) + column / 8u * 8u);
  values = load<GROUP / 4>(x, row * uint(K) + column);
}
const uint half_stage = group / GROUPS * uint(HalfStage<GROUP, TILES>::WORDS);
const uint in_half = item % (GROUPS * uint(TILES));
const uint to = half_stage + (in_half * uint(SIMD_WIDTH) + lane) * uint(GROUP / 8);
const uint first = column % 8u == 0u ? words.x : words.z;
const uint second = column % 8u == 0u ? words.y : words.w;
arranged[to] = lower_halves(first, second);
arranged[to + 1u] = upper_halves(first, second);
if (GROUP == 32) {
  arranged[to + 2u] = lower_halves(words.z, words.w);
  arranged[to + 3u] = upper_halves(words.z, words.w);
}
float sum = 0.0f;
UNROLL
for (int k = 0; k < GROUP / 4; ++k) {
  sum += values.v[k];
}
sum += metal::simd_shuffle_xor(sum, ushort(1));
sum += metal::simd_shuffle_xor(sum, ushort(2));
if (lane % 4u == 0u) {
  arranged[half_stage + uint(HalfStage<GROUP, TILES>::SUMS) + in_half * 8u + lane / 4u] = as_type<uint>(sum);
}
