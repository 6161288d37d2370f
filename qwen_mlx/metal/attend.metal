// Attention of one token on the keys of one head of the cache, one simdgroup for every SPLITS-th run of 32 keys: for each of its
// GROUP query heads the weighted sum of values, the largest score and the sum of weights, which combine.metal puts together.
// q (KV GROUP, D), kv (1, 2 KV, room, D), keys first, T; offset (1) int32, the newest key; sums (KV GROUP, SPLITS, D) and
// stats (KV GROUP, SPLITS, 2) float. Scores and softmax in float (Milakov and Gimelshein 2018, algorithm 3).
// Template: T, KV, GROUP, D, SPLITS, WINDOW keys that are seen or 0 for all, SCALE the bits of the scores' factor.
constexpr int N = 16 / sizeof(T);
constexpr int PER = D / SIMD_WIDTH;
threadgroup float queries[GROUP * D];

const uint lane = thread_index_in_simdgroup;
const uint split = threadgroup_position_in_grid.x;
const uint head = threadgroup_position_in_grid.y;
const uint room = uint(kv_shape[2]);
const uint end = uint(offset[0]) + 1u;
const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u;
for (uint i = lane; i < uint(GROUP * D); i += uint(SIMD_WIDTH)) {
  queries[i] = float(q[head * uint(GROUP * D) + i]);
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

const float minus_infinity = float_of_bits(int(0xff800000u));
float largest[GROUP];
float total[GROUP];
Pack<PER> sum[GROUP];
UNROLL
for (int g = 0; g < GROUP; ++g) {
  largest[g] = minus_infinity;
  total[g] = 0.0f;
  UNROLL
  for (int k = 0; k < PER; ++k) {
    sum[g].v[k] = 0.0f;
  }
}
for (uint start = begin + split * 32u; start < end; start += uint(SPLITS) * 32u) {
  const uint key = start + lane;
  const bool seen = key < end;
  const uint row = (head * room + (seen ? key : end - 1u)) * uint(D);
  float weight[GROUP];
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    weight[g] = 0.0f;
  }
  UNROLL
  for (int c = 0; c < D; c += N) {
    const Pack<N> keys = load_aligned<N, true>(kv, row + uint(c));
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        weight[g] = metal::fma(queries[g * D + c + k], keys.v[k], weight[g]);
      }
    }
  }
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    const float score = seen ? weight[g] * float_of_bits(SCALE) : minus_infinity;
    const float most = metal::max(largest[g], metal::simd_max(score));
    const float shrunk = metal::precise::exp(largest[g] - most);
    weight[g] = metal::precise::exp(score - most);
    total[g] = metal::fma(total[g], shrunk, weight[g]);
    UNROLL
    for (int k = 0; k < PER; ++k) {
      sum[g].v[k] *= shrunk;
    }
    largest[g] = most;
  }
  for (uint part = 0u; part < 32u; part += 8u) {
    UNROLL
    for (uint j = 0u; j < 8u; ++j) {
      const uint other = start + part + j < end ? start + part + j : end - 1u;
      const Pack<PER> values =
          load_aligned<PER, true>(kv, ((uint(KV) + head) * room + other) * uint(D) + lane * uint(PER));
      UNROLL
      for (int g = 0; g < GROUP; ++g) {
        const float w = metal::simd_shuffle(weight[g], ushort(part + j));
        UNROLL
        for (int k = 0; k < PER; ++k) {
          sum[g].v[k] = metal::fma(w, values.v[k], sum[g].v[k]);
        }
      }
    }
  }
}
for (int g = 0; g < GROUP; ++g) {
  const uint at = (head * uint(GROUP) + uint(g)) * uint(SPLITS) + split;
  const float all = metal::simd_sum(total[g]);
  store<float>(sums, at * uint(D) + lane * uint(PER), sum[g]);
  if (lane == 0u) {
    stats[2u * at] = largest[g];
    stats[2u * at + 1u] = all;
  }
}
