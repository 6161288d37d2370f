// Attention of one token's GROUP query heads on one key/value head, a simdgroup at a time on runs of 32 keys (Milakov and
// Gimelshein 2018, algorithm 3): each lane takes the score of a key, then PER elements of all values.
template <int GROUP, int PER>
struct Attended {
  float largest[GROUP];  // of the scores so far
  float total[GROUP];    // of this lane's weights
  Pack<PER> sum[GROUP];  // of weighted values
};

template <int GROUP, int PER>
FUNCTION Attended<GROUP, PER> nothing_attended() {
  Attended<GROUP, PER> a;
  for (int g = 0; g < GROUP; ++g) {
    a.largest[g] = float_of_bits(int(0xff800000u));
    a.total[g] = 0.0f;
    for (int k = 0; k < PER; ++k) {
      a.sum[g].v[k] = 0.0f;
    }
  }
  return a;
}

// `count` keys, 1 to 32, whose rows begin at row `keys` and their values at row `values` of `kv`.
template <typename T, int GROUP, int D, typename KV, typename Queries>
FUNCTION Attended<GROUP, D / SIMD_WIDTH> attend_run(Attended<GROUP, D / SIMD_WIDTH> a, Queries queries, KV kv, uint keys,
                                                    uint values, uint count, uint lane, float scale) {
  constexpr int N = 16 / sizeof(T);
  constexpr int PER = D / SIMD_WIDTH;
  const uint row = (keys + (lane < count ? lane : count - 1u)) * uint(D);
  float weight[GROUP];
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    weight[g] = 0.0f;
  }
  UNROLL
  for (int c = 0; c < D; c += N) {
    const Pack<N> key = load_aligned<N, true>(kv, row + uint(c));
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        weight[g] = metal::fma(queries[g * D + c + k], key.v[k], weight[g]);
      }
    }
  }
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    const float score = lane < count ? weight[g] * scale : float_of_bits(int(0xff800000u));
    const float most = metal::max(a.largest[g], metal::simd_max(score));
    // While all scores are -inf their weights are 0: -inf minus -inf would be NaN.
    const float base = most == float_of_bits(int(0xff800000u)) ? 0.0f : most;
    const float shrunk = metal::precise::exp(a.largest[g] - base);
    weight[g] = metal::precise::exp(score - base);
    a.total[g] = metal::fma(a.total[g], shrunk, weight[g]);
    a.largest[g] = most;
    UNROLL
    for (int k = 0; k < PER; ++k) {
      a.sum[g].v[k] *= shrunk;
    }
  }
  for (uint part = 0u; part < count; part += 8u) {
    UNROLL
    for (uint j = 0u; j < 8u; ++j) {
      // Beyond the last key the weight is 0.
      const uint other = part + j < count ? part + j : count - 1u;
      const Pack<PER> value = load_aligned<PER, true>(kv, (values + other) * uint(D) + lane * uint(PER));
      UNROLL
      for (int g = 0; g < GROUP; ++g) {
        const float w = metal::simd_shuffle(weight[g], ushort(part + j));
        UNROLL
        for (int k = 0; k < PER; ++k) {
          a.sum[g].v[k] = metal::fma(w, value.v[k], a.sum[g].v[k]);
        }
      }
    }
  }
  return a;
}

// What worker `worker` of `workers` attends to: every `workers`-th run of the keys before the tail, the last one the tail.
// room, tail_room: rows a head has in kv and in tail; place: the position, and how many tokens lie before the tail.
template <typename T, int HEADS, int GROUP, int D, int WINDOW, typename KV, typename Queries>
FUNCTION Attended<GROUP, D / SIMD_WIDTH> attend_all(Queries queries, KV kv, uint room, KV tail, uint tail_room,
                                                    uint position, uint filled, uint head, uint worker, uint workers,
                                                    uint lane, float scale) {
  Attended<GROUP, D / SIMD_WIDTH> a = nothing_attended<GROUP, D / SIMD_WIDTH>();
  const uint end = position + 1u;
  const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u;
  for (uint start = begin + worker * 32u; start < filled; start += workers * 32u) {
    const uint count = filled - start < 32u ? filled - start : 32u;
    a = attend_run<T, GROUP, D>(a, queries, kv, head * room + start, (uint(HEADS) + head) * room + start, count, lane,
                                scale);
  }
  if (worker == workers - 1u) {
    const uint first = begin > filled ? begin - filled : 0u;
    a = attend_run<T, GROUP, D>(a, queries, tail, head * tail_room + first, (uint(HEADS) + head) * tail_room + first,
                                end - filled - first, lane, scale);
  }
  return a;
}
